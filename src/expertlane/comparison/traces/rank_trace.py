"""One rank's trace of the torch profiler: its steps, and the work in them.

On a GPU the work is kernels and copies on streams; each belongs to the step and the annotation in
which the host launched it. On a CPU the work is the operators of one thread (`operator_trace.py`).
"""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertlane.comparison.traces.kernel_stages import (
    KernelContext,
    KernelRule,
    RegionRule,
    kernel_table,
    stages_of,
)
from expertlane.comparison.traces.operator_trace import read_operators
from expertlane.comparison.traces.trace_file import (
    ANNOTATION,
    Event,
    Span,
    Work,
    annotated_steps,
    bounds,
    cause_of,
    read_trace,
    split_into_steps,
)
from expertlane.errors import UserError
from expertlane.spec.names import Cause, Stage

_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ON_GPU_ANNOTATION = "gpu_user_annotation"
# Names of trace files: vLLM's `…dp0_pp0_tp1_…`, SGLang's `…-TP-1-DP-0-PP-0.trace.json.gz`.
_AXES = {
    axis: re.compile(rf"(?:^|[^a-z]){axis}[-_]?(?:rank[-_]?)?(\d+)(?!\d)", re.I)
    for axis in ("dp", "pp", "tp")
}
_RANK = re.compile(r"(?:^|[^a-z])rank[-_]?(\d+)(?!\d)", re.I)


@dataclass(frozen=True, eq=False)
class RankTrace:
    """The steps and the work of one rank.

    Attributes:
        axes: the rank's dp, pp and tp coordinates, those that the file's name has.
        spans: steps, in order; they do not overlap.
        work: in order of `start_ns`.
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
        place: the rank's number if neither the trace nor the file's name has one.

    Raises:
        UserError: the file cannot be read, is too large, is not a trace of the torch profiler, or
            has neither kernels nor operators.
    """
    trace = read_trace(path)
    events = [event for event in trace.events if event.ph == "X"]
    on_gpu = any(event.cat == "kernel" for event in events)
    read = _read_kernels if on_gpu else read_operators
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


@dataclass(eq=False)
class _Kernel:
    event: Event
    start_ns: int
    end_ns: int
    stream: int
    launched_ns: int | None
    region: int = -1
    line: RegionRule | None = None
    around: tuple[str, ...] = ()
    known: KernelRule | None = None


def _read_kernels(events: Sequence[Event], base_ns: int) -> tuple[list[Span], list[Work]]:
    launches = {
        event.args.correlation: event
        for event in events
        if event.cat in _LAUNCHES and event.args and event.args.correlation is not None
    }
    streams: dict[tuple[int | str, int | str], int] = {}
    kernels = []
    for event in sorted((e for e in events if e.cat in _ON_GPU), key=lambda e: (e.ts, e.dur)):
        launch = launches.get(event.args.correlation) if event.args else None
        stream = streams.setdefault((event.pid, event.tid), len(streams))
        launched_ns = None if launch is None else bounds(launch, base_ns)[0]
        kernels.append(_Kernel(event, *bounds(event, base_ns), stream, launched_ns))
    _find_regions(kernels, events, base_ns)
    table = kernel_table()
    for kernel in kernels:
        kernel.known = table.kernel(kernel.event.name, kernel.around)
    work = _work_of(kernels)
    main = _main_stream(work)
    return _gpu_spans(kernels, work, events, base_ns, main), work


def _find_regions(kernels: Sequence[_Kernel], events: Sequence[Event], base_ns: int) -> None:
    """Set the annotations that enclose each kernel's launch, and the innermost one with a rule."""
    table = kernel_table()
    marks: list[tuple[int, int, int, Any]] = []  # time; annotations end, begin, then launches
    for number, event in enumerate(events):
        if event.cat == ANNOTATION:
            start_ns, end_ns = bounds(event, base_ns)
            marks += [(start_ns, 1, -end_ns, (number, event)), (end_ns, 0, 0, (number, event))]
    marks += [
        (kernel.launched_ns, 2, at, kernel)
        for at, kernel in enumerate(kernels)
        if kernel.launched_ns is not None
    ]
    open_now: dict[int, Event] = {}
    for _, what, _, each in sorted(marks, key=lambda mark: mark[:3]):
        if what == 0:
            open_now.pop(each[0], None)
        elif what == 1:
            open_now[each[0]] = each[1]
        else:
            each.around = tuple(event.name for event in open_now.values())
            for number in reversed(open_now):
                line = table.region(open_now[number].name)
                if line is not None and not line.transfer:
                    each.region, each.line = number, line
                    break


