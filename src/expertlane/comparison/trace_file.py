"""A file of the torch profiler: its events, the annotations of its steps, and what ran in them.

A trace is Chrome's JSON as PyTorch writes it, plain or gzipped. Nothing of it is executed.
"""

import gzip
import io
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from expertlane.comparison.kernel_stages import HOST, StepBatch, batch_of, kernel_table
from expertlane.errors import UserError
from expertlane.spec.files import read_bytes
from expertlane.spec.names import Cause, Phase, Stage

MOST_BYTES = 768 * 2**20  # of a trace, decompressed too
_NS_PER_US = 1000
_MOST_NS = 2**61  # of a time and what it is counted from: their sum fits into 64 bits
_MOST_US = _MOST_NS // _NS_PER_US
_GZIP = b"\x1f\x8b"
ANNOTATION = "user_annotation"


class _Args(msgspec.Struct, gc=False):
    correlation: Any = None
    ranks: Any = msgspec.field(name="Process Group Ranks", default=None)
    begun: Any = msgspec.field(name="expertlane begun", default=None)


class Event(msgspec.Struct, gc=False):
    """An event as Chrome's format has it; times in microseconds."""

    ph: str = ""
    cat: str = ""
    name: str = ""
    pid: int | str = 0
    tid: int | str = 0
    ts: int | float = 0
    dur: int | float = 0
    args: _Args | None = None


class _Distributed(msgspec.Struct):
    rank: int | None = None
    world_size: int | None = None


class Trace(msgspec.Struct):
    """The parts of a trace that are read.

    Attributes:
        base_ns: what events' times are counted from.
    """

    events: list[Event] = msgspec.field(name="traceEvents")
    base_ns: int = msgspec.field(name="baseTimeNanoseconds", default=0)
    distributed: _Distributed | None = msgspec.field(name="distributedInfo", default=None)


@dataclass(frozen=True)
class Work:
    """A stretch in which one kernel or operator ran.

    Attributes:
        cause: its stage; `Cause.HOST_GAPS` for the host's own work, `Cause.UNKNOWN`, or None for
            what is no inference.
        lane: its stream, by the order of first use; 0 on a CPU.
        kind: for `transfer` the line of the table, which is the same on all ranks.
        transfer: ranks meet in it.
        group: ranks that meet, as the trace names them; "" where it doesn't.
        begun_ns: when the rank began the transfer, where it computed before it waited; else None.
    """

    start_ns: int
    end_ns: int
    name: str
    cause: Stage | Cause | None
    lane: int = 0
    transfer: bool = False
    kind: str = ""
    group: str = ""
    phase: Phase | None = None
    begun_ns: int | None = None

    @property
    def entered_ns(self) -> int:
        """When the rank entered the transfer, so that others waited for it no longer."""
        return self.start_ns if self.begun_ns is None else self.begun_ns


@dataclass(frozen=True)
class Span:
    """A step of one rank: when it ran, and what its annotation says of its batch."""

    start_ns: int
    end_ns: int
    batch: StepBatch


def read_trace(path: Path) -> Trace:
    """Read a file of the torch profiler.

    Raises:
        UserError: it can't be read, is too large, or no trace.
    """
    data = read_bytes(path, MOST_BYTES)
    if data.startswith(_GZIP):
        try:
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(MOST_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: its gzip is broken: {error}") from None
        if len(data) > MOST_BYTES:
            raise UserError(
                f"{path}: more than {MOST_BYTES:,} bytes decompressed; profile fewer steps"
            )
    try:
        trace = msgspec.json.decode(data, type=Trace)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is no trace of the torch profiler: {error}; valid: Chrome's JSON with "
            "traceEvents, plain or gzipped"
        ) from None
    if abs(trace.base_ns) > _MOST_NS:
        raise UserError(f"{path}: baseTimeNanoseconds is out of range")
    for event in trace.events:
        if event.ph != "X":  # no stretch of time
            continue
        if not (abs(event.ts) <= _MOST_US and 0 <= event.dur <= _MOST_US):
            raise UserError(f"{path}: a time of {event.name[:80]!r} is out of range")
    return trace


