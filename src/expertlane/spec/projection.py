"""Options of projections: a command's, and those in an experiment's table `[projection]`."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from expertlane.errors import SpecError, naming
from expertlane.spec.names import CacheType, GpuExecution, NumberType
from expertlane.spec.ranges import RANGES, Strict, shown, take
from expertlane.spec.slo import SLO, parse_slos
from expertlane.spec.workload import LengthRange, Load, Workload

_PATHS = "routing_trace", "requests"


@dataclass(frozen=True, kw_only=True)
class _OnCluster(Strict):
    """A modelled cluster, and how the model runs on it.

    Attributes:
        skew: None for the default with its bounds.
        routing_trace: path of the file.
    """

    cluster: str
    framework: str | None = None
    skew: float | None = None
    routing_trace: str | None = None
    execution: GpuExecution = "graph"


@dataclass(frozen=True, kw_only=True)
class ProjectionAsked(_OnCluster):
    """Options of a projection beside its workload, as on the command line.

    Attributes:
        mtp: draft tokens per step.
    """

    mtp: int = 0
    mtp_acceptance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Projection(_OnCluster):
    """Options of an experiment's projection; runs on real ranks ignore them.

    Attributes:
        slo: limits, as `--slo` takes them.
        dtype: number type of weights; None for the checkpoint's own.
        kv_dtype: number type of keys and values.
        prompt_len, output_len: lengths in place of the workload's, as `--prompt-len` takes them.
        requests: path of recorded requests, whose lengths are taken.
        prefix_len, num_prefixes: shared prefixes, as `--prefix-len` and `--num-prefixes` take them.
        num_running: by deployment, concurrent sequences of the whole system; fewer where they miss
            a limit. Deployments not named run as many as the limits allow.

    Raises:
        UserError: a value is out of its range, or two exclude each other.
    """

    slo: str | None = None
    dtype: NumberType | None = None
    kv_dtype: CacheType = "model"
    prompt_len: str | None = None
    output_len: str | None = None
    requests: str | None = None
    prefix_len: int = 0
    num_prefixes: int = 1
    num_running: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with naming("projection"):
            self._check()

    def _check(self) -> None:
        if self.skew is not None:
            take("skew", self.skew)
        if self.skew is not None and self.routing_trace is not None:
            raise SpecError("skew and routing_trace exclude each other")
        if self.requests is not None and (self.prompt_len or self.output_len or self.prefix_len):
            raise SpecError("requests has lengths; leave out prompt_len, output_len and prefix_len")
        for name in ("prompt_len", "output_len"):
            self._range(name, 1)
        for name, num in self.num_running.items():
            take("num_sequences", num, f"num_running of {name!r}")
        _ = self.slos

    @property
    def slos(self) -> tuple[SLO, ...]:
        """The limits."""
        return () if self.slo is None else parse_slos([self.slo], "slo")

    def _range(self, name: str, mean: int) -> LengthRange:
        """A range of lengths that is given, else the workload's mean.

        Raises:
            SpecError: it is no range of lengths.
        """
        text = getattr(self, name)
        found = LengthRange(mean, mean) if text is None else LengthRange.parse(name, text)
        if found is None:
            raise SpecError(
                f"{name} is {shown(text)}; it must be {RANGES[name]}, or two, the lower one "
                'first: "32:512"'
            )
        return found

    def load(self, workload: Workload) -> Load | None:
        """The lengths that are served in a closed loop; None for those of the workload.

        Raises:
            UserError: the file of requests cannot be read.
        """
        num = workload.num_sequences
        if self.requests is not None:
            from expertlane.spec.request_file import read_requests

            # Lengths are drawn from them, so they may be fewer than sequences.
            return Load.of(read_requests(Path(self.requests)), num).of_lengths()
        if self.prompt_len is None and self.output_len is None and not self.prefix_len:
            return None
        prompt = self._range("prompt_len", workload.prompt_len)
        output = self._range("output_len", workload.output_len)
        return Load(
            num, prompt, output, num, prefix_len=self.prefix_len, num_prefixes=self.num_prefixes
        )

    def located(self, base: Path) -> "Projection":
        """The projection with absolute paths; `base` is where relative ones begin."""
        paths = {
            name: os.path.abspath(base / path)
            for name in _PATHS
            if (path := getattr(self, name)) is not None
        }
        profile, mark, count = self.cluster.rpartition("x")
        if profile.endswith(".toml"):
            paths["cluster"] = f"{os.path.abspath(base / profile)}{mark}{count}"
        return replace(self, **paths)
