"""What a cluster model says of one deployment: steps of given sizes, memory, and why.

Every rank's own counts are priced and replayed on a virtual clock, so this is the model in full,
where `plan.screen` has one rank stand for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from expertlane.balance.deployed import Placements, placements_of
from expertlane.cost.batch_sizes import PartSizes
from expertlane.cost.cluster import ModelledCluster
from expertlane.cost.execution import BOUNDS, Terms
from expertlane.cost.launches import FUSED
from expertlane.cost.operation import Floats
from expertlane.cost.pricing import Pricing
from expertlane.cost.program import ProgramBuilder, StepProgram
from expertlane.cost.timeline import Timeline
from expertlane.cost.why import Why, WhyTable
from expertlane.cost.work import StageWork
from expertlane.plan.setting import Setting
from expertlane.plan.step_facts import basis_shares, floor_s, most_weight_bytes
from expertlane.results.projection import Estimate, StepProjection
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.partition import partition

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
            launches=FUSED,
        )

    def step(self, size: StepSize) -> StepProjection:
        """One step; of rotating micro-batches, a round."""
        groups = self._groups(size)
        alike: dict[str, tuple[StepProgram, list[list[StageWork]]]] = {}
        for group in groups:  # of equal sizes one stands for all
            if str(group) not in alike:
                program = self._program(group, size)
                alike[str(group)] = program, self._pricing.work(program)
        programs, works = zip(*(alike[str(group)] for group in groups), strict=True)
        seconds, why = self._run(works)
        num_tokens = size.num_seqs * size.num_new
        by_basis, extrapolated = basis_shares(works)
        low, likely, high = (float(each) for each in seconds)
        return StepProjection(
            context=size.num_cached,
            num_tokens=num_tokens,
            step_s=Estimate(likely, low, high),
            tps=Estimate(num_tokens / likely, num_tokens / high, num_tokens / low),
            shares={str(cause): float(share) for cause, share in why.shares.items()},
            floor_s=floor_s(programs, self._device, self._setting.types),
            flops_utilisation=float(why.flops_utilisation),
            read_utilisation=float(why.bytes_utilisation),
            basis_shares=by_basis,
            extrapolated_share=extrapolated,
            weight_bytes=most_weight_bytes(programs),
            fits=size.fits,
        )

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

    def _run(self, works: Sequence[list[list[StageWork]]]) -> tuple[Floats, Why]:
        """[3]; seconds of a round in the steady state, and where they go."""
        layout = self._layout
        driver_s = self._terms.step_s(layout.replica_size)
        timeline = Timeline(self._terms, layout.pp, layout.stage_size)
        ends: Floats = np.zeros((len(works), len(BOUNDS)))  # of each group's last step
        rounds = []
        why = WhyTable(self._device, self._setting.types.weights, self._pricing.dtype)
        for _ in range(_ROUNDS if len(works) > 1 else 2):
            for place, work in enumerate(works):
                times = timeline.run(work, ends[place] + driver_s)
                ends[place] = times.end_s
                why.add(times)
            rounds.append(ends[-1].copy())
        last = [after - before for before, after in pairwise([np.zeros(len(BOUNDS)), *rounds])]
        return last[-1], why.result()
