"""Which stage a kernel, an operator or an annotation of a trace belongs to.

`kernels.toml` says it by name. What a name leaves open (a matrix product, a norm, a conversion, an
elementwise kernel) its place in a layer says: between two kernels whose stages are known, what
comes before a border belongs to the first, what follows to the second. The border is a norm after
attention and after the experts, since a layer begins each of its two halves with one.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Literal

from expertlane.errors import SpecError
from expertlane.spec.files import CONFIG_BYTES, build, read_toml
from expertlane.spec.names import Phase, Stage
from expertlane.spec.ranges import Strict

FILE = Path(__file__).with_name("kernels.toml")
MOST_CHARACTERS = 2000  # of a name, or of the names around one; the rest is not looked at

StageName = Literal[
    "host",
    "embed",
    "attention",
    "router",
    "dispatch",
    "experts",
    "combine",
    "collectives",
    "send-recv",
    "head",
]


# What the host does for a step, where it shows as operators: between two plans, so to speak.
HOST = Stage.IDLE
_NAMED = {"host": HOST, "send-recv": Stage.HAND_OVER}


def _stage(name: StageName | None) -> Stage | None:
    if name is None:
        return None
    return _NAMED[name] if name in _NAMED else Stage[name.upper()]


class Kind(StrEnum):
    """What a kernel does whose name doesn't say its stage."""

    GEMM = "gemm"
    NORM = "norm"
    CAST = "cast"  # to a narrower type and back, with the transpositions that it needs
    GLUE = "glue"  # elementwise kernels, reductions, copies
    ALLOC = "alloc"  # memory for what the next operator gives
    COMPILED = "compiled"  # operators that were fused into one
    TOPK = "topk"  # the router's before experts, else the sampler's


@dataclass(frozen=True)
class Known(Strict):
    """A line about kernels or operators; see the head of `kernels.toml`."""

    pattern: str
    source: str
    stage: StageName | None = None
    kind: Kind | None = None
    transfer: bool = False
    exchange: bool = False
    begins: str = ""
    within: str = ""
    phase: Phase | None = None

    def begins_step(self, name: str) -> bool:
        """Whether an operator of this line begins the step that follows it."""
        return bool(self.begins) and _regex(self.begins).search(name) is not None

    @property
    def of(self) -> Stage | None:
        """Its stage; None where its place decides."""
        return _stage(self.stage)


@dataclass(frozen=True)
class Region(Strict):
    """A line about annotations around kernels; see the head of `kernels.toml`."""

    pattern: str
    source: str
    stage: StageName | None = None
    all: bool = False
    host: bool = False
    gaps: bool = False
    transfer: bool = False
    backward: bool = False

    @property
    def of(self) -> Stage | None:
        """The stage of what runs inside; None where it is none of inference."""
        return _stage(self.stage)


@dataclass(frozen=True)
class StepName(Strict):
    """A line about annotations of steps; see the head of `kernels.toml`."""

    pattern: str
    source: str
    phase: Phase | None = None


@dataclass(frozen=True)
class StepBatch:
    """What a step's annotation says of its batch; None for what it does not say."""

    phase: Phase | None = None
    num_seqs: int | None = None
    num_tokens: int | None = None


@dataclass(frozen=True)
class _File(Strict):
    steps: list[StepName]
    regions: list[Region]
    kernels: list[Known]


@dataclass(frozen=True, eq=False)
class KernelTable:
    """The lines of `kernels.toml`, with what was already looked up."""

    steps: Sequence[StepName]
    regions: Sequence[Region]
    kernels: Sequence[Known]
    _found: dict[str, list[Known]] = field(default_factory=dict, init=False)
    _around: dict[str, Region | None] = field(default_factory=dict, init=False)

    def kernel(self, name: str, around: Iterable[str] = ()) -> Known | None:
        """The line about a kernel or operator; None where there is none.

        Args:
            around: names of the operators and annotations that it runs in.
        """
        if name not in self._found:
            short = name[:MOST_CHARACTERS]
            self._found[name] = [
                each for each in self.kernels if _regex(each.pattern).search(short)
            ]
        for each in self._found[name]:
            if not each.within:
                return each
            if any(_regex(each.within).search(name[:MOST_CHARACTERS]) for name in around):
                return each
        return None

    def region(self, name: str) -> Region | None:
        """The line about an annotation; None where there is none."""
        if name not in self._around:
            short = name[:MOST_CHARACTERS]
            matches = (each for each in self.regions if _regex(each.pattern).search(short))
            self._around[name] = next(matches, None)
        return self._around[name]


