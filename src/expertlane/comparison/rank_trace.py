"""One rank's trace of the torch profiler: its steps, and what ran in them.

A trace is Chrome's JSON as PyTorch writes it, plain or gzipped. Where it has kernels of a GPU, what
ran are kernels and copies on streams, each of the step and the annotation in which it was
launched. Where it has none, they are the operators of the thread that runs the steps, each without
the operators inside it.
"""

import gzip
import io
import re
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from expertlane.comparison.kernel_stages import (
    HOST,
    Kind,
    Known,
    Place,
    Region,
    StepBatch,
    batch_of,
    kernel_table,
    stages_of,
)
from expertlane.errors import UserError
from expertlane.spec.files import read_bytes
from expertlane.spec.names import Cause, Phase, Stage

MOST_BYTES = 768 * 2**20  # of a trace, decompressed too
_MOST_DEPTH = 400  # of operators in one another
_NS_PER_US = 1000
_MOST_US = 2**62 // _NS_PER_US  # of a time, so that it fits into 64 bits as nanoseconds
_NEVER_NS = 2**63 - 1
_GZIP = b"\x1f\x8b"
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ANNOTATION, _ON_GPU_ANNOTATION, _OPERATOR = "user_annotation", "gpu_user_annotation", "cpu_op"
# Names of trace files: vLLM's `…dp0_pp0_tp1_…`, SGLang's `…-TP-1-DP-0-PP-0.trace.json.gz`.
_AXES = {
    axis: re.compile(rf"(?:^|[^a-z]){axis}[-_]?(?:rank[-_]?)?(\d+)(?!\d)", re.I)
    for axis in ("dp", "pp", "tp")
}
_RANK = re.compile(r"(?:^|[^a-z])rank[-_]?(\d+)(?!\d)", re.I)


class _Args(msgspec.Struct, gc=False):
    correlation: Any = None
    ranks: Any = msgspec.field(name="Process Group Ranks", default=None)


class _Event(msgspec.Struct, gc=False):
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


class _Trace(msgspec.Struct):
    events: list[_Event] = msgspec.field(name="traceEvents")
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


@dataclass(frozen=True)
class Span:
    """A step of one rank: when it ran, and what its annotation says of its batch."""

    start_ns: int
    end_ns: int
    batch: StepBatch


@dataclass(frozen=True, eq=False)
class RankTrace:
    """What a rank's trace has.

    Attributes:
        axes: coordinates of the rank, as far as the file's name has them: dp, pp, tp.
        spans: its steps, in order; they don't overlap.
        work: by `start_ns`.
    """

    path: Path
    rank: int
    axes: dict[str, int]
    on_gpu: bool
    spans: tuple[Span, ...]
    work: tuple[Work, ...]


def read_rank_trace(path: Path, place: int) -> RankTrace:
    """Read a rank's trace.

    Args:
        place: the rank's number where neither the trace nor the file's name has one.

    Raises:
        UserError: it can't be read, is too large, no trace of the torch profiler, or has neither
            kernels nor operators.
    """
    trace = _decode(path)
    events = [event for event in trace.events if event.ph == "X"]
    for event in events:
        if not (abs(event.ts) <= _MOST_US and 0 <= event.dur <= _MOST_US):
            raise UserError(f"{path}: a time of {event.name[:80]!r} is out of range")
    on_gpu = any(event.cat == "kernel" for event in events)
    read = _of_gpu if on_gpu else _of_cpu
    spans, work = read(events, trace.base_ns)
    if not spans:
        raise UserError(
            f"{path} has neither kernels nor operators in its steps; valid: a trace of the torch "
            "profiler, taken of a rank while it served requests"
        )
    known = trace.distributed.rank if trace.distributed else None
    named = _RANK.search(path.name)
    rank = known if known is not None else int(named[1]) if named else place
    axes = {
        axis: int(found[1]) for axis, each in _AXES.items() if (found := each.search(path.name))
    }
    return RankTrace(path, rank, axes, on_gpu, tuple(spans), tuple(work))


