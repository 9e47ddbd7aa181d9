"""Which deployment serves most tokens a second: all are screened, the best projected in full."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from expertlane.cost.step.operation import Floats
from expertlane.errors import UserError
from expertlane.memory import size_text
from expertlane.plan.candidates import Candidate, candidates_of, check_devices, valid_layouts
from expertlane.plan.finals import best_in_full
from expertlane.plan.option import Finalist, Option
from expertlane.plan.project import Projector, StepSize
from expertlane.plan.screen import Screen
from expertlane.plan.setting import Question
from expertlane.plan.structure import Screened
from expertlane.plan.throughput import LIKELY, Steps, one_pool
from expertlane.results.record import StepsRecord
from expertlane.results.timeline import StepTimeline
from expertlane.spec.names import Phase


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
        question: Question,
    ) -> None:
        check_devices(question.cluster)
        self._question = question

    @cached_property
    def candidates(self) -> list[Candidate]:
        """All that use every device."""
        per_node = self._question.cluster.profile.ranks_per_node
        return [
            candidate
            for layout in valid_layouts(self._question.model, self._question.cluster.num_devices)
            for candidate in candidates_of(
                layout, self._question.model, per_node, self._question.setting.payload
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
            model = self._question.model
            raise UserError(
                f"no layout of {self._question.cluster.num_devices} devices is valid for "
                f"{model.name}: it has {model.num_attention_heads} attention heads, "
                f"{model.num_kv_heads} of keys and values and {model.num_hidden_layers} layers, "
                "and tp must divide the heads"
            )
        screen = Screen(
            self._question.model,
            self._question.cluster,
            self._question.traffic,
            self._question.setting,
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
        finals = best_in_full(options, self._question.goals, self.finish, advance)
        if not finals.kept:
            nearest = min(finals.broke, key=lambda each: each.breach(self._question.goals))
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
        layout, num_all = screened.candidate.layout, self._question.traffic.num_sequences
        num_seqs = np.minimum(screened.num_seqs * (layout.replicas * layout.dp), num_all)
        steps = Steps(
            layout,
            num_seqs,
            screened.decode.seconds,
            screened.prefill.seconds[:, 0],
            screened.prompts,
            num_all,
        )
        served = one_pool(steps, self._question.traffic)
        return Option(screened, steps, served, served.best(self._question.goals))

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
        return Finalist(option, decode, prefill, steps, one_pool(steps, self._question.traffic))

    def finish_within(self, option: Option) -> Finalist | None:
        """An option in full, at the best number of sequences that keeps the limits then too."""
        while option.place is not None:
            finalist = self.finish(option)
            if finalist.keeps(self._question.goals):
                return finalist
            option = option.next_best(self._question.goals)
        return None

    def timelines(self, finalist: Finalist) -> dict[Phase, StepTimeline]:
        """What every rank does when, in the steps that it was projected by."""
        projector = self._projector(finalist.option)
        sizes = self._sizes(finalist.option, finalist.num_seqs)
        return {phase: projector.timeline(size) for phase, size in sizes.items()}

    def _projector(self, option: Option) -> Projector:
        layout, options = option.candidate
        return Projector(
            self._question.model, layout, options, self._question.cluster, self._question.setting
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
            Phase.DECODE: StepSize(num_seqs, 1, self._question.traffic.mean_context),
        }

    def _too_large(self, screened: Iterable[Screened]) -> str:
        nearest = min(screened, key=lambda each: each.capacity.memory.total_bytes)
        need = nearest.capacity.memory
        question = self._question
        return (
            f"{question.model.name} in {question.setting.types} fits no deployment on "
            f"{question.cluster}: "
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
            ("TPOT", self._question.goals.max_tpot_s, nearest.served.tpot_s[LIKELY, 0]),
            ("TTFT", self._question.goals.max_ttft_s, nearest.served.ttft_s[LIKELY, 0]),
        ):
            if limit is not None:
                says = misses if value > limit else keeps
                says.append(f"the {name} limit of {1e3 * limit:g} ms with {1e3 * value:.4g}")
        said = [f"misses {' and '.join(misses)}", *(f"keeps {each}" for each in keeps)]
        num = nearest.num_seqs
        return (
            f"no deployment on {self._question.cluster} keeps the limits; the nearest, "
            f"{nearest.option.candidate}, with {num} sequence{'' if num == 1 else 's'} at once, "
            f"{' and '.join(said)}"
        )


def _bounds(step: StepsRecord) -> Floats:
    return np.array(step.round_s.bounds)