@cache
def kernel_table() -> KernelTable:
    """The table that is shipped."""
    file = build(_File, read_toml(FILE, CONFIG_BYTES), FILE.name)
    for each in file.kernels:
        if (each.stage is None) == (each.kind is None):
            raise SpecError(f"{FILE.name}: {each.pattern!r} must have a stage or a kind")
    return KernelTable(file.steps, file.regions, file.kernels)


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def batch_of(line: StepName, name: str) -> StepBatch | None:
    """What a step's annotation says of its batch; None if it is no step of this line.

    A step with any prompt in it is a prefill.
    """
    match = _regex(line.pattern).search(name[:MOST_CHARACTERS])
    if match is None:
        return None
    said = match.groupdict()
    number = {key: int(text) for key, text in said.items() if text and text.isdecimal()}
    if "prompts" in number:
        phase = Phase.PREFILL if number["prompts"] else Phase.DECODE
        num_seqs = number["prompts"] + number["decodes"]
        if not num_seqs:  # it only finishes requests
            return StepBatch()
        return StepBatch(phase, num_seqs, number["prompt_tokens"] + number["decode_tokens"])
    named = said.get("phase")
    phase_of_name = Phase(named) if named else line.phase
    num_seqs_or_none = number.get("seqs")
    # In decoding, one token a sequence where none are counted.
    tokens = number.get("tokens", num_seqs_or_none if phase_of_name is Phase.DECODE else None)
    return StepBatch(phase_of_name, num_seqs_or_none, tokens)


@dataclass(frozen=True)
class Place:
    """A kernel in the order of its rank: what is known of it by name, and where it runs.

    Attributes:
        stage: by its name, or None.
        kind: None where nothing is known of it, or its name has a stage.
        region: number of the annotation around it; kernels of one are next to each other.
        of_region: that annotation's stage.
        exchange: a transfer that may be a dispatch or a combine.
    """

    stage: Stage | None
    kind: Kind | None
    region: int = -1
    of_region: Stage | None = None
    exchange: bool = False


def stages_of(places: Sequence[Place]) -> list[Stage | None]:
    """The stage of each of a rank's kernels, in their order; None for what can't be told.

    Kernels of which nothing is known stay so; they are no border between others.
    """
    places = _with_exchanges(_with_choices(places))
    found = [place.stage for place in places]
    at, num = 0, len(places)
    while at < num:
        if found[at] is not None or places[at].kind is None:
            at += 1
            continue
        region, end = places[at].region, at
        while end < num and found[end] is None and places[end].region == region:
            end += 1
        inside = places[at].of_region
        before, is_inside = _neighbour(places, range(at - 1, -1, -1), region, inside)
        # Behind a kernel that is known, what follows the annotation tells more than its own stage.
        after, _ = _neighbour(places, range(end, num), region, None if is_inside else inside)
        run = [place for place in range(at, end) if places[place].kind is not None]
        kinds = [kind for place in run if (kind := places[place].kind) is not None]
        is_met = before in _MEETINGS and after in _MEETINGS
        is_mlp = is_met and kinds.count(Kind.GEMM) > 1  # a dense layer's, whose activation is fused
        if after in _MEETINGS and (before is None or is_met):
            after = _beyond(places, range(end, num))
        stages = [Stage.EXPERTS] * len(run) if is_mlp else between(before, after, kinds)
        for place, stage in zip(run, stages, strict=True):
            found[place] = stage
        at = end
    return found