def _decode(path: Path) -> _Trace:
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
        return msgspec.json.decode(data, type=_Trace)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is no trace of the torch profiler: {error}; valid: Chrome's JSON with "
            "traceEvents, plain or gzipped"
        ) from None


def _bounds(event: _Event, base_ns: int) -> tuple[int, int]:
    """Start and end in nanoseconds; a whole number of microseconds stays exact."""
    start_ns = base_ns + round(event.ts * _NS_PER_US)
    return start_ns, start_ns + round(event.dur * _NS_PER_US)


@dataclass(frozen=True)
class _Begun:
    """A step's annotation on the host's clock."""

    start_ns: int
    end_ns: int
    batch: StepBatch
    thread: tuple[int | str, int | str]


def _begun_steps(events: Iterable[_Event], base_ns: int, category: str) -> list[_Begun]:
    """Annotations of steps, in order, of the first line in the table that matches any.

    Annotations of one line inside one another count once; SGLang's lines count together.
    """
    found: dict[str, list[_Begun]] = defaultdict(list)
    lines = kernel_table().steps
    for event in events:
        if event.cat != category:
            continue
        for line in lines:
            if (batch := batch_of(line, event.name)) is not None:
                thread = (event.pid, event.tid)
                found[line.source].append(_Begun(*_bounds(event, base_ns), batch, thread))
                break
    sources = dict.fromkeys(line.source for line in lines)
    of_first = next((found[source] for source in sources if found[source]), [])
    steps: list[_Begun] = []
    for step in sorted(of_first, key=lambda step: (step.start_ns, -step.end_ns)):
        if not steps or step.start_ns >= steps[-1].end_ns:
            steps.append(step)
    return steps


@dataclass(eq=False)
class _Kernel:
    event: _Event
    start_ns: int
    end_ns: int
    lane: int
    launched_ns: int | None
    region: int = -1
    line: Region | None = None
    around: tuple[str, ...] = ()
    known: Known | None = None


def _of_gpu(events: Sequence[_Event], base_ns: int) -> tuple[list[Span], list[Work]]:
    launches = {
        event.args.correlation: event
        for event in events
        if event.cat in _LAUNCHES and event.args and event.args.correlation is not None
    }
    lanes: dict[tuple[int | str, int | str], int] = {}
    kernels = []
    for event in sorted((e for e in events if e.cat in _ON_GPU), key=lambda e: (e.ts, e.dur)):
        launch = launches.get(event.args.correlation) if event.args else None
        lane = lanes.setdefault((event.pid, event.tid), len(lanes))
        launched_ns = None if launch is None else _bounds(launch, base_ns)[0]
        kernels.append(_Kernel(event, *_bounds(event, base_ns), lane, launched_ns))
    _find_regions(kernels, events, base_ns)
    table = kernel_table()
    for kernel in kernels:
        kernel.known = table.kernel(kernel.event.name, kernel.around)
    work = _work_of(kernels)
    main = _main_lane(work)
    return _gpu_spans(kernels, work, events, base_ns, main), work


def _find_regions(kernels: Sequence[_Kernel], events: Sequence[_Event], base_ns: int) -> None:
    """Set the annotations around each kernel's launch, and the innermost that the table knows."""
    table = kernel_table()
    marks: list[tuple[int, int, int, Any]] = []  # time; annotations end, begin, then launches
    for number, event in enumerate(events):
        if event.cat == _ANNOTATION:
            start_ns, end_ns = _bounds(event, base_ns)
            marks += [(start_ns, 1, -end_ns, (number, event)), (end_ns, 0, 0, (number, event))]
    marks += [
        (kernel.launched_ns, 2, at, kernel)
        for at, kernel in enumerate(kernels)
        if kernel.launched_ns is not None
    ]
    open_now: dict[int, _Event] = {}
    for _, what, _, each in sorted(marks, key=lambda mark: mark[:3]):
        if what == 0:
            open_now.pop(each[0], None)
        elif what == 1:
            open_now[each[0]] = each[1]
        else:
            each.around = tuple(event.name for event in open_now.values())
            for number in reversed(open_now):
                if (line := table.region(open_now[number].name)) is not None:
                    each.region, each.line = number, line
                    break