def _work_of(kernels: Sequence[_Kernel]) -> list[Work]:
    """The kernels as work, with their causes: by name, else by position.

    Kernels of a backward pass have no cause, and no position. Transfers on streams of their own
    have a position like all others.
    """
    causes: list[Stage | Cause | None] = [Cause.UNKNOWN] * len(kernels)
    of_inference = []
    for at, kernel in enumerate(kernels):
        if kernel.line is not None and kernel.line.backward:
            causes[at] = None
        else:
            of_inference.append(at)
    # Two micro-batches may run at once: kernels of one annotation stay adjacent.
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
    contexts = []
    for at in of_inference:
        known, line = kernels[at].known, kernels[at].line
        stage = known.as_stage if known else None
        if line is not None and line.all and not (known and known.transfer):
            stage = line.as_stage
        of_region = line.as_stage if line is not None else None
        kind = known.kind if known and stage is None else None
        exchange = known.exchange if known else False
        contexts.append(KernelContext(stage, kind, kernels[at].region, of_region, exchange))
    for at, stage in zip(of_inference, stages_of(contexts), strict=True):
        causes[at] = cause_of(stage)
    return [_as_work(kernel, cause) for kernel, cause in zip(kernels, causes, strict=True)]


def _as_work(kernel: _Kernel, cause: Stage | Cause | None) -> Work:
    known = kernel.known
    transfer = bool(known and known.transfer) and cause is not None
    ranks = kernel.event.args.ranks if kernel.event.args else None
    return Work(
        kernel.start_ns,
        kernel.end_ns,
        kernel.event.name,
        cause,
        kernel.stream,
        transfer,
        known.pattern if known and transfer else "",
        ranks if isinstance(ranks, str) else "",
        known.phase if known else None,
    )


def _main_stream(work: Sequence[Work]) -> int:
    """The stream with the most compute time: the critical one."""
    busy_ns: dict[int, int] = defaultdict(int)
    for each in work:
        busy_ns[each.stream] += 0 if each.transfer else each.end_ns - each.start_ns
    return max(busy_ns, key=lambda stream: (busy_ns[stream], -stream))


def _gpu_spans(
    kernels: Sequence[_Kernel],
    work: Sequence[Work],
    events: Sequence[Event],
    base_ns: int,
    main: int,
) -> list[Span]:
    """The steps as the GPU ran them, each from the kernels that it launched.

    A step begins with its annotation, or when the step before it ends on the GPU, whichever is
    later. It ends with its last kernel on the critical stream. Kernels launched between two
    annotations (the sampler's) belong to the first.
    """
    begun = annotated_steps(events, base_ns, ANNOTATION)
    launched = sum(kernel.launched_ns is not None for kernel in kernels)
    if not begun or 2 * launched < len(kernels):
        marked = annotated_steps(events, base_ns, _ON_GPU_ANNOTATION)
        return [
            Span(each.start_ns, each.end_ns, each.batch) for each in marked
        ] or split_into_steps(work)
    starts = [step.start_ns for step in begun]
    ran: dict[int, tuple[int, int]] = {}
    for kernel in kernels:
        if kernel.launched_ns is None or kernel.stream != main:
            continue
        step = bisect_right(starts, kernel.launched_ns) - 1
        if step >= 0:
            first, last = ran.get(step, (kernel.start_ns, kernel.end_ns))
            ran[step] = min(first, kernel.start_ns), max(last, kernel.end_ns)
    spans: list[Span] = []
    for step, (first_ns, last_ns) in sorted(ran.items()):
        start_ns = min(first_ns, starts[step])
        if spans:
            start_ns = max(start_ns, spans[-1].end_ns)
        if last_ns > start_ns:
            spans.append(Span(start_ns, last_ns, begun[step].batch))
    return spans