def _with_choices(places: Sequence[Place]) -> list[Place]:
    """Each choice of the largest made the router's, where experts come next, or the sampler's."""
    found = list(places)
    for at in range(len(found) - 1, -1, -1):
        if found[at].kind is Kind.TOPK:
            following = _beyond(found, range(at + 1, len(found)))
            is_router = following in (Stage.ROUTER, Stage.DISPATCH, Stage.EXPERTS)
            stage = Stage.ROUTER if is_router else Stage.HEAD
            found[at] = replace(found[at], stage=stage, kind=None)
    return found


def _with_exchanges(places: Sequence[Place]) -> list[Place]:
    """All-gathers and the like between router and experts made dispatches, what returns combines.

    vLLM dispatches the router's logits too, between its product and the choice of experts. A layer
    that dispatches so returns by an exchange too: the next one behind its experts.
    """
    found = list(places)
    befores = _last_stages(places)
    afters = _last_stages(places[::-1])[::-1]
    is_out = False  # dispatched, and not yet returned
    for at, place in enumerate(places):
        if not place.exchange:
            continue
        is_behind = befores[at] in (Stage.ROUTER, Stage.DISPATCH) and afters[at] in _OUTWARD
        if is_behind or (afters[at] is Stage.ROUTER and _is_behind_product(places, at)):
            found[at], is_out = replace(place, stage=Stage.DISPATCH), True
        elif is_out and befores[at] is Stage.EXPERTS:
            found[at], is_out = replace(place, stage=Stage.COMBINE), False
    return found


def _is_behind_product(places: Sequence[Place], at: int) -> bool:
    """Whether the router's product comes before a place, and only its choice behind."""
    for place in places[at + 1 : at + 1 + _NEAR]:
        if place.kind is Kind.GEMM:
            return False
        if place.stage is Stage.ROUTER:
            break
    nearest = (place.kind for place in places[max(0, at - _NEAR) : at][::-1])
    return next((kind for kind in nearest if kind in (Kind.GEMM, Kind.NORM)), None) is Kind.GEMM


def _last_stages(places: Sequence[Place]) -> list[Stage | None]:
    """For each place the last stage before it that is known by name and no meeting of ranks."""
    found: list[Stage | None] = []
    last: Stage | None = None
    for place in places:
        found.append(last)
        if place.stage is not None and place.stage not in _MEETINGS:
            last = place.stage
    return found


def _beyond(places: Sequence[Place], order: Iterable[int]) -> Stage | None:
    """The nearest stage known by name that is no meeting of ranks outside of a layer's parts."""
    stages = (places[at].stage for at in order)
    return next((stage for stage in stages if stage is not None and stage not in _MEETINGS), None)


def _neighbour(
    places: Sequence[Place], order: Iterable[int], region: int, inside: Stage | None
) -> tuple[Stage | None, bool]:
    """The nearest stage known by name, and whether its kernel runs in the same annotation.

    Where the annotation ends before, that has a stage: the annotation's.
    """
    for at in order:
        if inside is not None and places[at].region != region:
            return inside, False
        if (stage := places[at].stage) is not None:
            return stage, places[at].region == region
    return inside, False


_NORM_GAP = 3  # kernels from one part of a norm to the next
_NORMS = (Kind.NORM,)
_PRODUCTS = (Kind.GEMM,)
_MEETINGS = (Stage.COLLECTIVES, Stage.HAND_OVER)
_NEAR = 40  # kernels
_OUTWARD = (Stage.EXPERTS, Stage.DISPATCH)


def between(before: Stage | None, after: Stage | None, kinds: Sequence[Kind]) -> list[Stage | None]:
    """The stages of kernels between two whose stages are known.

    Args:
        before, after: None at the beginning and the end.
        kinds: of the kernels between, in order; none of them has a stage by its name.
    """
    num = len(kinds)
    if before is None:
        if after is None:
            return [None] * num
        before = Stage.EMBED if after is Stage.ATTENTION else after
    if after is None or (after is HOST and before is not HOST):  # a step, or the trace, ends
        after = Stage.HEAD if before is Stage.COLLECTIVES else before
    if after is Stage.DISPATCH and before in (Stage.ATTENTION, *_MEETINGS) and Kind.GEMM in kinds:
        after = Stage.ROUTER  # its product, and the norm before it
    first, second, border = _halves(before, after, kinds)
    found = [first] * border + [second] * (num - border)
    products = [at for at in range(border, num) if kinds[at] is Kind.GEMM]
    # Before a shared expert's activation: norm and gate, then its first product.
    is_gated = before is not second is Stage.EXPERTS and len(products) == 2
    if is_gated and Kind.NORM in kinds[border : products[0]]:
        found[border : products[1]] = [Stage.ROUTER] * (products[1] - border)
    return found


