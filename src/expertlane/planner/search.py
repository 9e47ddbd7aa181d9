"""Search for the deployment with most tokens/s: all are screened, the best projected in full.

Between these, trials: an option is simulated at several numbers of sequences, up to the most within
limits. The formula proposes a number; what a simulation has beyond the formula corrects it; between
one that keeps the limits and one that does not lies the next.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, log, sqrt

import numpy as np

from expertlane.cost.laws.profile import LIKELY
from expertlane.cost.memory import size_text
from expertlane.cost.projector import ErrorSeconds, Projector, Setting, StepSize
from expertlane.cost.routing import LoadedRouting, PowerLawRouting, extremes_of
from expertlane.cost.step.operation import NumberTypes
from expertlane.cost.throughput import Goals, ThroughputCurve, one_pool
from expertlane.errors import CapacityError, UserError
from expertlane.planner.candidates import (
    Candidate,
    PlanRequest,
    candidates_of,
    check_plan_size,
    valid_layouts,
)
from expertlane.planner.engines import RolePool, engines_on
from expertlane.planner.screen import (
    Screen,
    ScreenCache,
    Screened,
    ScreenedCandidate,
    fitting,
    with_fastest_prefill,
)
from expertlane.results.estimate import Estimate
from expertlane.results.record import StepsRecord
from expertlane.results.serving_record import KEPT
from expertlane.results.timeline import StepTimeline
from expertlane.simulator.watch import Precision
from expertlane.spec.names import Phase

_MOST_TRIALS = 8  # numbers of sequences to simulate of an option
_CLOSE = 0.96  # of a number that misses the limits: the most to try next while none meets them
_AIM = 0.99  # share of a limit to aim at
_FLATTEST, _STEEP = 0.02, 3.0  # slopes of TPOT over sequences, in logarithms; one over a slope
_APART = 1.05  # least ratio of two numbers of sequences that a slope is taken from
_NEAR, _STEP = 0.97, 1.1  # of a limit; times as many sequences to try where that is further
_FURTHEST = 3.0  # largest step, times as many, while no trial has missed a limit


@dataclass(frozen=True, eq=False)
class SimulatedCandidate(ScreenedCandidate):
    """A candidate that was simulated, at one number of sequences; `place` is 0.

    Attributes:
        served: throughput as simulated.
        option: the candidate as screened.
    """

    option: ScreenedCandidate

    @property
    def num_seqs(self) -> int:
        """Sequences that run at once, over the whole system."""
        return self.option.num_seqs

    def breach(self, goals: Goals) -> float:
        """The factor by which it misses the worst limit; 1 or less where it keeps all."""
        return float(self.served.breach(goals)[0])

    def keeps(self, goals: Goals) -> bool:
        """True if all limits are met, within the accuracy of a steady state."""
        return self.breach(goals) <= KEPT

    @classmethod
    def of(cls, option: ScreenedCandidate, served: ThroughputCurve) -> "SimulatedCandidate":
        """A screened option with its simulated throughput."""
        return cls(**vars(option) | {"served": served, "place": 0, "option": option})


Run = Callable[[ScreenedCandidate, Precision], ThroughputCurve | None]


class Ratios:
    """The largest ratio of simulated to screened tokens/s of each kind of deployment."""

    def __init__(self) -> None:
        self._of_kind: dict[object, float] = {}

    def add(self, kinds: Iterable[object], ratio: float) -> None:
        """Add a deployment that was simulated, with all of its kinds."""
        for kind in kinds:
            self._of_kind[kind] = max(ratio, self._of_kind.get(kind, 0.0))

    def expected(self, kinds: Iterable[object]) -> float:
        """The ratio of the first kind that has one; 1 without any."""
        return next((self._of_kind[kind] for kind in kinds if kind in self._of_kind), 1.0)

    @property
    def largest(self) -> float:
        """The largest of all; 1 without any."""
        return max(self._of_kind.values(), default=1.0)


class Trials:
    """Simulations of an option at successive numbers of sequences.

    The formula proposes the first number; each simulation corrects the formula, and once one number
    meets the limits and one misses them, the next is interpolated.

    Args:
        num_seqs: the first number; None for the formula's.
        kept: a number that met the limits in a rougher simulation.

    Attributes:
        found: simulated candidates in the order of their trials.
    """

    def __init__(
        self,
        option: ScreenedCandidate,
        request: PlanRequest,
        run: Run,
        precision: Precision,
        num_seqs: int | None = None,
        kept: SimulatedCandidate | None = None,
    ) -> None:
        self.option = option
        self.found: list[SimulatedCandidate] = []
        self._request, self._goals = request, request.goals
        self._run, self._precision = run, precision
        self._is_over = False
        self._kept = kept
        first, tps = option.within(request.goals)
        self._first = num_seqs or max(first, 1), tps

    def again(self, precision: Precision) -> "Trials":
        """New trials of this option with another precision, from the best number of sequences."""
        num, _ = self.ahead(0.0)
        kept = self.best if self.tps else None
        if num is None and self.best is not None:
            num = self.best.num_seqs
        return Trials(self.option, self._request, self._run, precision, num, kept)

    @property
    def best(self) -> SimulatedCandidate | None:
        """The trial with most tokens/s that meets the limits, else the nearest to them."""
        kept = [each for each in self.found if each.keeps(self._goals)]
        if kept:
            return max(kept, key=lambda each: each.tps)
        return min(self.found, key=lambda each: each.breach(self._goals), default=None)

    @property
    def tps(self) -> float:
        """The most tokens/s within the limits so far."""
        return max((each.tps for each in self.found if each.keeps(self._goals)), default=0.0)

    def ahead(self, least_gain: float, *, boldly: bool = False) -> tuple[int | None, float]:
        """The number of sequences to try next, and its expected tokens/s.

        Args:
            least_gain: gain in tokens/s, a share, that is worth a trial.
            boldly: try more sequences also near a limit.

        Returns:
            None and the best tokens/s so far, where no trial is worth it.
        """
        if not self.found and not self._is_over:
            return self._first
        num, tps = self._next(boldly=boldly)
        known, at = self.tps, {each.num_seqs for each in self.found}
        is_worth = tps > (1 + least_gain) * known and num > 0 and num not in at
        if self._is_over or len(self.found) == _MOST_TRIALS or not is_worth:
            return None, known
        return num, tps

    def advance(self, least_gain: float, *, boldly: bool = False) -> None:
        """Simulate the next number of sequences."""
        num, _ = self.ahead(least_gain, boldly=boldly)
        assert num is not None, "a trial is left"
        option = self.option.at(num, self._request.workload)
        if (served := self._run(option, self._precision)) is None:
            self._is_over = True
        else:
            self.found.append(SimulatedCandidate.of(option, served))

    def settle(self, least_gain: float, *, boldly: bool = False) -> SimulatedCandidate | None:
        """The best once no further trial is worth it; None where none can be simulated."""
        while self.ahead(least_gain, boldly=boldly)[0] is not None:
            self.advance(least_gain, boldly=boldly)
        return self.best

    def _next(self, *, boldly: bool) -> tuple[int, float]:
        """A number of sequences, 0 for none, and its expected tokens/s."""
        goals = self._goals
        kept = [each for each in self.found if each.keeps(goals)]
        most = max(kept, key=_num_of, default=None)
        above = 0 if most is None else most.num_seqs
        broken = [each for each in self.found if not each.keeps(goals) and each.num_seqs > above]
        few = min(broken, key=_num_of, default=None)
        if few is None:
            return (0, 0.0) if most is None else self._further(most, kept, boldly=boldly)
        if most is None:
            num, tps = self._corrected(few)
            if (known := self._kept) is not None and num < known.num_seqs < few.num_seqs:
                return known.num_seqs, known.tps
            return min(num, int(_CLOSE * few.num_seqs)), tps
        return self._between(most, few)

    def _corrected(self, found: SimulatedCandidate) -> tuple[int, float]:
        """The next number by the formula, corrected by its error at a simulated one.

        The error may be a constant factor, or grow with sequences: takes a number between both.
        """
        served, place = found.option.served, found.option.place or 0
        formula = float(served.breach(self._goals)[place])
        if formula <= 0:  # a limit that the formula does not model
            missed = found.breach(self._goals)
            return int(found.num_seqs / missed) if missed > 0 else 0, found.tps
        ratio = found.breach(self._goals) / formula
        times, one_tps = self.option.within(self._goals, ratio / _AIM)
        of_sequence = (found.breach(self._goals) - formula) / found.num_seqs
        plus, other_tps = self.option.within(self._goals, 1 / _AIM, of_sequence / _AIM)
        factor = found.tps / float(served.tps[LIKELY, place])
        return int(sqrt(times * plus)), sqrt(one_tps * other_tps) * factor

    def _further(
        self, most: SimulatedCandidate, kept: Sequence[SimulatedCandidate], *, boldly: bool
    ) -> tuple[int, float]:
        """More sequences while no trial has missed a limit, extrapolated along TPOT."""
        missed, limit = most.breach(self._goals), self.option.most_seqs
        if most.num_seqs >= limit or missed <= 0:
            return 0, 0.0
        num, tps = self._corrected(most)
        before = [each for each in kept if each.num_seqs * _APART <= most.num_seqs]
        if before:
            fewer = max(before, key=_num_of)
            of_num = log(most.num_seqs / fewer.num_seqs)
            slope = max(log(missed / fewer.breach(self._goals)) / of_num, _FLATTEST)
            factor = min((_aim(slope) / missed) ** (1 / slope), _FURTHEST)
            if int(most.num_seqs * factor) > num:
                num, growth = int(most.num_seqs * factor), log(most.tps / fewer.tps) / of_num
                tps = most.tps * factor ** max(growth, 0.0)
        elif missed < (_AIM if boldly else _NEAR):  # TPOT may grow less than the formula says
            num = max(num, ceil(most.num_seqs * _STEP))
            tps = max(tps, most.tps * min(num / most.num_seqs, limit / most.num_seqs) * missed)
        return min(num, limit), tps

    def _between(self, most: SimulatedCandidate, few: SimulatedCandidate) -> tuple[int, float]:
        """The next number between one that meets the limits and one that misses; log-linear."""
        low, high = most.breach(self._goals), few.breach(self._goals)
        if few.num_seqs - most.num_seqs <= 1:
            return 0, 0.0
        grows = log(high / low) if low > 0 else 1.0
        aim = _aim(grows / log(few.num_seqs / most.num_seqs))
        tps = most.tps * (few.tps / most.tps) ** (-log(max(low, 1e-9)) / grows if low > 0 else 0.5)
        share = log(aim / low) / grows if 0 < low < aim else 0.5
        if len({each.keeps(self._goals) for each in self.found[-2:]}) == 1:
            share = 0.5  # the last two were on the same side: bisect
        num = int(most.num_seqs * (few.num_seqs / most.num_seqs) ** share)
        return max(num, most.num_seqs + 1), tps


def _aim(slope: float) -> float:
    """Share of a limit to aim at: closer to it where TPOT hardly grows with sequences.

    Args:
        slope: slope of that share over sequences, in logarithms.
    """
    return 1 - (1 - _AIM) * min(1.0, _STEEP * slope)


def _num_of(found: SimulatedCandidate) -> int:
    return found.num_seqs


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
        """The finalist with simulated throughput; bounds of decodes include skew, TTFT's do not.

        Args:
            served: throughput simulated with the likely routing.
        """
        return replace(self, served=self.with_skew(served))

    def with_skew(self, served: ThroughputCurve) -> ThroughputCurve:
        """Simulated throughput of it as the decode pool; bounds but TTFT's include skew."""
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
        self, request: PlanRequest, known: ScreenCache | None = None, *, are_pools: bool = False
    ) -> None:
        check_plan_size(request.cluster)
        self._are_pools = are_pools
        self.known = known or ScreenCache()
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
            by_deepep[RolePool(each.candidate, self.request.model).uses_deepep].append(each)
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
        self, option: ScreenedCandidate, routing: LoadedRouting, phases: Sequence[Phase]
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
        types = request.setting.types.narrower(request.cluster.profile.device.flops_per_s)
        narrower = next((each.weights for each in types if self._fits_in(each)), "")
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

    def _fits_in(self, types: NumberTypes) -> bool:
        """True if any candidate fits with other types."""
        request = replace(self.request, setting=replace(self.request.setting, types=types))
        other = Search(request, ScreenCache(), are_pools=self._are_pools)
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
