"""What `generate` and `bench` share: the engine's options, and how a model is found and loaded."""

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from expertlane.cli.compare import Dtype
from expertlane.errors import UserError
from expertlane.spec.ranges import take_fields

if TYPE_CHECKING:
    from expertlane.engine.llm import LLM
    from expertlane.spec.deployment import Options
    from expertlane.spec.hf_config import Quantization
    from expertlane.spec.layout import Layout
    from expertlane.spec.model import ModelConfig


class MicroBatches(StrEnum):
    """When a pipeline's micro-batches take their next token."""

    DRAINED = "drained"
    ROTATING = "rotating"


class Dispatch(StrEnum):
    """How tokens travel to experts."""

    ALL_TO_ALL = "all_to_all"
    ALL_GATHER = "all_gather"
    HIERARCHICAL = "hierarchical"
    AUTO = "auto"


class PayloadTypes(StrEnum):
    """The type in which hidden states travel to experts."""

    MODEL = "model"
    BFLOAT16 = "bfloat16"
    FLOAT8 = "float8"


class Overlaps(StrEnum):
    """Whether one half of a batch computes while the other half travels."""

    OFF = "off"
    ON = "on"
    AUTO = "auto"


ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A checkpoint's folder, a hub id (org/name), or a preset, whose weights are random: "
        "paper-tiny, paper-small, paper.",
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        help="Of weights and activations. Default: the checkpoint's, else the machine's choice."
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(metavar="N", help="Positions a sequence may take. Default: the model's."),
]
NumBlocks = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Blocks of the key/value cache. Default: what memory has room for."
    ),
]
BlockSize = Annotated[int, typer.Option(metavar="N", help="Positions in a block of the cache.")]
MaxNumSeqs = Annotated[
    int, typer.Option(metavar="N", help="Requests running at once, a data-parallel rank.")
]
MaxNumBatchedTokens = Annotated[
    int, typer.Option(metavar="N", help="New tokens in a step, a data-parallel rank.")
]
NoPrefixCaching = Annotated[
    bool, typer.Option("--no-prefix-caching", help="Compute equal beginnings of prompts anew.")
]
OverlapOption = Annotated[
    Overlaps,
    typer.Option(
        help="Whether one half of a batch computes while the other half travels; auto: where that "
        "is faster for a step's number of tokens, timed at the start."
    ),
]
NumMicroBatches = Annotated[
    int, typer.Option(metavar="N", help="Parts a batch is cut into for the pipeline.")
]
MicroBatchSchedule = Annotated[
    MicroBatches, typer.Option(help="Whether micro-batches wait for each other after each token.")
]
DispatchOption = Annotated[
    Dispatch,
    typer.Option(
        help="How tokens travel to experts: a copy to each rank reached, all tokens to all ranks, "
        "a copy to each node reached, forwarded inside, or the fastest for a step's number of "
        "tokens, timed at the start."
    ),
]
PayloadOption = Annotated[
    PayloadTypes,
    typer.Option(
        help="The type in which hidden states travel to experts; a narrower one than the model's "
        "rounds them. How much that changes, expertlane compare measures."
    ),
]
PlacementOption = Annotated[
    str,
    typer.Option(
        metavar="linear|round_robin|FILE",
        help="Which experts a rank holds: consecutive ones, every ep-th, or as in a file written "
        "by expertlane balance.",
    ),
]
Redundant = Annotated[
    int,
    typer.Option(metavar="N", help="Copies of experts beside each MoE layer's own, to share load."),
]
Rebalance = Annotated[
    int,
    typer.Option(
        metavar="STEPS",
        help="Move experts while requests run, by the load of so many steps, where that pays. "
        "0: never.",
    ),
]
RanksPerNode = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Consecutive ranks that count as one node, on one machine too. 0: as they were "
        "started.",
    ),
]
TimeoutS = Annotated[
    float, typer.Option(metavar="SECONDS", help="Longest wait for a rank without progress.")
]


