"""What a cluster model says of one deployment: steps of given sizes, memory, and why.

Every rank's own counts are priced and replayed on a virtual clock, so this is the model in full,
where `plan.screen` has one rank stand for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertlane.balance.placement_file import Placements, placements_of
from expertlane.cost.breakdown import Breakdown, BreakdownTable, basis_shares, floor_s
from expertlane.cost.laws.execution import BOUNDS, Terms
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.pricing import Pricing, StageWork
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.kernel_sets import GPU_LIBRARIES
from expertlane.cost.step.operation import Floats
from expertlane.cost.step.program import ProgramBuilder, StepProgram
from expertlane.cost.step.totals import most_weight_bytes
from expertlane.cost.step_log import rank_events
from expertlane.cost.timeline import StepTimes, Timeline
from expertlane.plan.request import Setting
from expertlane.results.projection import Estimate, StepProjection
from expertlane.results.step_record import RankEvents
from expertlane.results.timeline import StepTimeline, timeline_of
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout, partition
from expertlane.spec.model import ModelConfig

_ROUNDS = 3  # of rotating micro-batches; the last one counts


@dataclass(frozen=True)
class StepSize:
    """A step of alike sequences, over the whole system.

    Attributes:
        num_seqs: sequences that take part.
        num_new, num_cached: new tokens of each, and positions cached before.
        fits: whether there is memory for it.
    """

    num_seqs: int
    num_new: int
    num_cached: int
    fits: bool = True


class Projector:
    """Projects steps of one deployment on one cluster.

    Args:
        placements: [num_hidden_layers]; the options' own if not given.
    """

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        options: Options,
        cluster: ModelledCluster,
        setting: Setting,
        placements: Placements | None = None,
    ) -> None:
        self._layout = layout
        self._options = options
        self._setting = setting
        self._device = cluster.profile.device
        self._terms = Terms.of(cluster.profile, setting.execution)
        self._pricing = Pricing(cluster.profile, setting.types)
        self._builder = ProgramBuilder(
            model,
            layout,
            placements_of(model, layout, options) if placements is None else placements,
            types=setting.types,
            payload=options.payload,
            ranks_per_node=cluster.profile.ranks_per_node,
            kernels=GPU_LIBRARIES,
        )

    def step(self, size: StepSize) -> StepProjection:
        """One step; of rotating micro-batches, a round."""
        programs, works = self._priced(size)
        seconds, breakdown = self._run(works)
        num_tokens = size.num_seqs * size.num_new
        by_basis, extrapolated = basis_shares(works)
        low, likely, high = (float(each) for each in seconds)
        return StepProjection(
            context=size.num_cached,
            num_tokens=num_tokens,
            step_s=Estimate(likely, low, high),
            tps=Estimate(num_tokens / likely, num_tokens / high, num_tokens / low),
            shares={str(cause): float(share) for cause, share in breakdown.shares.items()},
            floor_s=floor_s(programs, self._device, self._setting.types),
            flops_utilisation=float(breakdown.flops_utilisation),
            read_utilisation=float(breakdown.bytes_utilisation),
            basis_shares=by_basis,
            extrapolated_share=extrapolated,
            weight_bytes=most_weight_bytes(programs),
            fits=size.fits,
        )

    def timeline(self, size: StepSize) -> StepTimeline:
        """What every rank of a replica does when in such a step, or round."""
        _, works = self._priced(size)
        layout = self._layout
        timeline = Timeline(self._terms, layout.pp, layout.stage_size)
        events: list[tuple[int, int, RankEvents]] = []
        for times, place in self._rounds(works, timeline, may_skip=False)[-len(works) :]:
            events += [
                (pp_rank * layout.stage_size + of_stage, place, of_rank)
                for (pp_rank, of_stage), of_rank in rank_events(times).items()
                if len(of_rank.begin_s)
            ]
        num_tokens = size.num_seqs * size.num_new
        return timeline_of(events, num_tokens=num_tokens, num_seqs=size.num_seqs)

    def _priced(
        self, size: StepSize
    ) -> tuple[Sequence[StepProgram], Sequence[list[list[StageWork]]]]:
        groups = self._groups(size)
        alike: dict[str, tuple[StepProgram, list[list[StageWork]]]] = {}
        for group in groups:  # of equal sizes one stands for all
            if str(group) not in alike:
                program = self._program(group, size)
                alike[str(group)] = program, self._pricing.work(program)
        programs, works = zip(*(alike[str(group)] for group in groups), strict=True)
        return programs, works

    def _groups(self, size: StepSize) -> list[list[list[int]]]:
        """[steps in flight][micro-batches][dp]; sequences of the fullest replica."""
        layout, options = self._layout, self._options
        of_replica = len(partition(size.num_seqs, layout.replicas)[0])
        of_rank = [len(part) for part in partition(of_replica, layout.dp)]
        m = options.num_micro_batches
        cut = [[len(partition(num, m)[place]) for num in of_rank] for place in range(m)]
        if options.micro_batch_schedule == "rotating":
            return [[part] for part in cut if any(part)]
        return [[part for part in cut if any(part)]]

    def _program(self, micro_batches: list[list[int]], size: StepSize) -> StepProgram:
        form = self._options.dispatch
        assert form != "auto", "a projection names its form"
        cut = [(form, self._halves(num_seqs, size)) for num_seqs in micro_batches]
        return self._builder.build_sized(cut, self._setting.routing)

    def _halves(self, num_seqs: list[int], size: StepSize) -> list[PartSizes]:
        num_parts = 2 if self._options.overlap and max(num_seqs) > 1 else 1
        halves = [
            [len(partition(num, num_parts)[place]) for num in num_seqs]
            for place in range(num_parts)
        ]
        layout = self._layout
        return [
            PartSizes.even(layout.dp, layout.tp, half, size.num_new, size.num_cached)
            for half in halves
            if any(half)
        ]

    def _run(self, works: Sequence[list[list[StageWork]]]) -> tuple[Floats, Breakdown]:
        """[3]; seconds of a round in the steady state, and where they go."""
        timeline = Timeline(self._terms, self._layout.pp, self._layout.stage_size)
        table = BreakdownTable(self._device, self._setting.types.weights, self._pricing.dtype)
        ran = self._rounds(works, timeline)
        for times, _ in ran:
            table.add(times)
        before, after = (ran[place][0].end_s for place in (-1 - len(works), -1))
        return after - before, table.result()

    def _rounds(
        self, works: Sequence[list[list[StageWork]]], timeline: Timeline, *, may_skip: bool = True
    ) -> list[tuple[StepTimes, int]]:
        """Steps up to the steady state, each with its group; the last round is in it."""
        driver_s = self._terms.step_s(self._layout.replica_size)
        ends: Floats = np.zeros((len(works), len(BOUNDS)))  # of each group's last step
        ran = []
        for _ in range(_ROUNDS if len(works) > 1 else 2):
            for place, work in enumerate(works):
                times = timeline.run(work, ends[place] + driver_s, may_skip=may_skip)
                ends[place] = times.end_s
                ran.append((times, place))
        return ran
