"""The operators of a CPU that the thread of a rank's steps ran, each without those inside it."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from expertlane.comparison.kernel_stages import (
    HOST,
    Kind,
    Known,
    Place,
    Region,
    kernel_table,
    stages_of,
)
from expertlane.comparison.trace_file import (
    ANNOTATION,
    BegunStep,
    Event,
    Span,
    Work,
    begun_steps,
    bounds,
    cause_of,
    recurring,
)
from expertlane.errors import UserError
from expertlane.spec.names import Cause, Stage

_OPERATOR = "cpu_op"
_MOST_DEPTH = 400  # of operators in one another
_NEVER_NS = 2**63 - 1


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


def of_cpu(events: Sequence[Event], base_ns: int) -> tuple[list[Span], list[Work]]:
    """Steps, and the operators and the host's own time of the thread that ran them."""
    begun = begun_steps(events, base_ns, ANNOTATION)
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
    return _cpu_spans(steps, roots) if steps else recurring(work), work


def _cpu_spans(begun: Sequence[BegunStep], roots: Sequence[_Node]) -> list[Span]:
    """Steps from their annotations' begin to the end of the last operator before the next one.

    What a stage of a pipeline receives before the annotation is of the step that it begins.
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
    """One thread's events as a forest; what ends a little after its parent is cut there."""
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
            line = kernel_table().region(each.name) if each.is_annotation else None
            if line is not None and not line.transfer:
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
        node.known = table.kernel(node.name, names) if not node.is_annotation else None
        line = table.region(node.name) if node.is_annotation else None
        if line is not None and line.transfer:
            node.known = Known(line.pattern, line.source, kind=Kind.GLUE, transfer=True)
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
        causes: list[Stage | Cause | None] = []
        placed: dict[int, int] = {}  # pieces whose cause is that of a place
        steps = iter([*step_starts_ns, _NEVER_NS])
        next_ns = next(steps)
        for number, piece in enumerate(self.found):
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
            elif piece.node.is_annotation and not piece.transfer:
                gap = line.of if line is not None and line.gaps else None
                causes.append(Cause.HOST_GAPS if gap is None else gap)
            else:
                known = piece.known or next((n.known for n in piece.around if n.known), None)
                of_region = line.of if line is not None else None
                stage = known.of if known else None
                if line is not None and line.all and (stage is None or not is_kept):
                    stage = of_region
                kind = known.kind if known and stage is None else None
                region = -1 if node is None else numbers.setdefault(id(node), len(numbers))
                placed[number] = len(places)
                causes.append(Cause.UNKNOWN)
                exchange = known is not None and known.exchange
                places.append(Place(stage, kind, region, of_region, exchange))
        stages = stages_of(places)
        for number, place in placed.items():
            causes[number] = cause_of(stages[place])
        return [piece.work(cause) for piece, cause in zip(self.found, causes, strict=True)]
