"""Options of the commands, and the groups of them that commands share.

In this order: what a shell completes; options of models, layouts and engines; of modelled
clusters.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from expertlane.cli.help import Panel
from expertlane.cost.laws import shipped_profiles
from expertlane.errors import UserError, naming
from expertlane.spec.deployment import (
    DISPATCH_FORMS,
    ActivationsType,
    DispatchChoice,
    DispatchForm,
    KVCacheType,
    MicroBatchSchedule,
    Options,
    PayloadType,
    PlacementMethod,
    WeightsType,
)
from expertlane.spec.engine_config import SETTINGS, EngineConfig, sentence_of
from expertlane.spec.layout import Layout
from expertlane.spec.names import (
    CacheType,
    CheckLevel,
    CpuIsa,
    Dtype,
    GpuExecution,
    NumberType,
    OnFailure,
)
from expertlane.spec.ranges import DEFAULT_SKEW, RANGES, shown

if TYPE_CHECKING:
    from expertlane.cost.throughput import MultiToken


def known_models(incomplete: str) -> list[str]:
    """Presets; the shell completes folders itself."""
    from expertlane.spec.model import PRESETS

    return _beginning(incomplete, PRESETS)


def known_experiments(incomplete: str) -> list[str]:
    """The experiments that come with expertlane."""
    from expertlane.spec.experiment import shipped_experiments

    return _beginning(incomplete, shipped_experiments())


def known_profiles(incomplete: str) -> list[str]:
    """The profiles that come with expertlane."""
    return _beginning(incomplete, shipped_profiles())


def known_clusters(incomplete: str) -> list[str]:
    """Profiles with usual numbers of devices."""
    sizes = (8, 16, 32, 64)
    return _beginning(
        incomplete, (f"{name}x{size}" for name in shipped_profiles() for size in sizes)
    )


def known_layouts(ctx: typer.Context, incomplete: str) -> list[str]:
    """The valid layouts of a preset on the cluster, where both are given before."""
    from expertlane.spec.model import PRESETS

    # An option without its value yet ends the parsing before arguments have their names.
    model = ctx.params.get("model") or next(iter(ctx.args), "")
    count = str(ctx.params.get("cluster")).rpartition("x")[2]
    if model not in PRESETS or not count.isdigit():
        return []
    from expertlane.planner.candidates import MOST_DEVICES, valid_layouts

    if not 0 < int(count) <= MOST_DEVICES:
        return []
    return _beginning(incomplete, map(str, valid_layouts(PRESETS[model], int(count))))


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


MODEL_HELP = (
    "A checkpoint folder, a hub id (org/name), or a preset with random weights: "
    "paper-tiny, paper-small, paper."
)
_MODEL: Any = typer.Argument(metavar="MODEL", autocompletion=known_models, help=MODEL_HELP)
ModelArgument = Annotated[str, _MODEL]
OptionalModel = Annotated[str | None, _MODEL]


def _option_of(name: str, default: Any = ..., **more: Any) -> Any:
    """The option of a setting of the engine, with its default and its sentence."""
    setting = SETTINGS[name]
    if setting.metadata["none"]:
        more = {"show_default": setting.metadata["none"]} | more
    value = setting.default if default is ... else default
    return typer.Option(value, help=sentence_of(name), **more)


# `--timeout-s`: the most that ranks are waited for.
TIMEOUT: Any = _option_of("timeout_s", rich_help_panel=Panel.RANKS)


def on_failure_option(default: OnFailure) -> Any:
    """`--on-failure`: the reaction to a lost rank."""
    return _option_of("on_failure", default, rich_help_panel=Panel.RANKS)


def layout_option(default: Any, show_default: bool | str = True) -> Any:
    """`--layout`."""
    return typer.Option(
        default,
        metavar="LAYOUT",
        show_default=show_default,
        autocompletion=known_layouts,
        rich_help_panel=Panel.DEPLOYMENT,
        help="How ranks are arranged: dp=2,ep=2 for example. Ranks of tensor (tp), pipeline (pp), "
        "data (dp) and expert parallelism (ep).",
    )


def ranks_per_node_option(default: Any, show_default: str) -> Any:
    """`--ranks-per-node`."""
    return typer.Option(
        default,
        show_default=show_default,
        help="Consecutive ranks that count as one node.",
    )


# Number of redundant experts.
NUM_REDUNDANT: Any = typer.Option(0, help="Redundant experts per MoE layer, to share load.")


def seed_option(
    default: Any, show_default: bool | str = True, panel: Panel = Panel.MORE_WORKLOAD
) -> Any:
    """Seed of random draws."""
    return typer.Option(
        default,
        show_default=show_default,
        rich_help_panel=panel,
        help="Seed of all random draws; reproducible for equal seeds.",
    )


def placement_option(
    default: Any, show_default: bool | str = True, *, is_modelled: bool = False
) -> Any:
    """Placement of experts on ranks."""
    by_load = " load: in each layer by the load of earlier tokens, as if experts were rebalanced."
    return typer.Option(
        default,
        metavar=f"{'load|' * is_modelled}linear|round_robin|FILE",
        show_default=show_default,
        help="Experts per rank: consecutive ones, every ep-th, or as in a file of expertlane "
        f"balance.{by_load * is_modelled}",
    )


# Chrome traces beside the results.
TRACE: Any = typer.Option(
    False,
    "--trace",
    rich_help_panel=Panel.MORE_OUTPUT,
    help="Also write trace-NAME.json: what every rank does when, in one prefill and one decode "
    "step, for ui.perfetto.dev or chrome://tracing. In virtual time: trace-NAME-virtual.json "
    "too.",
)


def dtype_option(default: str, panel: Panel = Panel.DEPLOYMENT) -> Any:
    """`--dtype`: the type that ranks compute in."""
    return _option_of("dtype", show_default=default, rich_help_panel=panel)


# `--cpu-isa`: the instruction set that kernels may use.
CPU_ISA: Any = _option_of(
    "cpu_isa",
    envvar="EXPERTLANE_CPU_ISA",
    show_default="the best that this CPU has",
    rich_help_panel=Panel.RANKS,
)


# `--max-model-len`: positions of a sequence at most.
MAX_MODEL_LEN: Any = _option_of("max_model_len", rich_help_panel=Panel.BATCHING)


def fields_of(kind: Any, *groups: Any) -> dict[str, Any]:
    """The values of groups of options that are fields of a dataclass, by name."""
    names = {each.name for each in fields(kind)}
    return {name: each for group in groups for name, each in vars(group).items() if name in names}


TOKENS_OF_STEP = sentence_of("max_num_batched_tokens")


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Options of the cache and of requests, in the engine and on a modelled cluster."""

    panel: ClassVar = Panel.BATCHING
    block_size: int = _option_of("block_size")


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions(RequestOptions):
    """Options of the scheduler's steps."""

    max_num_seqs: int = _option_of("max_num_seqs")
    max_num_batched_tokens: int = _option_of("max_num_batched_tokens")


