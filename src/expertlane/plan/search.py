"""Which deployment serves most tokens a second: all are screened, the best projected in full."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from expertlane.cost.cluster import ModelledCluster
from expertlane.cost.operation import Floats
from expertlane.errors import UserError
from expertlane.plan.candidates import Candidate, candidates_of, valid_layouts
from expertlane.plan.memory import size_text
from expertlane.plan.project import Projector, StepSize
from expertlane.plan.screen import Screen
from expertlane.plan.setting import Goals, Setting, Traffic
from expertlane.plan.structure import Screened
from expertlane.plan.throughput import LIKELY, Served, Steps, one_pool
from expertlane.results.projection import StepProjection
from expertlane.results.timeline import StepTimeline
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase

_NUM_FINALISTS = 12
_MOST_OF_LAYOUT = 2  # finalists


@dataclass(frozen=True, eq=False)
class Option:
    """A candidate that fits, as screened; `place` is its best number of sequences.

    Attributes:
        place: None where it breaks a limit with every number of sequences.
    """

    screened: Screened
    steps: Steps
    served: Served
    place: int | None

    @property
    def candidate(self) -> Candidate:
        """The deployment."""
        return self.screened.candidate

    @property
    def tps(self) -> float:
        """Output tokens a second at its best, 0 where it breaks a limit."""
        return 0.0 if self.place is None else float(self.served.tps[LIKELY, self.place])


@dataclass(frozen=True, eq=False)
class Finalist:
    """An option projected in full.

    Attributes:
        steps, served: at its one best number of sequences.
    """

    option: Option
    decode: StepProjection
    prefill: StepProjection
    steps: Steps
    served: Served

    @property
    def tps(self) -> float:
        """Output tokens a second."""
        return float(self.served.tps[LIKELY, 0])

    @property
    def num_seqs(self) -> int:
        """Running at once, over the whole system."""
        return int(self.served.num_seqs[0])


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


class Search:
    """Plans deployments of a model on a cluster."""

    def __init__(
        self,
        model: ModelConfig,
        cluster: ModelledCluster,
        traffic: Traffic,
        goals: Goals,
        setting: Setting,
    ) -> None:
        self._model = model
        self._cluster = cluster
        self._traffic = traffic
        self._goals = goals
        self._setting = setting

    def candidates(self, cluster: ModelledCluster) -> list[Candidate]:
        """All that use every device."""
        per_node = cluster.profile.ranks_per_node
        return [
            candidate
            for layout in valid_layouts(self._model, cluster.num_devices)
            for candidate in candidates_of(layout, self._model, per_node, self._setting.payload)
        ]

    def one_pool(self) -> OnePool:
        """Every deployment of one pool, and the best in full.

        Raises:
            UserError: no layout is valid, nothing fits, or nothing keeps the limits; with the
                nearest deployment.
        """
        screened = self.screen(self._cluster)
        options = self.options(screened)
        if not options:
            raise UserError(self._too_large(screened))
        kept = [option for option in options if option.place is not None]
        if not kept:
            raise UserError(self._nearest(options))
        finalists = [self.finish(option) for option in _finalists(kept)]
        return OnePool(
            options,
            sorted(finalists, key=lambda each: -each.tps),
            len(screened),
            len(screened) - len(options),
        )

    def screen(self, cluster: ModelledCluster) -> list[Screened]:
        """Candidates of some devices.

        Raises:
            UserError: no layout of so many devices is valid for the model.
        """
        candidates = self.candidates(cluster)
        if not candidates:
            raise UserError(
                f"no layout of {cluster.num_devices} devices is valid for {self._model.name}: it "
                f"has {self._model.num_attention_heads} attention heads, "
                f"{self._model.num_kv_heads} of keys and values and "
                f"{self._model.num_hidden_layers} layers, and tp must divide the heads"
            )
        return Screen(self._model, cluster, self._traffic, self._setting).run(candidates)

    def options(self, screened: Iterable[Screened]) -> list[Option]:
        """Those that fit."""
        return [self._option(each) for each in screened if each.decode is not None]

    def _option(self, screened: Screened) -> Option:
        assert screened.decode is not None, "it fits"
        assert screened.prefill is not None, "it fits"
        assert screened.prompts is not None, "it fits"
        layout, num_all = screened.candidate.layout, self._traffic.num_sequences
        num_seqs = np.minimum(screened.num_seqs * (layout.replicas * layout.dp), num_all)
        steps = Steps(
            layout,
            num_seqs,
            screened.decode.seconds,
            screened.prefill.seconds[:, 0],
            screened.prompts,
            num_all,
        )
        served = one_pool(steps, self._traffic)
        return Option(screened, steps, served, served.best(self._goals))

    def finish(self, option: Option) -> Finalist:
        """An option in full, at its best number of sequences."""
        assert option.place is not None, "it keeps the limits"
        projector = self._projector(option)
        num_seqs = option.steps.num_seqs[option.place]
        sizes = self._sizes(option, int(num_seqs))
        decode, prefill = projector.step(sizes[Phase.DECODE]), projector.step(sizes[Phase.PREFILL])
        steps = replace(
            option.steps,
            num_seqs=np.array([num_seqs]),
            decode_s=_bounds(decode)[:, None],
            prefill_s=_bounds(prefill),
        )
        return Finalist(option, decode, prefill, steps, one_pool(steps, self._traffic))

    def timelines(self, finalist: Finalist) -> dict[Phase, StepTimeline]:
        """What every rank does when, in the steps that it was projected by."""
        projector = self._projector(finalist.option)
        sizes = self._sizes(finalist.option, finalist.num_seqs)
        return {phase: projector.timeline(size) for phase, size in sizes.items()}

    def _projector(self, option: Option) -> Projector:
        layout, options = option.candidate
        return Projector(self._model, layout, options, self._cluster, self._setting)

    def _sizes(self, option: Option, num_seqs: int) -> dict[Phase, StepSize]:
        prompts = option.steps.prompts
        return {
            Phase.PREFILL: StepSize(option.steps.num_prompts, prompts.num_new, prompts.num_cached),
            Phase.DECODE: StepSize(num_seqs, 1, self._traffic.mean_context),
        }

    def _too_large(self, screened: Iterable[Screened]) -> str:
        nearest = min(screened, key=lambda each: each.capacity.memory.total_bytes)
        need = nearest.capacity.memory
        return (
            f"{self._model.name} in {self._setting.types} fits no deployment on {self._cluster}: "
            f"the smallest, {nearest.candidate.layout}, needs {size_text(need.total_bytes)} on a "
            f"rank (weights {size_text(need.weight_bytes)}, keys and values of one sequence "
            f"{size_text(need.kv_bytes)}, activations {size_text(need.activation_bytes)}) of "
            f"{size_text(nearest.capacity.free_bytes)}; take more devices, float8 or shorter "
            "sequences"
        )

    def _nearest(self, options: Sequence[Option]) -> str:
        """What to say where no option keeps the limits: which limit, and who comes nearest."""
        breaches = [option.served.breach(self._goals) for option in options]
        nearest = int(np.argmin([breach.min() for breach in breaches]))
        option, place = options[nearest], int(breaches[nearest].argmin())
        served = option.served
        says = []
        for name, limit, value in (
            ("TPOT", self._goals.max_tpot_s, served.tpot_s[LIKELY, place]),
            ("TTFT", self._goals.max_ttft_s, served.ttft_s[LIKELY, place]),
        ):
            if limit is not None:
                verb = "misses" if value > limit else "keeps"
                says.append(f"{verb} the {name} limit of {1e3 * limit:g} ms with {1e3 * value:.4g}")
        return (
            f"no deployment on {self._cluster} keeps the limits; the nearest, {option.candidate}, "
            f"{served.num_seqs[place]} sequences at once, {' and '.join(says)}"
        )


def _bounds(step: StepProjection) -> Floats:
    return np.array([step.step_s.low, step.step_s.value, step.step_s.high])


def _finalists(options: Sequence[Option]) -> list[Option]:
    """The best, not too many of one layout."""
    chosen: list[Option] = []
    for option in sorted(options, key=lambda each: -each.tps):
        layout = option.candidate.layout
        if sum(each.candidate.layout == layout for each in chosen) < _MOST_OF_LAYOUT:
            chosen.append(option)
        if len(chosen) == _NUM_FINALISTS:
            break
    return chosen