def _work_of(kernels: Sequence[_Kernel]) -> list[Work]:
    """Kernels with their causes: by name, else by their place among those of one direction.

    Transfers on streams of their own are borders like any other.
    """
    causes: list[Stage | Cause | None] = [Cause.UNKNOWN] * len(kernels)
    of_inference = []
    for at, kernel in enumerate(kernels):
        if kernel.line is not None and kernel.line.backward:
            causes[at] = None
        else:
            of_inference.append(at)
    # Of two micro-batches at once, each annotation's kernels stay together.
    firsts: dict[int, int] = {}
    for at in of_inference:
        firsts.setdefault(kernels[at].region, kernels[at].start_ns)
    firsts.pop(-1, None)
    of_inference.sort(
        key=lambda at: (
            firsts.get(kernels[at].region, kernels[at].start_ns),
            kernels[at].region,
            kernels[at].start_ns,
        )
    )
    places = []
    for at in of_inference:
        known, line = kernels[at].known, kernels[at].line
        stage = known.of if known else None
        if line is not None and line.all and not (known and known.transfer):
            stage = line.of
        of_region = line.of if line is not None else None
        kind = known.kind if known else None
        exchange = known.exchange if known else False
        places.append(Place(stage, kind, kernels[at].region, of_region, exchange))
    for at, stage in zip(of_inference, stages_of(places), strict=True):
        causes[at] = _cause(stage)
    return [_stretch(kernel, cause) for kernel, cause in zip(kernels, causes, strict=True)]


def _cause(stage: Stage | None) -> Stage | Cause:
    if stage is None:
        return Cause.UNKNOWN
    return Cause.HOST_GAPS if stage is HOST else stage


def _stretch(kernel: _Kernel, cause: Stage | Cause | None) -> Work:
    known = kernel.known
    transfer = bool(known and known.transfer) and cause is not None
    ranks = kernel.event.args.ranks if kernel.event.args else None
    return Work(
        kernel.start_ns,
        kernel.end_ns,
        kernel.event.name,
        cause,
        kernel.lane,
        transfer,
        known.pattern if known and transfer else "",
        ranks if isinstance(ranks, str) else "",
        known.phase if known else None,
    )


def _main_lane(work: Sequence[Work]) -> int:
    """The stream that computes most: the critical one."""
    busy_ns: dict[int, int] = defaultdict(int)
    for each in work:
        busy_ns[each.lane] += 0 if each.transfer else each.end_ns - each.start_ns
    return max(busy_ns, key=lambda lane: (busy_ns[lane], -lane))


def _gpu_spans(
    kernels: Sequence[_Kernel],
    work: Sequence[Work],
    events: Sequence[_Event],
    base_ns: int,
    main: int,
) -> list[Span]:
    """The steps on the GPU's time line, from the kernels that each launched.

    A step begins when its annotation does, or when the step before it ends on the GPU, whichever is
    later; it ends with its last kernel on the critical stream. Kernels launched between two
    annotations (the sampler's) belong to the first.
    """
    begun = _begun_steps(events, base_ns, _ANNOTATION)
    launched = sum(kernel.launched_ns is not None for kernel in kernels)
    if not begun or 2 * launched < len(kernels):
        marked = _begun_steps(events, base_ns, _ON_GPU_ANNOTATION)
        return [Span(each.start_ns, each.end_ns, each.batch) for each in marked] or _recurring(work)
    starts = [step.start_ns for step in begun]
    bounds: dict[int, tuple[int, int]] = {}
    for kernel in kernels:
        if kernel.launched_ns is None or kernel.lane != main:
            continue
        step = bisect_right(starts, kernel.launched_ns) - 1
        if step >= 0:
            first, last = bounds.get(step, (kernel.start_ns, kernel.end_ns))
            bounds[step] = min(first, kernel.start_ns), max(last, kernel.end_ns)
    spans: list[Span] = []
    for step, (first_ns, last_ns) in sorted(bounds.items()):
        start_ns = min(first_ns, starts[step])
        if spans:
            start_ns = max(start_ns, spans[-1].end_ns)
        if last_ns > start_ns:
            spans.append(Span(start_ns, last_ns, begun[step].batch))
    return spans