@dataclass(frozen=True, kw_only=True)
class DeploymentOptions:
    """Options of a deployment, on real ranks or modelled ones.

    Attributes:
        options: these, as `spec.deployment.Options`.

    Raises:
        UserError: a value is not valid, or there is no such file.
    """

    panel: ClassVar = Panel.MORE_DEPLOYMENT
    overlap: Literal["off", "on", "auto"] = typer.Option(
        "off",
        help="Two-batch overlap: one half batch computes while the other communicates; auto, on "
        "real ranks: where faster for a step's number of tokens, timed at startup.",
    )
    num_micro_batches: int = typer.Option(1, help="Micro-batches per pipeline step.")
    micro_batch_schedule: MicroBatchSchedule = typer.Option(
        "drained", help="drained: the pipeline empties after each step; rotating: it stays full."
    )
    dispatch: DispatchChoice = typer.Option(
        "all_to_all",
        help="How tokens are dispatched to experts: "
        + "; ".join(f"{name}: {form.sends}" for name, form in DISPATCH_FORMS.items())
        + "; auto, on real ranks: the fastest of "
        + ", ".join(name for name, form in DISPATCH_FORMS.items() if form.is_tried)
        + " for a step's number of tokens, timed at startup.",
    )
    prefill_dispatch: DispatchForm | None = typer.Option(
        None,
        show_default="as --dispatch",
        help="Dispatch form of steps that hold prompts, if different.",
    )
    payload: PayloadType = typer.Option(
        "model",
        help="Number type of dispatched hidden states; float8 rounds them (expertlane compare "
        "measures the error).",
    )
    placement: str = placement_option("linear")
    num_redundant_experts: int = NUM_REDUNDANT
    options: Options = field(init=False)
    methods: ClassVar[tuple[PlacementMethod, ...]] = ("linear", "round_robin")  # of placement

    def __post_init__(self) -> None:
        methods = self.methods
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
        given = fields_of(Options, self)
        given["overlap"] = "auto" if self.overlap == "auto" else self.overlap == "on"
        if not is_method:
            given["placement_file"] = given.pop("placement")
        object.__setattr__(self, "options", Options(**given))


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Options of starting real ranks."""

    panel: ClassVar = Panel.RANKS
    timeout_s: float = TIMEOUT
    oversubscribe: bool = _option_of("oversubscribe")
    cpu_isa: CpuIsa | None = CPU_ISA
    ignore_unused_tensors: bool = _option_of("ignore_unused_tensors")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of `LLM`."""

    panel: ClassVar = Panel.MORE_DEPLOYMENT
    dtype: Dtype | None = dtype_option("the checkpoint's, else the machine's choice")
    max_model_len: int | None = MAX_MODEL_LEN
    num_blocks: int | None = _option_of("num_blocks", rich_help_panel=Panel.BATCHING)
    scheduler: SchedulerOptions
    no_prefix_caching: bool = typer.Option(
        False, rich_help_panel=Panel.BATCHING, help="Turn prefix caching off."
    )
    deployment: DeploymentOptions
    weights: WeightsType = typer.Option(
        "model",
        help="Type in which matrices are kept; int8 rounds them while loading, with a scale for "
        "every 128 inputs.",
    )
    activations: ActivationsType = typer.Option(
        "model",
        help="Type of the inputs of matrices stored in float8. float8 rounds them, with a scale "
        "for every 128 of a token's values, so that GPUs multiply in float8; slower on CPUs.",
    )
    kv_dtype: KVCacheType = typer.Option(
        "model", help="Type of the KV cache. float8 takes half or less, and rounds keys and values."
    )
    cuda_graphs: Literal["auto", "on", "off"] = typer.Option(
        "auto",
        help="Record decode steps once and launch each as one CUDA graph; auto: where ranks have "
        "GPUs and expertlane's kernels.",
    )
    rebalance_steps: int = typer.Option(
        0,
        metavar="STEPS",
        help="Rebalance experts at runtime every STEPS steps, where it pays. 0: never.",
    )
    ranks_per_node: int = ranks_per_node_option(0, "0: those of one machine")
    check: CheckLevel = _option_of("check", rich_help_panel=Panel.RANKS)
    launch: LaunchOptions
    on_failure: OnFailure = on_failure_option("stop")
    rejoin_s: float = _option_of("rejoin_s", rich_help_panel=Panel.RANKS)
    options: Options = field(init=False)

    def __post_init__(self) -> None:
        given = fields_of(Options, self)
        given["cuda_graphs"] = None if self.cuda_graphs == "auto" else self.cuda_graphs == "on"
        object.__setattr__(self, "options", replace(self.deployment.options, **given))

    def config(self, layout: Layout, *, record_routing: bool = False) -> EngineConfig:
        """The settings of an engine.

        Raises:
            UserError: a value is out of its range.
        """
        return EngineConfig(
            layout=layout,
            prefix_caching=not self.no_prefix_caching,
            record_routing=record_routing,
            **fields_of(EngineConfig, self, self.scheduler, self.launch),
        )


