"""Settings of an engine: each with its default, its range (`spec.ranges`) and its sentence, once.

`LLM`, commands, a server and what starts ranks take an `EngineConfig` as it is.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from expertlane.errors import SpecError, did_you_mean
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import CheckLevel, CpuIsa, Dtype, OnFailure
from expertlane.spec.ranges import shown, take_fields


def _setting(default: Any, sentence: str, none: str = "") -> Any:
    return field(default=default, metadata={"sentence": sentence, "none": none})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine.

    Raises:
        UserError: a value is out of its range, no flag, or none of the valid words.
    """

    layout: Layout = _setting(Layout(), "Layout of the ranks, such as tp=2,ep=2.")
    options: Options = _setting(
        Options(), "How it runs: dispatch, placement, overlap, micro-batches, number types."
    )
    dtype: Dtype | None = _setting(
        None, "Type of weights and activations.", "the checkpoint's, else the machine's choice"
    )
    max_model_len: int | None = _setting(None, "Longest sequence, in tokens.", "the model's")
    block_size: int = _setting(16, "Tokens per KV-cache block.")
    num_blocks: int | None = _setting(
        None, "KV-cache blocks per data-parallel rank.", "as many as fit in memory"
    )
    max_num_seqs: int = _setting(256, "Concurrent requests per data-parallel rank.")
    max_num_batched_tokens: int = _setting(2048, "Tokens per step and data-parallel rank.")
    prefix_caching: bool = _setting(True, "Requests with a common prefix share blocks.")
    ranks_per_node: int = _setting(
        0,
        "Consecutive ranks that count as one node, for hierarchical dispatch and the choice of "
        "copies; 0: those that were started on one.",
    )
    seed: int = _setting(0, "Seed of random weights.")
    timeout_s: float = _setting(60.0, "Longest wait for a rank that makes no progress, in seconds.")
    oversubscribe: bool = _setting(False, "Allow more than 32 local ranks per core.")
    on_failure: OnFailure = _setting(
        "stop",
        "When a rank dies, hangs or fails. replace: a new process takes its place, and no request "
        "is lost; shrink: a smaller layout serves until then, where possible; stop: all ranks end.",
    )
    rejoin_s: float = _setting(
        300.0,
        "On several nodes, where lost ranks are replaced: how long to wait for a lost node, in "
        "seconds; 0: all ranks end at once.",
    )
    cpu_isa: CpuIsa | None = _setting(
        None,
        "Largest instruction set that kernels on CPUs may use; amx only if asked for.",
        "EXPERTLANE_CPU_ISA, else the best that the CPU has",
    )
    ignore_unused_tensors: bool = _setting(
        False,
        "Continue, with a warning, if the checkpoint holds tensors that its config.json does not "
        "use.",
    )
    record_routing: bool = _setting(
        False,
        "Keep which experts each token chooses; takes time in every step and memory with every "
        "token.",
    )
    check: CheckLevel = _setting(
        "off",
        "Check every step for silent errors. light: no NaN or infinite values, and ranks agree on "
        "replicated values; full: also, transfers arrive unchanged, and each token is computed "
        "once by each of its experts.",
    )

    def __post_init__(self) -> None:
        take_fields(self)

    @classmethod
    def of(cls, config: "EngineConfig | None" = None, **settings: Any) -> "EngineConfig":
        """A configuration from Python's arguments; a layout may be a text, and options None.

        Args:
            config: the defaults, unless given.
            settings: in place of its own.

        Raises:
            SpecError: a value is not valid.
            TypeError: there is no such setting.
        """
        if not isinstance(config, EngineConfig | None):
            raise SpecError(f"config is {shown(config)}; it must be an EngineConfig")
        known = [each.name for each in fields(cls)]
        for name in settings:
            if name not in known:
                hint = did_you_mean(name, known)
                raise TypeError(f"{shown(name)} is no setting of an engine; {hint}".rstrip("; "))
        if "layout" in settings:
            settings["layout"] = as_layout(settings["layout"])
        if "options" in settings:
            settings["options"] = _as_options(settings["options"])
        return replace(config or cls(), **settings)

    @property
    def deployment(self) -> Deployment:
        """Its layout and options, under a name."""
        return Deployment("llm", self.layout, self.options)


SETTINGS = {each.name: each for each in fields(EngineConfig)}


def sentence_of(name: str) -> str:
    """The sentence of a setting."""
    sentence: str = SETTINGS[name].metadata["sentence"]
    return sentence


def _described(name: str) -> str:
    none = SETTINGS[name].metadata["none"]
    return f"    {name}: {sentence_of(name)}" + (f" None: {none}." if none else "")


_ATTRIBUTES = "\n    ".join(map(_described, SETTINGS))
EngineConfig.__doc__ = f"{EngineConfig.__doc__}\n    Attributes:\n    {_ATTRIBUTES}\n    "


def as_layout(layout: str | Layout) -> Layout:
    """Parse a layout, unless it is one.

    Raises:
        SpecError: as `Layout.parse`.
    """
    if isinstance(layout, Layout):
        return layout
    if not isinstance(layout, str):
        raise SpecError(f"layout is {shown(layout)}; it must be a text, such as 'tp=2,ep=2'")
    return Layout.parse(layout)


def _as_options(options: Options | None) -> Options:
    if options is None:
        return Options()
    if not isinstance(options, Options):
        raise SpecError(f"options is {shown(options)}; it must be Options(…), or None")
    return options
