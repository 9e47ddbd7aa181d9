"""Options of the commands: how groups of them are declared, and the groups that commands share.

A group is a dataclass whose fields are options; a command takes groups as its parameters.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from expertlane.cli.output import Call, command_line
from expertlane.errors import UserError
from expertlane.spec.deployment import (
    DISPATCH_FORMS,
    DispatchChoice,
    MicroBatchSchedule,
    Options,
    PayloadType,
    PlacementMethod,
)
from expertlane.spec.ranges import DEFAULT_SKEW, RANGES, shown, take

Dtype = Literal["float32", "bfloat16", "float16"]
NumberType = Literal["float32", "float16", "bfloat16", "float8"]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A checkpoint folder, a hub id (org/name), or a preset with random weights: "
        "paper-tiny, paper-small, paper.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where results go, and how much of them is printed.

    Raises:
        UserError: two forms at once.
    """

    out: Path | None = typer.Option(
        None,
        "--out",
        "-o",
        metavar="DIR",
        help="Folder for results.json, report.md and report.html. Default: results/NAME, named "
        "after the command and its subject.",
    )
    full: bool = typer.Option(False, "--full", help="Print all tables.")
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Print one line.")
    as_json: bool = typer.Option(False, "--json", help="Print results.json instead.")

    def __post_init__(self) -> None:
        given = [
            name
            for name, is_given in (
                ("--full", self.full),
                ("--quiet", self.quiet),
                ("--json", self.as_json),
            )
            if is_given
        ]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other; give one")

    def call(self) -> Call:
        """This command line."""
        return Call(command_line(), self.out, always_writes=True)


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: in place of each group, its options.

    Numbers of options are checked by the ranges of the fields that they are named like.
    """

    parameters = _parameters(command)

    @wraps(command)
    def run(**values: Any) -> None:
        for each in parameters:
            _check(each, values[each.name])
        _call(command, values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _parameters(taker: Any) -> list[inspect.Parameter]:
    found = []
    for each in inspect.signature(taker).parameters.values():
        if is_dataclass(each.annotation):
            found += _parameters(each.annotation)
        else:
            found.append(each.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    return found


def _call(taker: Any, values: dict[str, Any]) -> Any:
    return taker(
        **{
            name: _call(each.annotation, values) if is_dataclass(each.annotation) else values[name]
            for name, each in inspect.signature(taker).parameters.items()
        }
    )


def _check(option: inspect.Parameter, value: object) -> None:
    if option.name in RANGES and isinstance(value, int | float):
        declared = getattr(option.default, "param_decls", None)
        take(option.name, value, declared[0] if declared else f"--{option.name.replace('_', '-')}")


def timeout_option() -> Any:
    """How long to wait for ranks."""
    return typer.Option(
        60.0, metavar="SECONDS", help="Longest wait for a rank that makes no progress."
    )


def trace_option() -> Any:
    """Chrome traces beside the results."""
    return typer.Option(
        False,
        "--trace",
        help="Also write trace-NAME.json: what every rank does when, in one prefill and one decode "
        "step, for ui.perfetto.dev or chrome://tracing. In virtual time: trace-NAME-virtual.json "
        "too.",
    )


def dtype_option(default: str) -> Any:
    """What ranks compute in."""
    return typer.Option(None, help=f"Type of weights and activations. Default: {default}.")


def cluster_option(default: Any, what: str = "The cluster", more: str = "") -> Any:
    """A modelled cluster."""
    return typer.Option(
        default,
        metavar="PROFILExN",
        help=f"{what}: N devices of a profile (h100, h200, b200, a100, or a TOML file from "
        f"expertlane calibrate). {more}".rstrip(),
    )


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """How many requests run at once, in the engine and on a modelled cluster."""

    block_size: int = typer.Option(16, metavar="N", help="Tokens per KV-cache block.")
    max_num_seqs: int = typer.Option(
        256, metavar="N", help="Concurrent requests per data-parallel rank."
    )
    max_num_batched_tokens: int = typer.Option(
        2048, metavar="N", help="Tokens per step and data-parallel rank."
    )


@dataclass(frozen=True, kw_only=True)
class DeploymentOptions:
    """How a deployment runs, whether on real ranks or on modelled ones.

    Attributes:
        options: the same as `spec` has it.

    Raises:
        UserError: a value is not valid, or there is no such file.
    """

    overlap: Literal["off", "on", "auto"] = typer.Option(
        "off",
        help="Two-batch overlap: one half batch computes while the other communicates; auto: "
        "where faster for a step's number of tokens, timed at startup.",
    )
    num_micro_batches: int = typer.Option(1, metavar="N", help="Micro-batches per pipeline step.")
    micro_batch_schedule: MicroBatchSchedule = typer.Option(
        "drained", help="drained: the pipeline empties after each step; rotating: it stays full."
    )
    dispatch: DispatchChoice = typer.Option(
        "all_to_all",
        help="How tokens are dispatched to experts: "
        + ", ".join(form.sends for form in DISPATCH_FORMS.values())
        + ", or the fastest for a step's number of tokens, timed at startup.",
    )
    payload: PayloadType = typer.Option(
        "model",
        help="Number type of dispatched hidden states; float8 rounds them (expertlane compare "
        "measures the error).",
    )
    placement: str = typer.Option(
        "linear",
        metavar="linear|round_robin|FILE",
        help="Experts per rank: consecutive ones, every ep-th, or as in a file of expertlane "
        "balance.",
    )
    num_redundant_experts: int = typer.Option(
        0,
        metavar="N",
        help="Redundant experts per MoE layer, to share load.",
    )
    options: Options = field(init=False)

    def __post_init__(self) -> None:
        methods = get_args(PlacementMethod)
        is_method = self.placement in methods
        if not (is_method or os.path.isfile(self.placement)):
            raise UserError(
                f"--placement is {self.placement!r}, and there is no such file; valid: "
                f"{', '.join(methods)}, or a file written by expertlane balance"
            )
        num_redundant = self.num_redundant_experts
        if num_redundant and not is_method:
            raise UserError(
                f"--num-redundant-experts is {num_redundant}, but {self.placement} says which "
                "copies there are"
            )
        where: dict[str, Any] = {"placement" if is_method else "placement_file": self.placement}
        options = Options(
            overlap="auto" if self.overlap == "auto" else self.overlap == "on",
            num_micro_batches=self.num_micro_batches,
            micro_batch_schedule=self.micro_batch_schedule,
            dispatch=self.dispatch,
            payload=self.payload,
            num_redundant_experts=num_redundant,
            **where,
        )
        object.__setattr__(self, "options", options)


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How real ranks are started."""

    timeout_s: float = timeout_option()
    oversubscribe: bool = typer.Option(
        False, "--oversubscribe", help="Allow more than 32 local ranks per core."
    )
    ignore_unused_tensors: bool = typer.Option(
        False,
        "--ignore-unused-tensors",
        help="Continue, with a warning, if the checkpoint holds tensors that its config.json does "
        "not use.",
    )


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of `LLM`."""

    dtype: Dtype | None = dtype_option("the checkpoint's, else the machine's choice")
    max_model_len: int | None = typer.Option(
        None, metavar="N", help="Longest sequence, in tokens. Default: the model's."
    )
    num_blocks: int | None = typer.Option(
        None, metavar="N", help="KV-cache blocks. Default: as many as fit in memory."
    )
    scheduler: SchedulerOptions
    no_prefix_caching: bool = typer.Option(
        False, "--no-prefix-caching", help="Turn prefix caching off."
    )
    deployment: DeploymentOptions
    rebalance_steps: int = typer.Option(
        0,
        metavar="STEPS",
        help="Rebalance experts at runtime every STEPS steps, where it pays. 0: never.",
    )
    ranks_per_node: int = typer.Option(
        0,
        metavar="N",
        help="Consecutive ranks that count as one node. 0: as started.",
    )
    launch: LaunchOptions
    options: Options = field(init=False)

    def __post_init__(self) -> None:
        options = replace(self.deployment.options, rebalance_steps=self.rebalance_steps)
        object.__setattr__(self, "options", options)

    def for_llm(self) -> dict[str, Any]:
        """The arguments of `LLM`."""
        return {
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "num_blocks": self.num_blocks,
            "prefix_caching": not self.no_prefix_caching,
            "options": self.options,
            "ranks_per_node": self.ranks_per_node,
            **vars(self.scheduler),
            **vars(self.launch),
        }


@dataclass(frozen=True, kw_only=True)
class ProjectionOptions:
    """What of a modelled cluster is not its profile's."""

    routing_trace: Path | None = typer.Option(
        None,
        metavar="FILE",
        help="Routing as recorded by expertlane generate --record-routing.",
    )
    skew: float | None = typer.Option(
        None,
        metavar="ALPHA",
        help="Without a trace: expert popularity by Zipf's law, exponent ALPHA; 0: uniform. "
        f"Default: {DEFAULT_SKEW:g}.",
    )
    dtype: NumberType | None = typer.Option(
        None, help="Type of weights. Default: the checkpoint's, float16 for a preset."
    )
    kv_dtype: NumberType | None = typer.Option(
        None, help="Type of the KV cache. Default: that of hidden states."
    )
    execution: Literal["graph", "eager"] = typer.Option(
        "graph", help="Steps as CUDA graphs, or kernels launched one by one."
    )


def parse_list(name: str, field: str, text: str, example: str) -> list[Any]:
    """The numbers of an option, with commas between.

    Args:
        field: whose range they have.

    Raises:
        UserError: one is none, or out of its range.
    """
    allowed = RANGES[field]
    numbers = [allowed.parse(part) for part in text.split(",")]
    if None in numbers:
        raise UserError(
            f"{name} is {shown(text)}; it must be {allowed}, or several with commas between: "
            f"{example}"
        )
    return numbers
