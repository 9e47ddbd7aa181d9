"""How far the decode step of a small model is like that of the paper's experiment.

A step is described by what its experts compute for each byte of weights, of dispatch and combine,
and of keys and values. Two models that agree in all three spend their time in the same places on
machines that are alike but for their size.
"""

from dataclasses import dataclass, fields

from expertlane.balance.placement_file import placements_of
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.program import ProgramBuilder
from expertlane.cost.step.totals import count
from expertlane.spec.deployment import Options
from expertlane.spec.experiment import Experiment, read_experiment, shipped_experiments
from expertlane.spec.layout import Layout, partition
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage

BASELINE, PROPOSAL = Layout(tp=8, pp=2), Layout(dp=16, ep=16)
# Of the paper's step: its own numbers hold near the start of a sequence alone, and at 10,000 tokens
# its sequences do not fit; this is the context that its projection speaks of.
PAPER_CONTEXT = 1024
PAPER_TYPES = NumberTypes.all_of("float16")


@dataclass(frozen=True)
class FlopsPerByte:
    """FLOPs of a step's experts over bytes, both of all ranks.

    Attributes:
        weights: read, of all parts of the model.
        dispatch: of dispatch and combine, sent to other ranks.
        keys_and_values: read.
    """

    weights: float
    dispatch: float
    keys_and_values: float

    def over(self, other: "FlopsPerByte") -> "FlopsPerByte":
        """Each as a factor of the other's."""
        names = [field.name for field in fields(self)]
        return FlopsPerByte(*(getattr(self, name) / getattr(other, name) for name in names))


def flops_per_byte(
    model: ModelConfig,
    layout: Layout,
    types: NumberTypes,
    num_seqs: int,
    context: int,
    ranks_per_node: int = 8,
) -> FlopsPerByte:
    """Of one decode step with flat dispatch, in one micro-batch, of tokens routed evenly by chance.

    Args:
        layout: of several ranks and one replica.
        num_seqs: sequences of all ranks, each with one new token.
        context: positions cached before it.
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
    ranks = count(program, model.num_hidden_layers, model.num_experts)
    flops = sum(int(rank.flops[Stage.EXPERTS]) for rank in ranks)
    sent = sum(int(rank.sent_bytes[[Stage.DISPATCH, Stage.COMBINE]].sum()) for rank in ranks)
    return FlopsPerByte(
        weights=flops / sum(int(rank.weight_bytes.sum()) for rank in ranks),
        dispatch=flops / sent,
        keys_and_values=flops / sum(rank.kv_bytes for rank in ranks),
    )


def paper_flops_per_byte(
    layout: Layout, num_experts_per_tok: int, context: int = PAPER_CONTEXT
) -> FlopsPerByte:
    """The same of the paper's step of all its sequences.

    Args:
        num_experts_per_tok: which the paper does not give.
    """
    paper = read_experiment(shipped_experiments()["paper"])
    return flops_per_byte(
        paper.model.with_overrides(num_experts_per_tok=num_experts_per_tok),
        layout,
        PAPER_TYPES,
        paper.workload.num_sequences,
        context,
        paper.cluster.ranks_per_node,
    )


def likeness(
    experiment: Experiment, layout: Layout, types: NumberTypes, paper_context: int = PAPER_CONTEXT
) -> FlopsPerByte:
    """An experiment's mean decode step, each as a factor of the paper's."""
    model, workload = experiment.model, experiment.workload
    own = flops_per_byte(
        model,
        layout,
        types,
        workload.num_sequences,
        workload.mean_context,
        experiment.cluster.ranks_per_node or layout.world_size,
    )
    return own.over(paper_flops_per_byte(layout, model.num_experts_per_tok, paper_context))


def is_of_the_papers_kind(experiment: Experiment) -> bool:
    """Whether it runs the paper's proposal on random weights of as many layers and experts."""
    paper = read_experiment(shipped_experiments()["paper"]).model
    model = experiment.model
    return (
        experiment.checkpoint is None
        and any(each.layout == PROPOSAL for each in experiment.deployments)
        and model.num_hidden_layers == paper.num_hidden_layers
        and model.num_experts == paper.num_experts
    )