def cluster_option(default: Any, show_default: bool | str = True, *, more: str = "") -> Any:
    """A modelled cluster.

    Args:
        more: further help.
    """
    return typer.Option(
        default,
        metavar="PROFILExN",
        autocompletion=known_clusters,
        show_default=show_default,
        help=f"The modelled cluster: N devices of a profile ({', '.join(shipped_profiles())}, or a "
        f"TOML file of expertlane calibrate).{more}",
    )


# The skew of routing, if there is no trace.
SKEW: Any = typer.Option(
    None,
    metavar="ALPHA",
    show_default=f"as published of the model's family, else {DEFAULT_SKEW:g}",
    rich_help_panel=Panel.MODELLED,
    help="Skewed routing: expert popularity by Zipf's law with exponent ALPHA; 0: uniform.",
)


# The type of the KV cache.
KV_DTYPE: Any = typer.Option(
    "model",
    rich_help_panel=Panel.MODELLED,
    help="Type of the KV cache. model: the checkpoint's, else that of hidden states.",
)


# The serving framework that a projection is of.
FRAMEWORK: Any = typer.Option(
    None,
    metavar="NAME",
    show_default="none: no correction",
    help="Correct step times and TTFT by public measurements of a serving framework: vllm, "
    "sglang, trt (TensorRT-LLM), dynamo-trt or dynamo-sglang. Also takes its scheduling and "
    "tokens per step, for plan its engine, for simulate its dispatch form, unless given.",
    rich_help_panel=Panel.MODELLED,
)


