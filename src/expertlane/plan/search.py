"""Which deployment serves most tokens a second: all are screened, the best projected in full."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from expertlane.cost.laws.execution import LIKELY
from expertlane.cost.step.operation import Floats
from expertlane.errors import UserError
from expertlane.memory import size_text
from expertlane.plan.candidates import Candidate, candidates_of, check_devices, valid_layouts
from expertlane.plan.project import Projector, StepSize
from expertlane.plan.request import Goals, PlanRequest
from expertlane.plan.screen import Screen, Screened
from expertlane.plan.throughput import Steps, ThroughputCurve, one_pool
from expertlane.results.record import StepsRecord
from expertlane.results.timeline import StepTimeline
from expertlane.spec.names import Phase


@dataclass(frozen=True, eq=False)
class Option:
    """A candidate that fits, as screened; `place` is its best number of sequences.

    Attributes:
        place: None where it breaks a limit with every number of sequences.
    """

    screened: Screened
    steps: Steps
    served: ThroughputCurve
    place: int | None

    @property
    def candidate(self) -> Candidate:
        """The deployment."""
        return self.screened.candidate

    @property
    def tps(self) -> float:
        """Output tokens a second at its best, 0 where it breaks a limit."""
        return 0.0 if self.place is None else float(self.served.tps[LIKELY, self.place])

    @property
    def num_seqs(self) -> int:
        """Running at once at its best, over the whole system; 0 where it breaks a limit."""
        return 0 if self.place is None else int(self.steps.num_seqs[self.place])

    def next_best(self, goals: Goals) -> "Option":
        """The same with the best number of sequences among those that serve less than this one."""
        keeps = (self.served.breach(goals) <= 1) & (self.served.tps[LIKELY] < self.tps)
        place = int(np.where(keeps, self.served.tps[LIKELY], -1).argmax()) if keeps.any() else None
        return replace(self, place=place)

    def nearest(self, goals: Goals) -> "Option":
        """The same with the number of sequences that comes nearest to the limits."""
        return replace(self, place=int(self.served.breach(goals).argmin()))


@dataclass(frozen=True, eq=False)
class Finalist:
    """An option projected in full.

    Attributes:
        steps, served: at its one best number of sequences.
    """

    option: Option
    decode: StepsRecord
    prefill: StepsRecord
    steps: Steps
    served: ThroughputCurve

    @property
    def tps(self) -> float:
        """Output tokens a second."""
        return float(self.served.tps[LIKELY, 0])

    @property
    def num_seqs(self) -> int:
        """Running at once, over the whole system."""
        return int(self.served.num_seqs[0])

    def keeps(self, goals: Goals) -> bool:
        """Whether it keeps the limits."""
        return self.served.best(goals) is not None

    def breach(self, goals: Goals) -> float:
        """By what factor it misses the worse limit; 1 or less where it keeps both."""
        return float(self.served.breach(goals)[0])


NUM_FINALISTS = 12
_MOST_OF_LAYOUT = 2  # finalists, and trials of as many sequences
_MOST_BROKEN = 24  # trials that break a limit, before what was found is all
_NUM_NEAREST = 6


@dataclass(frozen=True, eq=False)
class Finals:
    """What was projected in full.

    Attributes:
        options: all, each with the best number of sequences that is not known to break a limit.
        kept: those that keep the limits, the best first.
        broke: those that do not.
    """

    options: Sequence[Option]
    kept: Sequence[Finalist]
    broke: Sequence[Finalist]


def best_in_full(
    options: Sequence[Option],
    goals: Goals,
    finish: Callable[[Option], Finalist],
    advance: Callable[[int], None],
) -> Finals:
    """The best by tokens a second, not too many of one layout.

    What breaks a limit in full is taken up again with fewer sequences. Where all break one, those
    that come nearest as screened are tried as well.

    Args:
        finish: projects an option in full.
        advance: called with 1 for each finalist.
    """
    current = list(options)
    queue = [(-each.tps, number) for number, each in enumerate(options) if each.place is not None]
    heapq.heapify(queue)
    kept: list[Finalist] = []
    broke: list[Finalist] = []
    of_layout, tried = Counter[object](), Counter[object]()
    while queue and len(kept) < NUM_FINALISTS and len(broke) < _MOST_BROKEN:
        _, number = heapq.heappop(queue)
        option = current[number]
        layout = option.candidate.layout
        size = layout, option.num_seqs
        if of_layout[layout] == _MOST_OF_LAYOUT or tried[size] == _MOST_OF_LAYOUT:
            continue
        tried[size] += 1
        finalist = finish(option)
        if finalist.keeps(goals):
            kept.append(finalist)
            of_layout[layout] += 1
            advance(1)
            continue
        broke.append(finalist)
        current[number] = lower = option.next_best(goals)
        if lower.place is not None:
            heapq.heappush(queue, (-lower.tps, number))
    if not kept:
        for number in _nearest(options, goals):
            finalist = finish(options[number].nearest(goals))
            if finalist.keeps(goals):
                current[number] = finalist.option
                kept.append(finalist)
            else:
                broke.append(finalist)
    return Finals(current, sorted(kept, key=lambda each: -each.tps), broke)


def _nearest(options: Sequence[Option], goals: Goals) -> list[int]:
    """Numbers of those that come nearest to the limits as screened, one of each layout."""
    breaches = [float(each.served.breach(goals).min()) for each in options]
    nearest: dict[object, int] = {}
    for number in sorted(range(len(options)), key=lambda number: breaches[number]):
        nearest.setdefault(options[number].candidate.layout, number)
        if len(nearest) == _NUM_NEAREST:
            break
    return list(nearest.values())


@dataclass(frozen=True, eq=False)
class OnePool:
    """What was found for one pool of all devices.

    Attributes:
        options: all that fit, in the order of candidates.
        finalists: by tokens a second, the best first; all keep the limits.
        num_candidates, num_too_large: of all, and those that do not fit.
    """

    options: Sequence[Option]
    finalists: Sequence[Finalist]
    num_candidates: int
    num_too_large: int


def _unseen(num: int) -> None:
    """Progress that nobody watches."""


class Search:
    """Plans deployments of a model on a cluster.

    Raises:
        UserError: the cluster is larger than a plan can be made for.
    """

    def __init__(
        self,
        request: PlanRequest,
    ) -> None:
        check_devices(request.cluster)
        self._request = request

    @cached_property
    def candidates(self) -> list[Candidate]:
        """All that use every device."""
        per_node = self._request.cluster.profile.ranks_per_node
        return [
            candidate
            for layout in valid_layouts(self._request.model, self._request.cluster.num_devices)
            for candidate in candidates_of(
                layout, self._request.model, per_node, self._request.setting.payload
            )
        ]

    def one_pool(self) -> OnePool:
        """Every deployment of one pool, and the best in full; `screen` and `in_full` at once."""
        return self.in_full(self.screen())

    def screen(self, advance: Callable[[int], None] = _unseen) -> list[Screened]:
        """All candidates.

        Args:
            advance: called with a number of candidates that are done.

        Raises:
            UserError: no layout of so many devices is valid for the model.
        """
        if not self.candidates:
            model = self._request.model
            raise UserError(
                f"no layout of {self._request.cluster.num_devices} devices is valid for "
                f"{model.name}: it has {model.num_attention_heads} attention heads, "
                f"{model.num_kv_heads} of keys and values and {model.num_hidden_layers} layers, "
                "and tp must divide the heads"
            )
        screen = Screen(
            self._request.model,
            self._request.cluster,
            self._request.traffic,
            self._request.setting,
        )
        return screen.run(self.candidates, advance)

    def in_full(
        self, screened: Sequence[Screened], advance: Callable[[int], None] = _unseen
    ) -> OnePool:
        """The best of those screened.

        Args:
            advance: called with 1 for each of the best.

        Raises:
            UserError: nothing fits, or nothing keeps the limits; with the nearest deployment.
        """
        options = self.options(screened)
        if not options:
            raise UserError(self._too_large(screened))
        finals = best_in_full(options, self._request.goals, self.finish, advance)
        if not finals.kept:
            nearest = min(finals.broke, key=lambda each: each.breach(self._request.goals))
            raise UserError(self._missed(nearest))
        num_too_large = len(screened) - len(options)
        return OnePool(finals.options, finals.kept, len(screened), num_too_large)

    def options(self, screened: Iterable[Screened]) -> list[Option]:
        """Those that fit."""
        return [self._option(each) for each in screened if each.decode is not None]

    def _option(self, screened: Screened) -> Option:
        assert screened.decode is not None, "it fits"
        assert screened.prefill is not None, "it fits"
        assert screened.prompts is not None, "it fits"
        layout, num_all = screened.candidate.layout, self._request.traffic.num_sequences
        num_seqs = np.minimum(screened.num_seqs * (layout.replicas * layout.dp), num_all)
        steps = Steps(
            layout,
            num_seqs,
            screened.decode.seconds,
            screened.prefill.seconds[:, 0],
            screened.prompts,
            num_all,
        )
        served = one_pool(steps, self._request.traffic)
        return Option(screened, steps, served, served.best(self._request.goals))

    def finish(self, option: Option) -> Finalist:
        """An option in full, at its best number of sequences; it may break a limit then."""
        assert option.place is not None, "it keeps the limits as screened"
        projector = self._projector(option)
        sizes = self._sizes(option, option.num_seqs)
        decode, prefill = projector.step(sizes[Phase.DECODE]), projector.step(sizes[Phase.PREFILL])
        steps = replace(
            option.steps,
            num_seqs=np.array([option.num_seqs]),
            decode_s=_bounds(decode)[:, None],
            prefill_s=_bounds(prefill),
        )
        return Finalist(option, decode, prefill, steps, one_pool(steps, self._request.traffic))

    def timelines(self, finalist: Finalist) -> dict[Phase, StepTimeline]:
        """What every rank does when, in the steps that it was projected by."""
        projector = self._projector(finalist.option)
        sizes = self._sizes(finalist.option, finalist.num_seqs)
        return {phase: projector.timeline(size) for phase, size in sizes.items()}

    def _projector(self, option: Option) -> Projector:
        layout, options = option.candidate
        return Projector(
            self._request.model, layout, options, self._request.cluster, self._request.setting
        )

    def _sizes(self, option: Option, num_seqs: int) -> dict[Phase, StepSize]:
        prompts = option.steps.prompts
        return {
            Phase.PREFILL: StepSize(
                option.steps.num_prompts,
                prompts.num_new,
                prompts.num_cached,
                phase=Phase.PREFILL,
            ),
            Phase.DECODE: StepSize(num_seqs, 1, self._request.traffic.mean_context),
        }

    def _too_large(self, screened: Iterable[Screened]) -> str:
        nearest = min(screened, key=lambda each: each.capacity.memory.total_bytes)
        need = nearest.capacity.memory
        request = self._request
        return (
            f"{request.model.name} in {request.setting.types} fits no deployment on "
            f"{request.cluster}: "
            f"the smallest, {nearest.candidate.layout}, needs {size_text(need.total_bytes)} on a "
            f"rank (weights {size_text(need.weight_bytes)}, keys and values of one sequence "
            f"{size_text(need.kv_bytes)}, activations {size_text(need.activation_bytes)}) of "
            f"{size_text(nearest.capacity.free_bytes)}; take more devices, float8 or shorter "
            "sequences"
        )

    def _missed(self, nearest: Finalist) -> str:
        """What to say where nothing keeps the limits: which limits, and who comes nearest."""
        misses: list[str] = []
        keeps: list[str] = []
        for name, limit, value in (
            ("TPOT", self._request.goals.max_tpot_s, nearest.served.tpot_s[LIKELY, 0]),
            ("TTFT", self._request.goals.max_ttft_s, nearest.served.ttft_s[LIKELY, 0]),
        ):
            if limit is not None:
                says = misses if value > limit else keeps
                says.append(f"the {name} limit of {1e3 * limit:g} ms with {1e3 * value:.4g} ms")
        said = [f"misses {' and '.join(misses)}", *(f"keeps {each}" for each in keeps)]
        num = nearest.num_seqs
        return (
            f"no deployment on {self._request.cluster} keeps the limits; the nearest, "
            f"{nearest.option.candidate}, with {num} sequence{'' if num == 1 else 's'} at once, "
            f"{' and '.join(said)}"
        )


def _bounds(step: StepsRecord) -> Floats:
    return np.array(step.round_s.bounds)