def _recurring(work: Sequence[Work]) -> list[Span]:
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


@dataclass(eq=False)
class _Node:
    """An operator or annotation of a thread, with those inside it."""

    name: str
    start_ns: int
    end_ns: int
    is_annotation: bool
    inside: list["_Node"] = field(default_factory=list)
    known: Known | None = None
    ranks: str = ""


def _of_cpu(events: Sequence[_Event], base_ns: int) -> tuple[list[Span], list[Work]]:
    begun = _begun_steps(events, base_ns, _ANNOTATION)
    threads: dict[tuple[int | str, int | str], int] = defaultdict(int)
    for event in events:
        if event.cat == _OPERATOR:
            threads[event.pid, event.tid] += round(event.dur * _NS_PER_US)
    if not threads and not begun:
        return [], []
    main = begun[0].thread if begun else max(threads, key=lambda each: threads[each])
    roots = _nest(
        [e for e in events if e.cat in (_OPERATOR, _ANNOTATION) and (e.pid, e.tid) == main], base_ns
    )
    pieces = _Pieces()
    for root in roots:
        pieces.add(root, ())
    steps = [step for step in begun if step.thread == main]
    work = pieces.work([step.start_ns for step in steps])
    return _cpu_spans(steps, roots) if steps else _recurring(work), work


def _cpu_spans(begun: Sequence[_Begun], roots: Sequence[_Node]) -> list[Span]:
    """Steps from their annotations' begin to the end of the last operator before the next one."""
    spans = []
    starts = [step.start_ns for step in begun]
    ends = [step.end_ns for step in begun]
    for root in roots:
        step = bisect_right(starts, root.start_ns) - 1
        if step >= 0:
            ends[step] = max(ends[step], root.end_ns)
    for at, each in enumerate(begun):
        limit = starts[at + 1] if at + 1 < len(begun) else ends[at]
        end_ns = min(ends[at], limit)
        if end_ns > each.start_ns:
            spans.append(Span(each.start_ns, end_ns, each.batch))
    return spans


def _nest(events: Iterable[_Event], base_ns: int) -> list[_Node]:
    """One thread's events as a forest; what ends a little after its parent is cut there."""
    roots: list[_Node] = []
    stack: list[_Node] = []
    for event in sorted(events, key=lambda e: (e.ts, -e.dur)):
        start_ns, end_ns = _bounds(event, base_ns)
        while stack and stack[-1].end_ns <= start_ns:
            stack.pop()
        if stack:
            end_ns = min(end_ns, stack[-1].end_ns)
        ranks = event.args.ranks if event.args else None
        named = ranks if isinstance(ranks, str) else ""
        node = _Node(event.name, start_ns, end_ns, event.cat == _ANNOTATION, ranks=named)
        (stack[-1].inside if stack else roots).append(node)
        stack.append(node)
        if len(stack) > _MOST_DEPTH:
            raise UserError(f"operators are nested deeper than {_MOST_DEPTH} in a trace")
    return roots


