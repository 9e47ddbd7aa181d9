"""Search for the deployment with most tokens/s: all are screened, the best projected in full."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

import numpy as np

from expertlane.cost.laws.profile import LIKELY
from expertlane.cost.memory import size_text
from expertlane.cost.projector import ErrorSeconds, Projector, Setting, StepSize
from expertlane.cost.routing import PowerLawRouting, Traffic, extremes_of
from expertlane.cost.step.operation import WEIGHT_BYTES, NumberTypes
from expertlane.cost.throughput import ThroughputCurve, one_pool
from expertlane.errors import CapacityError, UserError
from expertlane.planner.candidates import (
    Candidate,
    PlanRequest,
    candidates_of,
    check_plan_size,
    valid_layouts,
)
from expertlane.planner.engines import Pool, engines_on
from expertlane.planner.screen import (
    Known,
    Screen,
    Screened,
    ScreenedCandidate,
    fitting,
    with_fastest_prefill,
)
from expertlane.results.estimate import Estimate
from expertlane.results.record import StepsRecord
from expertlane.results.timeline import StepTimeline
from expertlane.spec.names import NumberType, Phase


@dataclass(frozen=True, eq=False)
class Finalist(ScreenedCandidate):
    """A candidate projected in full, at one number of sequences; `place` is 0.

    Attributes:
        served: throughput by the formula over steps in full; or as simulated.
        formula: throughput by that formula.
        option: the screened candidate, at its best number of sequences.
        in_full: steps in full of the phases that it computes.
        by_error: seconds of those steps at the low and high of each law's error, with other experts
            drawn, and with the most even and the most skewed popularity.
    """

    formula: ThroughputCurve
    option: ScreenedCandidate
    in_full: Mapping[Phase, StepsRecord]
    by_error: Mapping[Phase, ErrorSeconds]

    @property
    def prefill(self) -> StepsRecord:
        """The prefill step in full."""
        return self.in_full[Phase.PREFILL]

    @property
    def decode(self) -> StepsRecord:
        """The decode step in full."""
        return self.in_full[Phase.DECODE]

    def simulated(self, served: ThroughputCurve) -> "Finalist":
        """The finalist with simulated throughput, and bounds that include skew in its decode step.

        Args:
            served: throughput simulated with the likely routing.
        """
        return replace(self, served=self.with_skew(served))

    def with_skew(self, served: ThroughputCurve) -> ThroughputCurve:
        """Simulated throughput of it as the decode pool, with bounds that include skew."""
        even_s, uneven_s = self.by_error[Phase.DECODE].get((_SKEW, ()), (None, None))
        if even_s is None or uneven_s is None:
            return served
        likely_s = self.decode.round_s.value
        factors = np.array([min(even_s / likely_s, 1.0), 1.0, max(uneven_s / likely_s, 1.0)])
        return replace(
            served,
            tps=served.tps / factors[::-1, None],
            tpot_s=served.tpot_s * factors[:, None],
        )


_DRAW, _SKEW = "drawn experts", "skew of experts"  # errors beside those of laws
# Two differences between draws, added as squares, are about twice a draw's standard deviation.
_NUM_REDRAWN = 2


@dataclass(frozen=True, eq=False)
class OnePool:
    """Search results for one pool of all devices.

    Attributes:
        options: all candidates that fit, in order; then those with a prefill form of their own.
        finalists: by tokens a second, the best first; all keep the limits.
        num_candidates, num_too_large: number of candidates, and of those that do not fit.
        num_simulated: options simulated request by request.
        num_open: options not simulated that may have more tokens/s than the best.
    """

    options: Sequence[ScreenedCandidate]
    finalists: Sequence[Finalist]
    num_candidates: int
    num_too_large: int
    num_simulated: int = 0
    num_open: int = 0


def _with_skews(step: StepsRecord, likely_s: Sequence[float]) -> StepsRecord:
    """The step with bounds that include the times at the least and at the most skew."""
    value, (low, wall_s, high) = step.round_s.value, step.wall_s.bounds
    factors = [1.0, *(each / value for each in likely_s)]
    wider = Estimate(wall_s, low * min(factors), high * max(factors))
    return replace(step, wall_s=wider, tps=step.num_tokens / wider)


def unseen(num: int) -> None:
    """Progress callback that does nothing."""


class Search:
    """Plans deployments of a model on a cluster.

    Args:
        known: results of other searches on parts of the cluster.
        are_pools: candidates are pools, for prefill or for decode.

    Raises:
        UserError: the cluster is larger than a plan can be made for.
    """

    def __init__(
        self, request: PlanRequest, known: Known | None = None, *, are_pools: bool = False
    ) -> None:
        check_plan_size(request.cluster)
        self._are_pools = are_pools
        self.known = known or Known()
        self.request = request

    @cached_property
    def candidates(self) -> list[Candidate]:
        """All candidates that use every device; of an engine, those that it runs in any role.

        A form that it does not decode with may be the one of its prompts.
        """
        profile, engine = self.request.cluster.profile, None
        if self.request.engine is not None:
            engine = engines_on(profile)[self.request.engine]
        return [
            candidate
            for layout in valid_layouts(self.request.model, self.request.cluster.num_devices)
            for candidate in candidates_of(
                layout,
                self.request.model,
                profile.ranks_per_node,
                self.request.setting.payload,
                self.request.setting.multi_token.num_drafts,
                self.request.setting.copies,
            )
            if engine is None or engine.runs_in_any_role(candidate, self.request.model)
        ]

    def screen(
        self,
        advance: Callable[[int], None] = unseen,
        candidates: Sequence[Candidate] | None = None,
    ) -> list[Screened]:
        """Screen candidates by the formula.

        Args:
            advance: called with a number of candidates that are done.
            candidates: the ones to screen; None for all.

        Raises:
            UserError: no layout of so many devices is valid for the model.
        """
        candidates = self.candidates if candidates is None else candidates
        if not candidates:
            model = self.request.model
            raise UserError(
                f"no layout of {self.request.cluster.num_devices} devices is valid for "
                f"{model.name}: it has {model.num_attention_heads} attention heads, "
                f"{model.num_kv_heads} of keys and values and {model.num_hidden_layers} layers, "
                "and tp must divide the heads"
            )
        screen = Screen(self.request, self.known, are_pools=self._are_pools)
        return screen.run(candidates, advance)

    def options(self, screened: Sequence[Screened]) -> list[ScreenedCandidate]:
        """Options that fit and that the engine runs, also with a prefill form of their own.

        Raises:
            UserError: nothing fits, or nothing that the engine runs.
        """
        options = fitting(screened)
        if not options:
            raise CapacityError(self._too_large(screened))
        # Prompts of an engine may be dispatched as fast only by the library of its decodes.
        by_deepep: dict[bool, list[ScreenedCandidate]] = {True: [], False: []}
        for each in options:
            by_deepep[Pool(each.candidate, self.request.model).uses_deepep].append(each)
        further: dict[Candidate, ScreenedCandidate] = {}
        for some in (options, *by_deepep.values()):
            further |= {each.candidate: each for each in with_fastest_prefill(some, self.request)}
        options += further.values()
        if self.request.engine is None:
            return options
        engine = engines_on(self.request.cluster.profile)[self.request.engine]
        found = [each for each in options if engine.runs(each.candidate, self.request.model)]
        if not found:
            raise UserError(
                f"{engine.title} runs no deployment of {self.request.model.name} that fits "
                f"{self.request.cluster}; without --engine there are {len(options):,}"
            )
        return found

    def finish(self, option: ScreenedCandidate, phases: Sequence[Phase] = tuple(Phase)) -> Finalist:
        """An option projected in full, at its best number of sequences; it may then miss a limit.

        Args:
            phases: phases that it computes; other steps stay as screened.
        """
        assert option.place is not None, "it meets the limits as screened"
        setting = self.request.setting
        projector, sizes = self._projected(option, setting)
        in_full, by_error = {}, {}
        for phase in phases:
            in_full[phase], of_laws = projector.step_by_error(sizes[phase])
            by_error[phase] = dict(of_laws)
        if option.candidate.layout.ep > 1:
            extremes = extremes_of(setting.routing) or ()
            own_s = {phase: step.round_s.value for phase, step in in_full.items()}
            if option.candidate.options.micro_batch_schedule == "rotating":
                own_s = self._likely_s(option, setting.routing, phases)
            of_draws = [self._likely_s(option, each, phases) for each in self._redrawn]
            of_skews = [self._likely_s(option, each, phases) for each in extremes]
            for phase, step in in_full.items():
                likely_s = step.round_s.value
                for number, each in enumerate(of_draws):
                    ratio = each[phase] / own_s[phase]
                    by_error[phase][_DRAW, (number,)] = likely_s * ratio, likely_s / ratio
                skewed_s = [likely_s * each[phase] / own_s[phase] for each in of_skews]
                if skewed_s:
                    by_error[phase][_SKEW, ()] = skewed_s[0], skewed_s[-1]
                in_full[phase] = _with_skews(step, skewed_s)
        steps = option.steps
        if (prefill := in_full.get(Phase.PREFILL)) is not None:
            bounds = np.array(prefill.round_s.bounds)
            alone_s = steps.alone_s * (bounds / steps.prefill_s)
            steps = replace(steps, prefill_s=bounds, alone_s=alone_s)
        decode_s = steps.decode_s[:, option.place, None]
        if (decode := in_full.get(Phase.DECODE)) is not None:
            decode_s = np.array(decode.round_s.bounds)[:, None]
        steps = replace(steps, num_seqs=np.array([option.num_seqs]), decode_s=decode_s)
        served = one_pool(steps, self.request.workload)
        known = vars(option) | {"steps": steps, "served": served, "place": 0}
        return Finalist(**known, formula=served, option=option, in_full=in_full, by_error=by_error)

    def timelines(self, finalist: Finalist) -> dict[Phase, StepTimeline]:
        """Timelines of all ranks in the steps that it was projected by."""
        projector, sizes = self._projected(finalist.option, self.request.setting)
        return {phase: projector.timeline(size) for phase, size in sizes.items()}

    @cached_property
    def _redrawn(self) -> Sequence[PowerLawRouting]:
        """Other draws of the power-law routing; none of a trace."""
        routing = self.request.setting.routing
        return routing.redrawn(_NUM_REDRAWN) if isinstance(routing, PowerLawRouting) else []

    def _likely_s(
        self, option: ScreenedCandidate, routing: Traffic, phases: Sequence[Phase]
    ) -> dict[Phase, float]:
        """Seconds of a step of each phase under another routing."""
        projector, sizes = self._projected(option, replace(self.request.setting, routing=routing))
        return {phase: projector.likely_s(sizes[phase]) for phase in phases}

    def _projected(
        self, option: ScreenedCandidate, setting: Setting
    ) -> tuple[Projector, dict[Phase, StepSize]]:
        """A projector for the option, and its steps at its best number of sequences."""
        request, prompts = self.request, option.steps.prompts
        num, new, cached = option.steps.num_prompts, prompts.num_new, prompts.num_cached
        layout, options, num_drafts = option.candidate
        projector = Projector(request.model, layout, options, request.cluster, setting, num_drafts)
        return projector, {
            Phase.PREFILL: StepSize(num, new, cached, phase=Phase.PREFILL),
            Phase.DECODE: StepSize(option.num_seqs, 1, request.workload.mean_context),
        }

    def _too_large(self, screened: Iterable[Screened]) -> str:
        nearest = min(screened, key=lambda each: each.capacity.memory.total_bytes)
        need = nearest.capacity.memory
        request = self.request
        narrower = next(filter(self._fits_in, self._narrower_types()), "")
        return (
            f"{request.model.name} in {request.setting.types} fits no deployment on "
            f"{request.cluster}: "
            f"the smallest, {nearest.candidate.layout}, needs {size_text(need.total_bytes)} per "
            f"rank (weights {size_text(need.weight_bytes)}, KV cache of one sequence "
            f"{size_text(need.kv_bytes)}, activations {size_text(need.activation_bytes)}) of "
            f"{size_text(nearest.capacity.free_bytes)}; take more devices, devices with more "
            "memory or shorter sequences"
            + (f", or --dtype {narrower}, which fits" if narrower else "")
        )

    def _narrower_types(self) -> list[str]:
        """Narrower types of weights that the devices compute in, the widest first."""
        known, own = self.request.cluster.profile.device.flops_per_s, self.request.setting.types
        widths = {each: WEIGHT_BYTES[each] for each in get_args(NumberType) if each in known}
        narrower = [each for each in widths if widths[each] < WEIGHT_BYTES[own.weights]]
        return sorted(narrower, key=lambda each: -widths[each])

    def _fits_in(self, weights: str) -> bool:
        """True if any candidate fits with weights in another type."""
        setting = self.request.setting
        types = replace(NumberTypes.asked(weights), kv=setting.types.kv)
        request = replace(self.request, setting=replace(setting, types=types))
        other = Search(request, Known(), are_pools=self._are_pools)
        return bool(fitting(other.screen(candidates=self.candidates)))

    def missed(self, nearest: ScreenedCandidate, served: ThroughputCurve) -> str:
        """The error text where nothing keeps the limits: which ones, and the nearest deployment.

        Args:
            served: throughput of the nearest; place 0.
        """
        misses: list[str] = []
        keeps: list[str] = []
        goals = self.request.goals
        for name, limit, value in (
            ("TPOT", goals.max_tpot_s, served.tpot_s[LIKELY, 0]),
            ("TTFT", goals.max_ttft_s, served.ttft_s[LIKELY, 0]),
        ):
            if limit is not None:
                says = misses if value > limit else keeps
                says.append(f"the {name} limit of {1e3 * limit:g} ms with {1e3 * value:.4g} ms")
        if not misses:
            misses.append(
                f"one of {', '.join(map(str, goals.slos))} {served.breach(goals)[0]:.3g} ×"
            )
        said = [f"misses {' and '.join(misses)}", *(f"meets {each}" for each in keeps)]
        num = nearest.num_seqs
        return (
            f"no deployment on {self.request.cluster} meets the limits; the nearest, "
            f"{nearest.candidate}, with {num} sequence{'' if num == 1 else 's'} at once, "
            f"{' and '.join(said)}"
        )