def bounds(event: Event, base_ns: int) -> tuple[int, int]:
    """Start and end in nanoseconds; a whole number of microseconds stays exact."""
    start_ns = base_ns + round(event.ts * _NS_PER_US)
    return start_ns, start_ns + round(event.dur * _NS_PER_US)


def begun_ns(event: Event, base_ns: int) -> int | None:
    """When the transfer of an annotation began, where the trace says it; in nanoseconds."""
    begun = None if event.args is None else event.args.begun
    if not isinstance(begun, int | float) or not abs(begun) <= _MOST_US:
        return None
    return base_ns + round(begun * _NS_PER_US)


@dataclass(frozen=True)
class BegunStep:
    """A step's annotation on the host's clock."""

    start_ns: int
    end_ns: int
    batch: StepBatch
    thread: tuple[int | str, int | str]


def begun_steps(events: Iterable[Event], base_ns: int, category: str) -> list[BegunStep]:
    """Annotations of steps, in order, of the first line in the table that matches any.

    Annotations of one line inside one another count once; SGLang's lines count together.
    """
    found: dict[str, list[BegunStep]] = defaultdict(list)
    lines = kernel_table().steps
    for event in events:
        if event.cat != category:
            continue
        for line in lines:
            if (batch := batch_of(line, event.name)) is not None:
                thread = (event.pid, event.tid)
                found[line.source].append(BegunStep(*bounds(event, base_ns), batch, thread))
                break
    sources = dict.fromkeys(line.source for line in lines)
    of_first = next((found[source] for source in sources if found[source]), [])
    steps: list[BegunStep] = []
    for step in sorted(of_first, key=lambda step: (step.start_ns, -step.end_ns)):
        if not steps or step.start_ns >= steps[-1].end_ns:
            steps.append(step)
    return steps


def cause_of(stage: Stage | None) -> Stage | Cause:
    """The cause of a stage that was found, or was not."""
    if stage is None:
        return Cause.UNKNOWN
    return Cause.HOST_GAPS if stage is HOST else stage


def recurring(work: Sequence[Work]) -> list[Span]:
    """Steps of a trace without annotations: cut where embedding and head come round again.

    Between the attention of one step and that of the next there are kernels of the head, the
    sampler or the embedding; the border is the longest pause among them. A trace without any is one
    step.
    """
    if not work:
        return []
    edges = [work[0].start_ns]
    run: list[Work] = []  # since the last attention kernel
    has_ends = has_attention = False
    for each in work:
        if each.cause is Stage.ATTENTION:
            if has_attention and has_ends:
                edges.append(_longest_pause([*run, each]))
            has_attention, has_ends, run = True, False, [each]
        else:
            run.append(each)
            has_ends = has_ends or each.cause in (Stage.HEAD, Stage.EMBED)
    ends = [*edges[1:], max(each.end_ns for each in work)]
    return [
        Span(start_ns, end_ns, StepBatch(_phase_of(work, start_ns, end_ns)))
        for start_ns, end_ns in zip(edges, ends, strict=True)
        if end_ns > start_ns
    ]


def _longest_pause(run: Sequence[Work]) -> int:
    """When the kernel after the longest pause among the head's kernels begins."""
    pauses = [
        (later.start_ns - earlier.end_ns, -at, later.start_ns)
        for at, (earlier, later) in enumerate(pairwise(run))
        if earlier.cause in (Stage.HEAD, Stage.EMBED) or later.cause in (Stage.HEAD, Stage.EMBED)
    ]
    return max(pauses)[2]


def _phase_of(work: Sequence[Work], start_ns: int, end_ns: int) -> Phase | None:
    """The phase that kernels of attention tell; None where they don't."""
    told = {each.phase for each in work if start_ns <= each.start_ns < end_ns and each.phase}
    return told.pop() if len(told) == 1 else None
