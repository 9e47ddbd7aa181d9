"""What a priced step tells beside its time: floor, what it rests on, traffic and balance."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from expertlane.cost.laws.profile import Device
from expertlane.cost.laws.times import Basis
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.pricing import StageWork
from expertlane.cost.step.operation import Floats, Ints, Operation
from expertlane.cost.step.program import PartProgram, Section, StageProgram, StepProgram
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Link, Traffic

Work = Sequence[Sequence[StageWork]]


@dataclass(frozen=True, eq=False)
class StepFacts:
    """Of one step.

    Attributes:
        floor_s: as `floor_s`.
        basis_s: [num_bases]; likely seconds of operations and transfers, mean over ranks.
        extrapolated_s: of them, those beyond the sizes that were fitted.
        sent_bytes: [num_links, num_kinds_of_traffic]; to other ranks.
        num_tokens_per_expert: [num_layers, num_experts].
        rank_pairs: token-expert pairs of a layer's busiest rank over the mean; mean over layers,
            1 where there are no experts.
    """

    floor_s: float
    basis_s: Floats
    extrapolated_s: float
    sent_bytes: Ints
    num_tokens_per_expert: Ints
    rank_pairs: float

    @classmethod
    def of(
        cls,
        program: StepProgram,
        work: Work,
        device: Device,
        types: NumberTypes,
        model: ModelConfig,
    ) -> "StepFacts":
        """Of a step's program with its times."""
        basis_s, extrapolated_s = basis_seconds([work])
        tokens = np.zeros((model.num_hidden_layers, model.num_experts), dtype=np.int64)
        pairs = []
        for counts, layer in (
            (section.counts, section.layer)
            for part in _parts(program)
            for section in part.sections
            if section.counts is not None
        ):
            tokens[layer] += counts.num_tokens_per_expert.sum(axis=0)
            of_ranks = counts.pairs_of_ep_rank
            pairs.append(of_ranks.max() / max(of_ranks.mean(), 1e-9))
        return cls(
            floor_s=floor_s([program], device, types),
            basis_s=basis_s,
            extrapolated_s=extrapolated_s,
            sent_bytes=sent_bytes(program),
            num_tokens_per_expert=tokens,
            rank_pairs=float(np.mean(pairs)) if pairs else 1.0,
        )


def floor_s(programs: Sequence[StepProgram], device: Device, types: NumberTypes) -> float:
    """Seconds that no deployment of this layout can be under.

    A micro-batch's way through all stages, or all micro-batches on the busiest stage; of each
    stage's busiest rank the larger of bytes read over bandwidth and FLOPs over peak.

    Args:
        programs: of steps in flight together.
    """
    least = np.concatenate(
        [
            [[_least_s(each, device, types) for each in of_stage] for of_stage in program.stages]
            for program in programs
        ],
        axis=1,
    )  # [pp, micro-batches]
    return float(max(least.sum(axis=0).max(), least.sum(axis=1).max()))


def _least_s(program: StageProgram, device: Device, types: NumberTypes) -> float:
    reading, computing = np.zeros((2, program.mesh.size))
    for part in program.parts:
        for section, num in _unique(part):
            for step in section.steps:
                if isinstance(step, Operation):
                    peak = device.flops_per_s[step.dtype or types.weights]
                    computing += num * step.flops / peak
                    read = step.weight_bytes + step.kv_bytes
                    reading += num * read / device.memory_bytes_per_s
    return float(np.maximum(reading, computing).max())


def basis_seconds(works: Sequence[Work]) -> tuple[Floats, float]:
    """[num_bases] likely seconds of operations and transfers, rank mean; extrapolated ones."""
    by_basis, outside = np.zeros(len(Basis)), 0.0
    for work in works:
        for stage in (each for of_stage in work for each in of_stage):
            for block in (block for part in stage.parts for block in part):
                for timed in block.steps:
                    seconds = timed.times.seconds * len(block.layers)
                    by_basis[timed.times.basis] += float(seconds.mean())
                    outside += float((seconds * timed.times.is_extrapolated).mean())
    return by_basis, outside


def basis_shares(works: Sequence[Work]) -> tuple[dict[str, float], float]:
    """Of all likely seconds of operations and transfers, by basis; and those extrapolated."""
    return shares_of(*basis_seconds(works))


def shares_of(basis_s: Floats, extrapolated_s: float) -> tuple[dict[str, float], float]:
    """Seconds as shares, by the label of a basis; none that is zero."""
    total = float(basis_s.sum()) or 1.0
    shares = {basis.label: float(basis_s[basis]) / total for basis in Basis if basis_s[basis]}
    return shares, extrapolated_s / total


def sent_bytes(program: StepProgram) -> Ints:
    """[num_links, num_kinds_of_traffic]; what all ranks of a step send to others."""
    sent = np.zeros((len(Link), len(Traffic)), dtype=np.int64)
    for stage in (stage for of_stage in program.stages for stage in of_stage):
        for part in stage.parts:
            for section, num in _unique(part):
                for step in section.steps:
                    if not isinstance(step, Operation):
                        is_far = step.node[:, None] != step.node
                        everything = step.sent_bytes.sum(axis=(1, 2))
                        far = (step.sent_bytes * is_far).sum(axis=(1, 2))
                        sent[Link.INTER_NODE] += num * far
                        sent[Link.INTRA_NODE] += num * (everything - far)
        if stage.hand_over is not None:
            of_ranks, is_far = stage.hand_over.sent_bytes, stage.hand_over.is_remote
            sent[Link.INTER_NODE, Traffic.PAYLOAD] += of_ranks[is_far].sum()
            sent[Link.INTRA_NODE, Traffic.PAYLOAD] += of_ranks[~is_far].sum()
    return sent


def _parts(program: StepProgram) -> Iterator[PartProgram]:
    for of_stage in program.stages:
        for stage in of_stage:
            yield from stage.parts


def _unique(part: PartProgram) -> Iterator[tuple[Section, int]]:
    """Sections that do different things, each with how many layers do the same."""
    times = Counter(id(section.steps) for section in part.sections)
    for section in part.sections:
        if num := times.pop(id(section.steps), 0):
            yield section, num


def most_weight_bytes(programs: Sequence[StepProgram]) -> int:
    """What the rank that reads most weights reads of them, in all micro-batches."""
    most = 0.0
    for stage in range(len(programs[0].stages)):
        of_rank = np.zeros(programs[0].stages[stage][0].mesh.size)
        for each in (each for program in programs for each in program.stages[stage]):
            for section in (section for part in each.parts for section in part.sections):
                for step in section.steps:
                    if isinstance(step, Operation):
                        of_rank += step.weight_bytes
        most = max(most, float(of_rank.max()))
    return int(most)
