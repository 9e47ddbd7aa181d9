"""A server's behaviour while one part of it was killed or stopped: part of a deployment's record.

Times are seconds after the fault, so that those before it are negative.
"""

from dataclasses import dataclass, field
from typing import Literal

from expertlane.spec.ranges import Strict

# By name, what it says of requests; the worst first. One request has one of them.
OUTCOMES: dict[str, str] = {
    "failed": "failed before a token",
    "hung": "hung",
    "cut": "cut short",
    "repeated": "tokens repeated",
    "dropped": "tokens left out",
    "changed": "tokens changed",
    "ill-formed": "counted wrongly",
    "tie": "another token of a tie",
    "as before": "as before the fault",
}
LOST = ("failed", "hung", "cut")
ALTERED = ("repeated", "dropped", "ill-formed")  # whatever rounding does
Compared = Literal["token ids", "text"]
LeftKind = Literal["process", "port", "shared memory"]


@dataclass(frozen=True)
class OutcomeRecord(Strict):
    """Requests with one outcome.

    Attributes:
        name: a key of `OUTCOMES`.
        num_under_way: of those that had been sent, and had not ended, at the fault.
        num_later: of those that were sent after it.
        first_s: when the first of them ended.
        example: what was wrong with the first of them; may be empty.
    """

    name: str
    num_under_way: int = 0
    num_later: int = 0
    first_s: float | None = None
    example: str = ""

    @property
    def num(self) -> int:
        """All requests with it."""
        return self.num_under_way + self.num_later


@dataclass(frozen=True)
class ChangesRecord(Strict):
    """Changed tokens beside those of undisturbed runs.

    Attributes:
        compared: what answers are compared by.
        num_prompts: different prompts, each asked for again and again.
        num_undisturbed: answers before the fault that are compared with the first one of their
            prompt.
        num_undisturbed_changed, num_undisturbed_ties: those of them that differ, by more than a tie
            and by a tie.
        undisturbed_high: upper end of the 90 % interval of their share.
        tie_nats: a change is a tie if the likeliest two tokens at its place differ by less in
            log-probability; None where the server tells none.
        num_prompts_before, num_prompts_after: prompts with a changed answer, ties aside, before and
            after the fault, of `num_prompts` and of `num_prompts_asked_after`.
        p_value: probability of as many after the fault if it had no influence (Fisher's exact test,
            one-sided); None without answers.
        is_beyond: whether they are more than undisturbed runs explain.
    """

    compared: Compared = "text"
    num_prompts: int = 0
    num_undisturbed: int = 0
    num_undisturbed_changed: int = 0
    num_undisturbed_ties: int = 0
    undisturbed_high: float = 1.0
    tie_nats: float | None = None
    num_prompts_before: int = 0
    num_prompts_after: int = 0
    num_prompts_asked_after: int = 0
    p_value: float | None = None
    is_beyond: bool = False


@dataclass(frozen=True)
class HealthRecord(Strict):
    """Answers of `/health`, and how long it was wrong.

    Attributes:
        asked_s, statuses: [num_samples]; HTTP status of each answer, 0 for none in time.
        well_but_silent_s: longest time in which it said 200 while no request got a token.
        ill_but_well_s: longest time in which it said something else while all was well.
        is_known: false where the server has no such route.
    """

    asked_s: tuple[float, ...] = field(default=(), repr=False)
    statuses: tuple[int, ...] = field(default=(), repr=False)
    well_but_silent_s: float = 0.0
    ill_but_well_s: float = 0.0
    is_known: bool = False


@dataclass(frozen=True)
class LeftRecord(Strict):
    """Something of the server's processes that is there at the end and serves nobody.

    Attributes:
        what: a process with its number and title, a port, or a file in /dev/shm.
        num_bytes: of shared memory.
    """

    kind: LeftKind
    what: str
    num_bytes: int = 0


@dataclass(frozen=True)
class TimelineRecord(Strict):
    """The load in bins of equal length.

    Attributes:
        begins_s: [num_bins]; begin of each.
        bin_s: length of each.
        tps: tokens a second.
        num_errors: requests that ended lost.
        ttft_s: median time to the first token of requests sent in it; None where none got one.
        pause_s: longest time between two tokens of one request that ends in it, or goes on.
    """

    begins_s: tuple[float, ...] = field(default=(), repr=False)
    bin_s: float = 0.0
    tps: tuple[float, ...] = field(default=(), repr=False)
    num_errors: tuple[int, ...] = field(default=(), repr=False)
    ttft_s: tuple[float | None, ...] = field(default=(), repr=False)
    pause_s: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class DrillRecord(Strict):
    """A fault under load, and what came of it.

    Attributes:
        fault: what was killed or stopped, in words.
        exit_code: of a command; None for a signal.
        fault_s: seconds that the command took.
        printed: the end of what it printed.
        observed_s: seconds that were watched after the fault.
        hang_s: a request without a token for so long has hung.
        health_s: `/health` may be wrong for so long.
        tps_before: tokens a second before the fault.
        full_tps: what counts as the full rate.
        full_rate_s: since when it was full again; 0 where it never fell, None if it never was.
        usual_pause_s: longest time without a token of any request before the fault.
        pause_s: longest time without a token of any request after it.
        last_token_s: when the last token came; None where none came after the fault.
        first_lost_s: when the first request was lost; None where none was.
        num_unanswered: requests that were still answered at the end, and are not judged.
        is_local: whether the server's processes run on this machine, so that `left` is known.
        is_running: whether the server took a connection at the end.
        left: what was left behind; of a server that was started here, also after it was ended.
        why_failed: the criteria that it fails, each in a sentence; empty if it passes.
        cautions: sentences on what keeps this from being sure.
    """

    fault: str = ""
    exit_code: int | None = None
    fault_s: float = 0.0
    printed: str = ""
    observed_s: float = 0.0
    hang_s: float = 0.0
    health_s: float = 0.0
    tps_before: float = 0.0
    full_tps: float = 0.0
    full_rate_s: float | None = None
    usual_pause_s: float = 0.0
    pause_s: float = 0.0
    last_token_s: float | None = None
    first_lost_s: float | None = None
    num_unanswered: int = 0
    outcomes: tuple[OutcomeRecord, ...] = ()
    changes: ChangesRecord = field(default_factory=ChangesRecord)
    health: HealthRecord = field(default_factory=HealthRecord)
    is_local: bool = False
    is_running: bool = False
    left: tuple[LeftRecord, ...] = ()
    timeline: TimelineRecord = field(default_factory=TimelineRecord)
    why_failed: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

    @property
    def is_failed(self) -> bool:
        """True if the server fails one of the criteria."""
        return bool(self.why_failed)

    def num_of(self, *names: str) -> int:
        """Requests with one of these outcomes."""
        return sum(each.num for each in self.outcomes if each.name in names)