@dataclass(eq=False)
class _Piece:
    """An operator or annotation without what runs inside it, or one stretch of that."""

    node: _Node
    start_ns: int
    end_ns: int
    around: tuple[_Node, ...]
    known: Known | None

    @property
    def transfer(self) -> bool:
        """Whether ranks meet in it."""
        return self.known is not None and self.known.transfer

    def region(self) -> tuple[_Node, Region] | None:
        """The innermost annotation around it that the table knows, and its line there."""
        for each in (self.node, *reversed(self.around)):
            if each.is_annotation and (line := kernel_table().region(each.name)) is not None:
                return each, line
        return None

    def work(self, cause: Stage | Cause | None) -> Work:
        """As it is counted; an unknown one has the name of the outermost operator."""
        operators = [each for each in (*self.around, self.node) if not each.is_annotation]
        name = operators[0].name if cause is Cause.UNKNOWN else self.node.name
        transfer = self.transfer and cause is not None
        kind = self.known.pattern if self.known is not None and transfer else ""
        phase = self.known.phase if self.known is not None else None
        return Work(
            self.start_ns, self.end_ns, name, cause, 0, transfer, kind, self.node.ranks, phase
        )


@dataclass(eq=False)
class _Pieces:
    """The operators of a thread without what runs inside them, in order."""

    found: list[_Piece] = field(default_factory=list)

    def add(self, node: _Node, around: tuple[_Node, ...]) -> None:
        """Take a node apart; a transfer, and what has nothing known inside, stay whole."""
        table = kernel_table()
        names = [each.name for each in around]
        node.known = None if node.is_annotation else table.kernel(node.name, names)
        is_whole = node.known is not None and (
            node.known.transfer or not self._has_stage(node, (*names, node.name))
        )
        if is_whole:
            self._put(node, node.start_ns, node.end_ns, around, node.known)
            return
        at_ns = node.start_ns
        for each in node.inside:
            self._put(node, at_ns, each.start_ns, around, node.known)
            self.add(each, (*around, node))
            at_ns = each.end_ns
        self._put(node, at_ns, node.end_ns, around, node.known)

    def _has_stage(self, node: _Node, names: tuple[str, ...]) -> bool:
        for each in node.inside:
            known = None if each.is_annotation else kernel_table().kernel(each.name, names)
            if known is not None and (known.stage is not None or known.kind is Kind.TOPK):
                return True
            if self._has_stage(each, (*names, each.name)):
                return True
        return False

    def _put(
        self,
        node: _Node,
        start_ns: int,
        end_ns: int,
        around: tuple[_Node, ...],
        known: Known | None,
    ) -> None:
        if end_ns > start_ns:
            self.found.append(_Piece(node, start_ns, end_ns, around, known))

    def work(self, step_starts_ns: Sequence[int]) -> list[Work]:
        """All stretches with their causes; annotations alone are the host's own time.

        Args:
            step_starts_ns: in order; a step begins with what the host prepares.
        """
        numbers: dict[int, int] = {}
        places: list[Place] = []
        causes: list[Stage | Cause | int | None] = []  # a number is a place among `places`
        steps = iter([*step_starts_ns, _NEVER_NS])
        next_ns = next(steps)
        for piece in self.found:
            while piece.start_ns >= next_ns:
                places.append(Place(HOST, None))
                next_ns = next(steps)
            marked = piece.region()
            node, line = marked if marked else (None, None)
            is_kept = piece.transfer or line is None  # an annotation says nothing of it
            if line is not None and line.backward:
                causes.append(None)
            elif line is not None and line.host and not is_kept:
                causes.append(Cause.HOST_GAPS)
            elif piece.node.is_annotation:
                gap = line.of if line is not None and line.gaps else None
                causes.append(Cause.HOST_GAPS if gap is None else gap)
            else:
                known = piece.known or next((n.known for n in piece.around if n.known), None)
                of_region = line.of if line is not None else None
                is_all = line is not None and line.all and not is_kept
                stage = of_region if is_all else known.of if known else None
                kind = known.kind if known and stage is None else None
                region = -1 if node is None else numbers.setdefault(id(node), len(numbers))
                causes.append(len(places))
                exchange = known is not None and known.exchange
                places.append(Place(stage, kind, region, of_region, exchange))
        stages = stages_of(places)
        return [
            piece.work(_cause(stages[cause]) if isinstance(cause, int) else cause)
            for piece, cause in zip(self.found, causes, strict=True)
        ]
