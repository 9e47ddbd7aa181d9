"""Options of modelled deployments: cluster, routing, number types, drafts."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from expertlane.cli import completion
from expertlane.cli.help import Panel
from expertlane.cli.options import dtype_option
from expertlane.cost.laws import shipped_profiles
from expertlane.errors import UserError, naming
from expertlane.spec.names import CacheType, GpuExecution, NumberType
from expertlane.spec.ranges import DEFAULT_SKEW

if TYPE_CHECKING:
    from expertlane.cost.multi_token import MultiToken


def cluster_option(default: Any, show_default: bool | str = True, *, more: str = "") -> Any:
    """A modelled cluster.

    Args:
        more: further help.
    """
    return typer.Option(
        default,
        metavar="PROFILExN",
        autocompletion=completion.clusters,
        show_default=show_default,
        help=f"The modelled cluster: N devices of a profile ({', '.join(shipped_profiles())}, or a "
        f"TOML file of expertlane calibrate).{more}",
    )


def skew_option() -> Any:
    """The skew of routing, if there is no trace."""
    return typer.Option(
        None,
        metavar="ALPHA",
        show_default=f"as published of the model's family, else {DEFAULT_SKEW:g}",
        rich_help_panel=Panel.MODELLED,
        help="Skewed routing: expert popularity by Zipf's law with exponent ALPHA; 0: uniform.",
    )


def kv_dtype_option() -> Any:
    """The type of the KV cache."""
    return typer.Option(
        "model",
        rich_help_panel=Panel.MODELLED,
        help="Type of the KV cache. model: the checkpoint's, else that of hidden states.",
    )


def framework_option() -> Any:
    """The serving framework that a projection is of."""
    return typer.Option(
        None,
        metavar="NAME",
        show_default="none: no correction",
        help="Correct step times and TTFT by public measurements of a serving framework: vllm, "
        "sglang, trt (TensorRT-LLM), dynamo-trt or dynamo-sglang. Also takes its scheduling and "
        "tokens per step; plan its engine, simulate its dispatch, unless they are given.",
        rich_help_panel=Panel.MODELLED,
    )


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """Multi-token prediction on a modelled cluster."""

    panel: ClassVar = Panel.MORE_DEPLOYMENT
    mtp: int = typer.Option(0, metavar="N", help="Multi-token prediction: N draft tokens per step.")
    mtp_acceptance: float | None = typer.Option(
        None, metavar="P", help="Acceptance rate of drafts, 0 to 1; needed with --mtp."
    )

    def multi_token(self) -> "MultiToken":
        """The number of draft tokens and their acceptance rate.

        Raises:
            UserError: one without the other, or no such number.
        """
        from expertlane.cost.multi_token import MultiToken

        acceptance = self.mtp_acceptance
        if (acceptance is None) == (self.mtp > 0):
            raise UserError(
                f"--mtp is {self.mtp} and --mtp-acceptance "
                + ("not given" if acceptance is None else f"{acceptance:g}")
                + "; give both, 1 or more tokens and a share from 0 to 1, or neither"
            )
        with naming("--mtp"):
            return MultiToken(self.mtp, acceptance or 0.0)


@dataclass(frozen=True, kw_only=True)
class ProjectionOptions:
    """Settings of a modelled cluster that its profile does not contain."""

    panel: ClassVar = Panel.MODELLED
    routing_trace: Path | None = typer.Option(
        None,
        metavar="FILE",
        help="Routing as recorded by expertlane generate --record-routing.",
    )
    skew: float | None = skew_option()
    dtype: NumberType | None = dtype_option("the checkpoint's, float16 for a preset")
    kv_dtype: CacheType = kv_dtype_option()
    execution: GpuExecution = typer.Option(
        "graph", help="Steps as CUDA graphs, or kernels launched one by one."
    )
    framework: str | None = framework_option()