# The corrections that `compare --fit-corrections` fitted.
CORRECTIONS: Any = typer.Option(
    None,
    show_default="none",
    help="Corrections that compare --fit-corrections wrote: factors, fitted to measurements, "
    "on links, kernels and overheads, and a routing skew. --skew and --routing-trace take "
    "precedence.",
    rich_help_panel=Panel.MODELLED,
)


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """Multi-token prediction on a modelled cluster."""

    panel: ClassVar = Panel.MORE_DEPLOYMENT
    mtp: int = typer.Option(0, help="Multi-token prediction: N draft tokens per step.")
    mtp_acceptance: float | None = typer.Option(
        None, metavar="P", help="Acceptance rate of drafts, 0 to 1; needed with --mtp."
    )

    def multi_token(self) -> "MultiToken":
        """The number of draft tokens and their acceptance rate.

        Raises:
            UserError: one without the other, or no such number.
        """
        from expertlane.cost.throughput import MultiToken

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
        None, help="Routing as recorded by expertlane generate --record-routing."
    )
    skew: float | None = SKEW
    dtype: NumberType | None = dtype_option("the checkpoint's, float16 for a preset")
    kv_dtype: CacheType = KV_DTYPE
    execution: GpuExecution = typer.Option(
        "graph", help="Steps as CUDA graphs, or kernels launched one by one."
    )
    framework: str | None = FRAMEWORK
    corrections: Path | None = CORRECTIONS


def parse_list(name: str, field: str, text: str, example: str) -> list[Any]:
    """The numbers of an option, with commas between.

    Args:
        field: the field whose range they have.

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


def scripts_option(more: str, panel: Panel) -> Any:
    """`--scripts`.

    Args:
        more: further help: what they start.
    """
    return typer.Option(
        None,
        rich_help_panel=panel,
        metavar="DIR",
        help="Also write a batch script for Slurm and a LeaderWorkerSet for Kubernetes there. "
        f"{more}",
    )
