"""Likeness of a small model's decode step to that of the paper's experiment.

A step is described by the FLOPs of its experts per byte of weights, of dispatch and combine, and
of keys and values. Two models that agree in all three spend their time in the same places, on
machines that differ only in size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from expertlane.balance.placement_file import placements_of
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.program import ProgramBuilder, count
from expertlane.results.step_record import RankCounts
from expertlane.spec.deployment import Options
from expertlane.spec.experiment import Experiment, read_experiment, shipped_experiments
from expertlane.spec.layout import Layout, partition
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage

BASELINE, PROPOSAL = Layout(tp=8, pp=2), Layout(dp=16, ep=16)
# Of the paper's step: the paper's figures hold only near the start of a sequence, and at 10,000
# tokens its sequences do not fit; this is the context that its projection uses.
PAPER_CONTEXT = 1024
PAPER_TYPES = NumberTypes.all_of("float16")


@dataclass(frozen=True)
class FlopsPerByte:
    """FLOPs of a step's experts over bytes, both summed over all ranks.

    Attributes:
        weights: over bytes of weights read, of all parts of the model.
        dispatch: over bytes sent to other ranks in dispatch and combine.
        keys_and_values: over bytes of keys and values read.
    """

    weights: float
    dispatch: float
    keys_and_values: float

    def over(self, other: "FlopsPerByte") -> "FlopsPerByte":
        """Each value as a factor of the other's."""
        names = [field.name for field in fields(self)]
        return FlopsPerByte(*(getattr(self, name) / getattr(other, name) for name in names))


@dataclass(frozen=True)
class StepWork:
    """FLOPs, bytes and messages counted by the ranks in one or more decode steps.

    Attributes:
        ranks: one entry for each rank and step.
    """

    ranks: Sequence[RankCounts]

    @property
    def dispatch_bytes(self) -> int:
        """Bytes sent to other ranks in dispatch and combine."""
        sent = (rank.sent_bytes[[Stage.DISPATCH, Stage.COMBINE]] for rank in self.ranks)
        return sum(int(each.sum()) for each in sent)

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Roofline time, summed over ranks and stages.

        Of each stage FLOPs or bytes read at these rates, whichever takes longer. Bytes of keys and
        values count as attention's.
        """
        total = 0.0
        for rank in self.ranks:
            num_bytes = rank.weight_bytes.astype(np.float64)
            num_bytes[Stage.ATTENTION] += rank.kv_bytes
            total += float(np.maximum(rank.flops / flops_per_s, num_bytes / bytes_per_s).sum())
        return total


def step_work(
    model: ModelConfig,
    layout: Layout,
    types: NumberTypes,
    num_seqs: int,
    context: int,
    ranks_per_node: int = 8,
) -> StepWork:
    """One decode step with flat dispatch, in one micro-batch, with uniformly random routing.

    Args:
        layout: a layout of several ranks and one replica.
        num_seqs: sequences on all ranks together, each with one new token.
        context: positions cached before that token.
    """
    builder = ProgramBuilder(
        model,
        layout,
        placements_of(model, layout, Options()),
        types=types,
        ranks_per_node=ranks_per_node,
    )
    of_rank = [len(part) for part in partition(num_seqs, layout.dp)]
    sizes = PartSizes.even(layout.dp, layout.tp, of_rank, num_cached=context)
    program = builder.build_sized([("all_to_all", [sizes])], PowerLawRouting.of(model, 0.0))
    return StepWork(list(count(program, model.num_hidden_layers, model.num_experts)))


def flops_per_byte(work: StepWork) -> FlopsPerByte:
    """FLOPs of the experts over the bytes of a step."""
    ranks = work.ranks
    flops = sum(int(rank.flops[Stage.EXPERTS]) for rank in ranks)
    return FlopsPerByte(
        weights=flops / sum(int(rank.weight_bytes.sum()) for rank in ranks),
        dispatch=flops / work.dispatch_bytes,
        keys_and_values=flops / sum(rank.kv_bytes for rank in ranks),
    )


def paper_step_work(
    layout: Layout, num_experts_per_tok: int, context: int = PAPER_CONTEXT
) -> StepWork:
    """`step_work` of the paper's decode step with all its sequences.

    Args:
        num_experts_per_tok: the paper does not give it.
        context: positions cached for each sequence.
    """
    paper = read_experiment(shipped_experiments()["paper"])
    return step_work(
        paper.model.with_overrides(num_experts_per_tok=num_experts_per_tok),
        layout,
        PAPER_TYPES,
        paper.workload.num_sequences,
        context,
        paper.cluster.ranks_per_node,
    )


def own_step_work(experiment: Experiment, layout: Layout, types: NumberTypes) -> StepWork:
    """`step_work` of an experiment's mean decode step."""
    workload = experiment.workload
    return step_work(
        experiment.model,
        layout,
        types,
        workload.num_sequences,
        workload.mean_context,
        experiment.cluster.ranks_per_node or layout.world_size,
    )


def likeness(
    experiment: Experiment, layout: Layout, types: NumberTypes, paper_context: int = PAPER_CONTEXT
) -> FlopsPerByte:
    """FLOPs per byte of an experiment's mean decode step, as factors of the paper's."""
    own = flops_per_byte(own_step_work(experiment, layout, types))
    paper = paper_step_work(layout, experiment.model.num_experts_per_tok, paper_context)
    return own.over(flops_per_byte(paper))


def is_of_the_papers_kind(experiment: Experiment) -> bool:
    """True for the paper's proposal on random weights, with as many layers and experts."""
    paper = read_experiment(shipped_experiments()["paper"]).model
    model = experiment.model
    return (
        experiment.checkpoint is None
        and any(each.layout == PROPOSAL for each in experiment.deployments)
        and model.num_hidden_layers == paper.num_hidden_layers
        and model.num_experts == paper.num_experts
    )