@dataclass(frozen=True)
class EngineOptions:
    """Options of `LLM`, under its names.

    Raises:
        UserError: a number is out of its range.
    """

    dtype: Dtype | None
    max_model_len: int | None
    num_blocks: int | None
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_caching: bool
    options: "Options"
    ranks_per_node: int
    timeout_s: float
    oversubscribe: bool
    ignore_unused_tensors: bool

    def __post_init__(self) -> None:
        take_fields(self, lambda field: f"--{field.replace('_', '-')}")


def deployment_options(
    *,
    overlap: Overlaps,
    num_micro_batches: int,
    micro_batch_schedule: MicroBatches,
    dispatch: Dispatch,
    payload: PayloadTypes,
    placement: str,
    redundant: int,
    rebalance: int,
) -> "Options":
    """The options of a deployment.

    Args:
        placement: a method's name, or a file.

    Raises:
        UserError: a value is not valid, or there is no such file.
    """
    from expertlane.spec.deployment import Options, PlacementMethod

    is_method = placement in get_args(PlacementMethod)
    if not (is_method or os.path.isfile(placement)):
        raise UserError(
            f"--placement is {placement!r}, and there is no such file; valid: "
            f"{', '.join(get_args(PlacementMethod))}, or a file written by expertlane balance"
        )
    if redundant and not is_method:
        raise UserError(f"--redundant is {redundant}, but {placement} says which copies there are")
    where: dict[str, Any] = {"placement" if is_method else "placement_file": placement}
    return Options(
        overlap="auto" if overlap is Overlaps.AUTO else overlap is Overlaps.ON,
        num_micro_batches=num_micro_batches,
        micro_batch_schedule=micro_batch_schedule.value,
        dispatch=dispatch.value,
        payload=payload.value,
        num_redundant_experts=redundant,
        rebalance_steps=rebalance,
        **where,
    )


@dataclass(frozen=True)
class FoundModel:
    """A model before it is loaded.

    Attributes:
        name: as the user gave it.
        folder: of the checkpoint; None for a preset.
        quantization: of the checkpoint's weights; None where they are as computed with.
    """

    name: str
    config: "ModelConfig"
    folder: Path | None
    quantization: "Quantization | None" = None

    def lay_out(self, layout: str) -> "Layout":
        """Read a layout.

        Raises:
            UserError: it is none, or the model cannot be laid out so.
        """
        from expertlane.spec.layout import Layout

        chosen = Layout.parse(layout)
        chosen.check_model(self.config)
        return chosen

    def check(self, layout: "Layout", options: EngineOptions) -> None:
        """Check what can be known before ranks are started.

        Raises:
            UserError: experts cannot be placed or reached so.
        """
        from expertlane.engine.start import check_deployment
        from expertlane.spec.deployment import Deployment

        deployment = Deployment(self.name, layout, options.options)
        check_deployment(self.config, deployment, options.ranks_per_node)

    def load(
        self, layout: "Layout", options: EngineOptions, *, record_routing: bool = False
    ) -> "LLM":
        """Start the ranks and load the model, saying so on stderr.

        Raises:
            UserError: it cannot be laid out so, or does not fit.
            RankError: a rank died, hung or failed.
        """
        from expertlane.cli.output import progress_on_stderr
        from expertlane.engine.llm import LLM

        ranks = "1 rank" if layout.world_size == 1 else f"{layout.world_size} ranks"
        with progress_on_stderr() as progress:
            progress.task(f"loading {self.name} on {ranks} ({layout})", 1)
            llm = LLM(
                self.folder or self.name,
                layout=layout,
                record_routing=record_routing,
                **vars(options),
            )
            progress.advance()
            progress.done()
        return llm


def find_model(name: str, *, weights: bool = True) -> FoundModel:
    """Find a preset or a checkpoint, downloaded first if need be.

    Args:
        weights: else a checkpoint's configuration is all that is needed.

    Raises:
        UserError: there is none, or its configuration cannot be read.
    """
    from expertlane.engine.hub import resolve_model
    from expertlane.spec.from_hf import read_model
    from expertlane.spec.hf_config import quantization_of, read_config
    from expertlane.spec.model import PRESETS

    if name in PRESETS:
        return FoundModel(name, PRESETS[name], None)
    folder = resolve_model(name, weights=weights)
    config = read_model(folder, name, weights=weights)
    return FoundModel(name, config, folder, quantization_of(read_config(folder)))
