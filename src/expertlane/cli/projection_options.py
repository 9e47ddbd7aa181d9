"""Options of the commands that project deployments on a modelled cluster."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from expertlane.cli.engine_options import FoundModel
    from expertlane.cost.laws.profile_file import ModelledCluster
    from expertlane.cost.number_types import NumberTypes


class NumberType(StrEnum):
    """What values are held in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8 = "float8"


class Executions(StrEnum):
    """How work gets onto a device."""

    GRAPH = "graph"
    EAGER = "eager"


ClusterOption = Annotated[
    str,
    typer.Option(
        "--cluster",
        metavar="PROFILExN",
        help="The cluster: so many devices of a profile (h100, h200, b200, a100, or a TOML file "
        "of expertlane calibrate).",
    ),
]
RoutingTraceOption = Annotated[
    Path | None,
    typer.Option(
        "--routing-trace",
        metavar="FILE",
        help="Which experts tokens choose, as recorded by expertlane generate --record-routing.",
    ),
]
SkewOption = Annotated[
    float,
    typer.Option(
        "--skew",
        metavar="ALPHA",
        help="Without a trace: experts' popularity falls with their rank to the power of -ALPHA; "
        "0 for experts alike.",
    ),
]
NumberTypeOption = Annotated[
    NumberType | None,
    typer.Option("--dtype", help="Of weights. Default: the checkpoint's, float16 for a preset."),
]
KvTypeOption = Annotated[
    NumberType | None,
    typer.Option("--kv-dtype", help="Of cached keys and values. Default: that of hidden states."),
]
ExecutionOption = Annotated[
    Executions,
    typer.Option(
        "--execution",
        help="Whether a step is captured as a CUDA graph or launched kernel by kernel.",
    ),
]


def number_types(
    found: "FoundModel",
    dtype: NumberType | None,
    kv_dtype: NumberType | None,
    cluster: "ModelledCluster",
) -> "NumberTypes":
    """What was asked for, else the checkpoint's own.

    A preset is in float16, as in the paper, or in what the devices have if they lack it: a profile
    of `expertlane calibrate` has one type.
    """
    from expertlane.cost.number_types import NumberTypes

    known = cluster.profile.device.flops_per_s
    own: str = found.config.dtype if found.folder else "float16"
    if not found.folder and own not in known:
        own = next(iter(known))
    if found.quantization is not None and found.quantization.is_float8:
        own = "float8"
    return NumberTypes.asked(dtype.value if dtype else own, kv_dtype and kv_dtype.value)


def priced_wider(found: "FoundModel", types: "NumberTypes") -> str | None:
    """A sentence where a checkpoint's weights are narrower than any that can be priced."""
    quantization = found.quantization
    if quantization is None or quantization.is_float8:
        return None
    nearer = "" if types.weights == "float8" else "; --dtype float8 comes nearer"
    return (
        f"The checkpoint's weights are {quantization.method} but priced as {types.weights}, for "
        "want of a law of narrower ones: their memory and reads come out too large"
        f"{nearer}."
    )
