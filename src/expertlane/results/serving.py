"""What a load on an engine gave, as typed values: the `results.json` of `expertlane bench`.

Apart from a comparison, whose deployments have phases, causes and traffic that nobody records
under an open load.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from expertlane.results.layout_sizes import LayoutSizes
from expertlane.results.schema import Versions
from expertlane.results.strict import Strict
from expertlane.spec.deployment import Options

SCHEMA_VERSION = 2
KIND = "bench"


@dataclass(frozen=True)
class Spread(Strict):
    """Of many values."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None of no values."""
        if not values:
            return None
        return cls(float(np.mean(values)), *map(float, np.percentile(values, [50, 95, 99])))


@dataclass(frozen=True)
class Point(Strict):
    """What was measured under one load.

    Attributes:
        wall_s: from the first request's due time to the last token.
        ttft_s: from a request's due time to its first token.
        tpot_s: of each request, the mean time of a token after the first; None where none has two.
        itl_s: all times between successive tokens of a request; None likewise.
        e2e_s: from a request's due time to its last token.
        total_tps: prompt and output tokens a second.
        prefill_tps: prompt tokens over the time until every request has its first token, decodes
            in between included; None unless all requests were there at once.
    """

    layout: LayoutSizes
    batch: int | None
    rate: float | None
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_preemptions: int
    wall_s: float
    ttft_s: Spread
    tpot_s: Spread | None
    itl_s: Spread | None
    e2e_s: Spread
    output_tps: float
    total_tps: float
    requests_per_s: float
    prefill_tps: float | None


@dataclass(frozen=True)
class ServingMachine(Strict):
    """Where it ran.

    Attributes:
        device: `cpu`, or the name of the accelerator.
        num_cores: cores the ranks may use, of all hosts.
        backend: of the collectives, for example `gloo`.
        dtype: of weights and activations.
        kernels: what computes: `expertlane` for our own CPU kernels, else `torch`, with the reason
            where ours would have been better.
    """

    cpu_name: str
    device: str
    num_cores: int
    memory_bytes: int
    backend: str
    dtype: str
    kernels: str

    def is_oversubscribed_by(self, num_ranks: int) -> bool:
        """Whether so many ranks share cores that each of them needs for its computations."""
        return self.device == "cpu" and num_ranks > self.num_cores


@dataclass(frozen=True)
class ServingResults(Strict):
    """All of one file.

    Attributes:
        command: how a user repeats it.
        created: ISO 8601, UTC.
        model: as the user named it.
        options: of every layout.
        ranks_per_node: as the user gave it; 0 for as many as were started on each.
        prompt_len, output_len: `32`, or `32:512` for lengths drawn from a range.
        foreign_cpu_share: of the host's cores, what other processes used while it ran.
    """

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    kind: Literal["bench"] = field(default="bench", kw_only=True)
    command: str
    created: str
    versions: Versions
    machine: ServingMachine
    model: str
    options: Options
    ranks_per_node: int
    seed: int
    prompt_len: str
    output_len: str
    points: tuple[Point, ...]
    foreign_cpu_share: float
