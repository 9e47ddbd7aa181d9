"""Read a trace file of the torch profiler: its events, its annotated steps, and its work.

A trace is in Chrome's JSON format, as PyTorch writes it, plain or gzipped. Nothing in it is
executed.
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

from expertlane.comparison.traces.kernel_stages import HOST, StepBatch, batch_of, kernel_table
from expertlane.errors import UserError
from expertlane.spec.files import read_bytes
from expertlane.spec.names import Cause, Phase, Stage

MOST_BYTES = 768 * 2**20  # of a trace file, before and after decompression
_NS_PER_US = 1000
_MOST_NS = 2**61  # largest time, and largest base time: their sum fits into 64 bits
_MOST_US = _MOST_NS // _NS_PER_US
_GZIP = b"\x1f\x8b"
ANNOTATION = "user_annotation"


class _Args(msgspec.Struct, gc=False):
    correlation: Any = None
    ranks: Any = msgspec.field(name="Process Group Ranks", default=None)
    begun: Any = msgspec.field(name="expertlane begun", default=None)


class Event(msgspec.Struct, gc=False):
    """An event in Chrome's trace format; `ts` and `dur` are in microseconds."""

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
    """The parts of a trace file that are read.

    Attributes:
        base_ns: nanoseconds to add to the times of all events.
    """

    events: list[Event] = msgspec.field(name="traceEvents")
    base_ns: int = msgspec.field(name="baseTimeNanoseconds", default=0)
    distributed: _Distributed | None = msgspec.field(name="distributedInfo", default=None)


@dataclass(frozen=True)
class Work:
    """A kernel or operator that ran on a rank, or a piece of an operator.

    Attributes:
        cause: its stage; `Cause.HOST_GAPS` for work of the host, `Cause.UNKNOWN` if no stage was
            found, None if it is no inference (a backward pass).
        stream: number of its CUDA stream, in the order of first use; 0 on a CPU.
        transfer: True for communication between ranks.
        kind: of a transfer, the pattern in `kernels.toml` that matched: the same on all ranks.
        group: of a transfer, the ranks of its process group as the trace has them; else "".
        phase: the phase that its name says; else None.
        begun_ns: when the rank began the transfer, if it computed before it waited; else None.
    """

    start_ns: int
    end_ns: int
    name: str
    cause: Stage | Cause | None
    stream: int = 0
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
    """One step of one rank: start, end, and batch."""

    start_ns: int
    end_ns: int
    batch: StepBatch


def read_trace(path: Path) -> Trace:
    """Read a trace file of the torch profiler.

    Raises:
        UserError: the file cannot be read, is larger than `MOST_BYTES`, or is not a trace.
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
        if event.ph != "X":  # an event without a duration
            continue
        if not (abs(event.ts) <= _MOST_US and 0 <= event.dur <= _MOST_US):
            raise UserError(f"{path}: a time of {event.name[:80]!r} is out of range")
    return trace


def bounds(event: Event, base_ns: int) -> tuple[int, int]:
    """Start and end of an event, in nanoseconds; whole microseconds stay exact."""
    start_ns = base_ns + round(event.ts * _NS_PER_US)
    return start_ns, start_ns + round(event.dur * _NS_PER_US)


def begun_ns(event: Event, base_ns: int) -> int | None:
    """When the transfer of an annotation began, where the trace says it; in nanoseconds."""
    begun = None if event.args is None else event.args.begun
    if not isinstance(begun, int | float) or not abs(begun) <= _MOST_US:
        return None
    return base_ns + round(begun * _NS_PER_US)


@dataclass(frozen=True)
class AnnotatedStep:
    """A step's annotation: when the host began and ended the step, and on which thread.

    Attributes:
        thread: process and thread id.
    """

    start_ns: int
    end_ns: int
    batch: StepBatch
    thread: tuple[int | str, int | str]


def annotated_steps(events: Iterable[Event], base_ns: int, category: str) -> list[AnnotatedStep]:
    """The annotated steps of a trace, in order.

    Engines annotate steps at several levels. Only the first source in `kernels.toml` that matches
    any annotation counts, and of nested annotations only the outermost.

    Args:
        category: `cat` of the events to look at.
    """
    found: dict[str, list[AnnotatedStep]] = defaultdict(list)
    lines = kernel_table().steps
    for event in events:
        if event.cat != category:
            continue
        for line in lines:
            if (batch := batch_of(line, event.name)) is not None:
                thread = (event.pid, event.tid)
                found[line.source].append(AnnotatedStep(*bounds(event, base_ns), batch, thread))
                break
    sources = dict.fromkeys(line.source for line in lines)
    of_first = next((found[source] for source in sources if found[source]), [])
    steps: list[AnnotatedStep] = []
    for step in sorted(of_first, key=lambda step: (step.start_ns, -step.end_ns)):
        if not steps or step.start_ns >= steps[-1].end_ns:
            steps.append(step)
    return steps


def cause_of(stage: Stage | None) -> Stage | Cause:
    """The cause that a kernel of a stage counts as; `Cause.UNKNOWN` without a stage."""
    if stage is None:
        return Cause.UNKNOWN
    return Cause.HOST_GAPS if stage is HOST else stage


def split_into_steps(work: Sequence[Work]) -> list[Span]:
    """Split a trace without annotations into steps.

    Between the attention kernels of two steps there are kernels of the head, the sampler or the
    embedding. The next step begins after the longest pause among them. A trace without such kernels
    is one step.
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
    """Start of the kernel after the longest pause next to a kernel of head or embedding."""
    pauses = [
        (later.start_ns - earlier.end_ns, -at, later.start_ns)
        for at, (earlier, later) in enumerate(pairwise(run))
        if earlier.cause in (Stage.HEAD, Stage.EMBED) or later.cause in (Stage.HEAD, Stage.EMBED)
    ]
    return max(pauses)[2]


def _phase_of(work: Sequence[Work], start_ns: int, end_ns: int) -> Phase | None:
    """The phase that the kernels of a step name; None if they name none, or both."""
    told = {each.phase for each in work if start_ns <= each.start_ns < end_ns and each.phase}
    return told.pop() if len(told) == 1 else None
