"""CPU operators of the thread that runs a rank's steps, each without the operators nested in it."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from expertlane.comparison.traces.kernel_stages import (
    HOST,
    KernelContext,
    KernelRule,
    Kind,
    RegionRule,
    kernel_table,
    stages_of,
)
from expertlane.comparison.traces.trace_file import (
    ANNOTATION,
    AnnotatedStep,
    Event,
    Span,
    Work,
    annotated_steps,
    begun_ns,
    bounds,
    cause_of,
    split_into_steps,
)
from expertlane.errors import UserError
from expertlane.spec.names import Cause, Stage

_OPERATOR = "cpu_op"
_MOST_DEPTH = 400  # of nested operators
_NEVER_NS = 2**63 - 1


@dataclass(eq=False)
class _Node:
    """An operator or annotation, with those nested in it."""

    name: str
    start_ns: int
    end_ns: int
    is_annotation: bool
    inside: list["_Node"] = field(default_factory=list)
    known: KernelRule | None = None
    ranks: str = ""
    begun_ns: int | None = None


def read_operators(events: Sequence[Event], base_ns: int) -> tuple[list[Span], list[Work]]:
    """Read a trace without kernels: steps, and the operators of the thread that ran them.

    Args:
        events: the trace's events that have a duration.
        base_ns: nanoseconds to add to their times.

    Returns:
        Steps and work, both in order; empty if there are neither operators nor annotated steps.
    """
    begun = annotated_steps(events, base_ns, ANNOTATION)
    threads: dict[tuple[int | str, int | str], float] = defaultdict(float)
    for event in events:
        if event.cat == _OPERATOR:
            threads[event.pid, event.tid] += event.dur
    if not threads and not begun:
        return [], []
    main = begun[0].thread if begun else max(threads, key=lambda each: threads[each])
    roots = _nest(
        [e for e in events if e.cat in (_OPERATOR, ANNOTATION) and (e.pid, e.tid) == main], base_ns
    )
    pieces = _Pieces()
    for root in roots:
        pieces.add(root, ())
    steps = [step for step in begun if step.thread == main]
    work = pieces.work([step.start_ns for step in steps])
    return _cpu_spans(steps, roots) if steps else split_into_steps(work), work


def _cpu_spans(begun: Sequence[AnnotatedStep], roots: Sequence[_Node]) -> list[Span]:
    """Steps, each from its annotation's start to the end of its last operator.

    What a pipeline stage receives before the annotation belongs to the step that follows.
    """
    spans = []
    annotated = [step.start_ns for step in begun]
    starts = list(annotated)
    for root in roots:
        at = bisect_right(annotated, root.start_ns)
        if root.known is None or not root.known.begins_step(root.name) or at == len(begun):
            continue
        if at == 0 or root.start_ns >= begun[at - 1].end_ns:
            starts[at] = min(starts[at], root.start_ns)
    ends = [step.end_ns for step in begun]
    for root in roots:
        step = bisect_right(starts, root.start_ns) - 1
        if step >= 0:
            ends[step] = max(ends[step], root.end_ns)
    for at, each in enumerate(begun):
        limit = starts[at + 1] if at + 1 < len(begun) else ends[at]
        end_ns = min(ends[at], limit)
        if end_ns > starts[at]:
            spans.append(Span(starts[at], end_ns, each.batch))
    return spans


def _nest(events: Iterable[Event], base_ns: int) -> list[_Node]:
    """One thread's events as trees; an event that ends after its parent is cut there.

    Raises:
        UserError: they are nested too deeply.
    """
    roots: list[_Node] = []
    stack: list[_Node] = []
    for event in sorted(events, key=lambda e: (e.ts, -e.dur)):
        start_ns, end_ns = bounds(event, base_ns)
        while stack and stack[-1].end_ns <= start_ns:
            stack.pop()
        if stack:
            end_ns = min(end_ns, stack[-1].end_ns)
        ranks = event.args.ranks if event.args else None
        named = ranks if isinstance(ranks, str) else ""
        node = _Node(event.name, start_ns, end_ns, event.cat == ANNOTATION, ranks=named)
        node.begun_ns = begun_ns(event, base_ns)
        (stack[-1].inside if stack else roots).append(node)
        stack.append(node)
        if len(stack) > _MOST_DEPTH:
            raise UserError(f"operators are nested deeper than {_MOST_DEPTH} in a trace")
    return roots


@dataclass(eq=False)
class _Piece:
    """A stretch of an operator or annotation in which no nested operator runs."""

    node: _Node
    start_ns: int
    end_ns: int
    around: tuple[_Node, ...]
    known: KernelRule | None

    @property
    def transfer(self) -> bool:
        """True for communication between ranks."""
        return self.known is not None and self.known.transfer

    def region(self) -> tuple[_Node, RegionRule] | None:
        """The innermost annotation around it that has a rule, and the rule."""
        for each in (self.node, *reversed(self.around)):
            line = kernel_table().region(each.name) if each.is_annotation else None
            if line is not None and not line.transfer:
                return each, line
        return None

    def work(self, cause: Stage | Cause | None) -> Work:
        """The piece as work; of an unknown cause, with the name of the outermost operator."""
        operators = [each for each in (*self.around, self.node) if not each.is_annotation]
        name = operators[0].name if cause is Cause.UNKNOWN else self.node.name
        transfer = self.transfer and cause is not None
        kind = self.known.pattern if self.known is not None and transfer else ""
        phase = self.known.phase if self.known is not None else None
        return Work(
            *(self.start_ns, self.end_ns, name, cause, 0, transfer, kind, self.node.ranks, phase),
            begun_ns=self.node.begun_ns,
        )


@dataclass(eq=False)
class _Pieces:
    """All pieces of a thread, in order of time."""

    found: list[_Piece] = field(default_factory=list)

    def add(self, node: _Node, around: tuple[_Node, ...]) -> None:
        """Split a node into pieces; transfers, and operators with no stages inside, stay whole."""
        table = kernel_table()
        names = [each.name for each in around]
        node.known = table.kernel(node.name, names) if not node.is_annotation else None
        line = table.region(node.name) if node.is_annotation else None
        if line is not None and line.transfer:
            node.known = KernelRule(line.pattern, line.source, kind=Kind.GLUE, transfer=True)
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
        known: KernelRule | None,
    ) -> None:
        if end_ns > start_ns:
            self.found.append(_Piece(node, start_ns, end_ns, around, known))

    def work(self, step_starts_ns: Sequence[int]) -> list[Work]:
        """All pieces as work, with their causes; an annotation without operators is host time.

        Args:
            step_starts_ns: starts of the steps, in order; each step begins with work of the host.
        """
        numbers: dict[int, int] = {}
        contexts: list[KernelContext] = []
        causes: list[Stage | Cause | None] = []
        placed: dict[int, int] = {}  # index in `contexts`, of pieces whose position decides
        steps = iter([*step_starts_ns, _NEVER_NS])
        next_ns = next(steps)
        for number, piece in enumerate(self.found):
            while piece.start_ns >= next_ns:
                contexts.append(KernelContext(HOST, None))
                next_ns = next(steps)
            marked = piece.region()
            node, line = marked if marked else (None, None)
            is_kept = piece.transfer or line is None  # no annotation overrides it
            if line is not None and line.backward:
                causes.append(None)
            elif line is not None and line.host and not is_kept:
                causes.append(Cause.HOST_GAPS)
            elif piece.node.is_annotation and not piece.transfer:
                gap = line.as_stage if line is not None and line.gaps else None
                causes.append(Cause.HOST_GAPS if gap is None else gap)
            else:
                known = piece.known or next((n.known for n in piece.around if n.known), None)
                of_region = line.as_stage if line is not None else None
                stage = known.as_stage if known else None
                if line is not None and line.all and (stage is None or not is_kept):
                    stage = of_region
                kind = known.kind if known and stage is None else None
                region = -1 if node is None else numbers.setdefault(id(node), len(numbers))
                placed[number] = len(contexts)
                causes.append(Cause.UNKNOWN)
                exchange = known is not None and known.exchange
                contexts.append(KernelContext(stage, kind, region, of_region, exchange))
        stages = stages_of(contexts)
        for number, place in placed.items():
            causes[number] = cause_of(stages[place])
        return [piece.work(cause) for piece, cause in zip(self.found, causes, strict=True)]