def _halves(
    before: Stage, after: Stage, kinds: Sequence[Kind]
) -> tuple[Stage | None, Stage | None, int]:
    """The stage before the border, the one after it, and the border's place."""
    num = len(kinds)
    match before, after:
        case (one, _) if one in _MEETINGS:
            return after, after, 0
        case (one, other) if one is HOST and other in _MEETINGS:
            # Compiled: the rows of the embedding, which ranks then sum.
            border = _first(kinds, (Kind.COMPILED,))
            return before, Stage.EMBED, num if border is None else border
        case (_, other) if other in _MEETINGS:
            return before, before, num
        case (one, other) if one is other and one is not Stage.DISPATCH:
            return before, before, num
        case (one, Stage.EMBED) if one is not HOST:
            return after, after, 0
        case Stage.ATTENTION, (Stage.ROUTER | Stage.DISPATCH | Stage.EXPERTS):
            # The output's projection, then the norm of the second half.
            norm = _last_norm(kinds)
            border = norm if norm is not None else _behind(kinds, _PRODUCTS)
            return before, after, num if border is None else border
        case (
            (Stage.ROUTER | Stage.DISPATCH),
            (Stage.EXPERTS | Stage.COMBINE | Stage.DISPATCH | Stage.ATTENTION),
        ) if Kind.GEMM in kinds:
            product = kinds.index(Kind.GEMM)
            while product and kinds[product - 1] is Kind.CAST:
                product -= 1  # what narrows the product's input
            return before, Stage.EXPERTS, product
        case Stage.ROUTER, (Stage.DISPATCH | Stage.EXPERTS):
            border = _first(kinds, (Kind.CAST, Kind.ALLOC))
            return before, after, num if border is None else border
        case (one, Stage.EMBED) if one is HOST:
            # Compiled: which ids are this rank's, or all that is before the layers.
            border = _first(kinds, (Kind.COMPILED,))
            return before, after, num if border is None else border
        case Stage.DISPATCH, (Stage.EXPERTS | Stage.COMBINE):
            return Stage.EXPERTS, Stage.EXPERTS, 0
        case Stage.EXPERTS, Stage.ROUTER:
            border = _behind(kinds, _PRODUCTS)  # a shared expert's second product
            return before, after, 0 if border is None else border
        case Stage.COMBINE, Stage.EXPERTS:
            border = _first(kinds, _PRODUCTS)
            return before, after, num if border is None else border
        case (_, Stage.ATTENTION | Stage.ROUTER | Stage.HEAD):
            border = _first(kinds, _NORMS)
            if border is None and (before is Stage.EXPERTS or before is HOST):
                border = _first(kinds, (Kind.COMPILED,))  # which has the norm
            if border is None and before is Stage.EXPERTS:
                border = _behind(kinds, _PRODUCTS)
            if border is None and before in (Stage.HEAD, Stage.EMBED, HOST):
                border = _first(kinds, _PRODUCTS)
            return before, after, 0 if border is None else border
        case _:
            return before, before, num


def _first(kinds: Sequence[Kind], wanted: Sequence[Kind]) -> int | None:
    return next((place for place, kind in enumerate(kinds) if kind in wanted), None)


def _last_norm(kinds: Sequence[Kind]) -> int | None:
    """Where the last norm begins, which may be made of several operators."""
    norms = [at for at, kind in enumerate(kinds) if kind is Kind.NORM]
    if not norms:
        return None
    begin = norms.pop()
    while norms and begin - norms[-1] <= _NORM_GAP and Kind.GEMM not in kinds[norms[-1] : begin]:
        begin = norms.pop()
    return begin


def _behind(kinds: Sequence[Kind], wanted: Sequence[Kind]) -> int | None:
    first = _first(kinds, wanted)
    return None if first is None else first + 1
