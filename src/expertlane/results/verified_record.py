"""The finding of `expertlane verify`: part of a results file."""

from dataclasses import dataclass, field
from typing import Literal

from expertlane.spec.ranges import Strict

Verdict = Literal["same", "differs", "can't tell"]
Against = Literal["reference", "alone"]
DtypeSource = Literal["told", "checkpoint", "seen"]


@dataclass(frozen=True)
class ConditionRecord(Strict):
    """Tokens that were asked for under one condition, and their differences in nats.

    Attributes:
        name: such as `alone` or `16 at once`.
        against: what they are compared with: the reference, or the same tokens alone.
        median, p99, largest: of the sizes of differences.
        rounding, rounding_p99: median and 99 % quantile of what rounding makes of the same tokens.
        share_off: share of tokens that are more than eight times rounding's scale apart.
        alarms: names of the tests that say that they differ beyond rounding.
    """

    name: str
    against: Against
    num_prompts: int
    num_tokens: int
    median: float
    p99: float
    largest: float
    rounding: float
    rounding_p99: float = 0.0
    share_off: float = 0.0
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True)
class SignificanceRecord(Strict):
    """A statistical test.

    Attributes:
        condition: name of the condition.
        name: of the test.
        what: its group of tokens, as an expert's or a range of positions; empty for all.
        statistic: as `endpoint.statistics` defines it.
        p_value: bound on the chance of as much where a server only rounds.
    """

    condition: str
    name: str
    what: str
    statistic: float
    p_value: float


@dataclass(frozen=True)
class TokenRecord(Strict):
    """A token whose log-probability is far off.

    Attributes:
        prompt, position: index of its prompt, and its own there.
        expected: log-probability of the reference, or alone.
        scale: of rounding, in nats.
    """

    condition: str
    prompt: int
    position: int
    token_id: int
    server: float
    expected: float
    scale: float


@dataclass(frozen=True)
class ExpertRecord(Strict):
    """An expert that is over-represented among tokens that are off.

    Attributes:
        layer: index among layers with experts.
        inside, outside: median size of differences of its tokens, and of the others, in nats.
        p_value: with all experts counted.
    """

    layer: int
    expert: int
    num_tokens: int
    inside: float
    outside: float
    p_value: float


@dataclass(frozen=True)
class LayerExperts(Strict):
    """Some experts of a layer; `layer` is its index among layers with experts."""

    layer: int
    experts: tuple[int, ...]


@dataclass(frozen=True)
class CoverageRecord(Strict):
    """Which experts of the reference the prompts chose.

    Attributes:
        num_layers: layers with experts.
        num_experts: of all layers.
        wanted: choices of each expert that prompts were looked for to make.
        num_rare: experts that are chosen, but less often.
        unreached: by layer those that no prompt chose: nothing is known of them.
        moe_layers: [num_layers], the decoder's indices of layers with experts.
    """

    num_layers: int
    num_experts: int
    wanted: int
    num_rare: int = 0
    unreached: tuple[LayerExperts, ...] = ()
    moe_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class VerifiedRecord(Strict):
    """Whether a server computes the model that it claims.

    Attributes:
        url, software, model: of the server; software by its own account, may be empty.
        reference: the checkpoint's folder, or the second server.
        dtype: number type whose rounding is granted.
        dtype_source: who said so: the user, the checkpoint, or that the server rounds far less.
        is_measured: whether that rounding was measured, else it is a usual one.
        method: how the server tells log-probabilities.
        why: the likely cause, or why it can't be told; sentences.
        position: the first position of contexts that are off, where shorter ones are not.
        ranks: data-parallel ranks that are off, where others are not.
        least_seen, least_seen_expert: the least error, in nats, that would have been seen: of all
            tokens, and of those of an expert of usual popularity; None where none would.
        alarm: chance below which a test is an alarm; all of a run together have `false_alarms`.
        num_excused: prompts that were left out from a near tie of a router on.
        coverage: which experts the prompts reached; None where only a checkpoint would tell.
        skipped: what could not be asked, and why.
        wall_s: time of the whole.
    """

    verdict: Verdict
    url: str
    software: str
    model: str
    reference: str
    dtype: str
    dtype_source: DtypeSource
    is_measured: bool
    method: str
    why: tuple[str, ...]
    conditions: tuple[ConditionRecord, ...]
    tests: tuple[SignificanceRecord, ...] = field(default=(), repr=False)
    worst: tuple[TokenRecord, ...] = ()
    experts: tuple[ExpertRecord, ...] = ()
    position: int | None = None
    ranks: tuple[int, ...] = ()
    least_seen: float | None = None
    least_seen_expert: float | None = None
    alarm: float = 0.0
    false_alarms: float = 0.0
    num_excused: int = 0
    coverage: CoverageRecord | None = None
    skipped: tuple[str, ...] = ()
    wall_s: float = 0.0
