"""The stage of each kernel, operator and annotation in a trace.

`kernels.toml` gives the stage by name. The name of a matrix product, a norm, a conversion or an
elementwise kernel does not determine its stage; its position does. Such kernels run between two
kernels whose stages are known: those before a border get the stage of the first, those behind it
the stage of the second. After attention and after the experts the border is the next norm, since
each half of a layer begins with one.
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
MOST_CHARACTERS = 2000  # of a name that is searched; the rest is ignored

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


# Operators with which the host prepares a step. No kernel has the stage IDLE, so it marks them.
HOST = Stage.IDLE
_NAMED = {"host": HOST, "send-recv": Stage.HAND_OVER}


def _stage(name: StageName | None) -> Stage | None:
    if name is None:
        return None
    return _NAMED[name] if name in _NAMED else Stage[name.upper()]


class Kind(StrEnum):
    """Kind of a kernel whose name does not determine its stage."""

    GEMM = "gemm"
    NORM = "norm"
    CAST = "cast"  # to a narrower type and back, transpositions for it included
    GLUE = "glue"  # elementwise kernels, reductions, copies
    ALLOC = "alloc"  # memory for the output of the next operator
    COMPILED = "compiled"  # operators that a compiler fused
    TOPK = "topk"  # the router's if experts follow, else the sampler's


@dataclass(frozen=True)
class KernelRule(Strict):
    """A table `[[kernels]]` of `kernels.toml`; its head describes the fields."""

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
    def as_stage(self) -> Stage | None:
        """Its stage; None if its position decides."""
        return _stage(self.stage)


@dataclass(frozen=True)
class RegionRule(Strict):
    """A table `[[regions]]` of `kernels.toml`, of annotations; its head describes the fields."""

    pattern: str
    source: str
    stage: StageName | None = None
    all: bool = False
    host: bool = False
    gaps: bool = False
    transfer: bool = False
    backward: bool = False

    @property
    def as_stage(self) -> Stage | None:
        """The stage of kernels inside; None if the annotation has no stage."""
        return _stage(self.stage)


@dataclass(frozen=True)
class StepRule(Strict):
    """A table `[[steps]]` of `kernels.toml`, of annotations of steps."""

    pattern: str
    source: str
    phase: Phase | None = None


@dataclass(frozen=True)
class StepBatch:
    """The batch of a step as its annotation describes it; None for what it does not name."""

    phase: Phase | None = None
    num_seqs: int | None = None
    num_tokens: int | None = None


@dataclass(frozen=True)
class _File(Strict):
    steps: list[StepRule]
    regions: list[RegionRule]
    kernels: list[KernelRule]


@dataclass(frozen=True, eq=False)
class KernelTable:
    """The rules of `kernels.toml`, with a cache of names already looked up."""

    steps: Sequence[StepRule]
    regions: Sequence[RegionRule]
    kernels: Sequence[KernelRule]
    _found: dict[str, list[KernelRule]] = field(default_factory=dict, init=False)
    _around: dict[str, RegionRule | None] = field(default_factory=dict, init=False)

    def kernel(self, name: str, around: Iterable[str] = ()) -> KernelRule | None:
        """The first rule that matches a kernel or operator; None if none does.

        Args:
            around: names of the operators and annotations that enclose it.
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

    def region(self, name: str) -> RegionRule | None:
        """The first rule that matches an annotation; None if none does."""
        if name not in self._around:
            short = name[:MOST_CHARACTERS]
            matches = (each for each in self.regions if _regex(each.pattern).search(short))
            self._around[name] = next(matches, None)
        return self._around[name]


@cache
def kernel_table() -> KernelTable:
    """The table in `kernels.toml`, read once.

    Raises:
        SpecError: a rule is wrong.
    """
    file = build(_File, read_toml(FILE, CONFIG_BYTES), FILE.name)
    for each in file.kernels:
        if (each.stage is None) == (each.kind is None):
            raise SpecError(f"{FILE.name}: {each.pattern!r} must have a stage or a kind")
    return KernelTable(file.steps, file.regions, file.kernels)


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def batch_of(line: StepRule, name: str) -> StepBatch | None:
    """The batch that an annotation names; None if the rule `line` does not match it.

    A step that has any prompt is a prefill.
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
class KernelContext:
    """One kernel in a rank's order, with all that determines its stage.

    Attributes:
        stage: the stage by its name, or None.
        kind: None if the name is unknown, or determines the stage.
        region: number of the annotation that encloses it; kernels of one annotation are adjacent.
        of_region: stage of that annotation.
        exchange: True for a transfer that may be a dispatch or a combine.
    """

    stage: Stage | None
    kind: Kind | None
    region: int = -1
    of_region: Stage | None = None
    exchange: bool = False


def stages_of(kernels: Sequence[KernelContext]) -> list[Stage | None]:
    """The stage of each kernel of a rank, in order; None where it is unknown.

    A kernel of an unknown name stays unknown, and does not separate its neighbours.
    """
    kernels = _with_exchanges(_with_topk_stages(kernels))
    found = [kernel.stage for kernel in kernels]
    at, num = 0, len(kernels)
    while at < num:
        if found[at] is not None or kernels[at].kind is None:
            at += 1
            continue
        region, end = kernels[at].region, at
        while end < num and found[end] is None and kernels[end].region == region:
            end += 1
        inside = kernels[at].of_region
        before, is_inside = _neighbour(kernels, range(at - 1, -1, -1), region, inside)
        # After a known kernel, the next kernel beyond the annotation says more than its own stage.
        after, _ = _neighbour(kernels, range(end, num), region, None if is_inside else inside)
        run = [number for number in range(at, end) if kernels[number].kind is not None]
        kinds = [kind for number in run if (kind := kernels[number].kind) is not None]
        is_between = before in _COMMUNICATION and after in _COMMUNICATION
        # A dense layer's, whose activation is fused.
        is_mlp = is_between and kinds.count(Kind.GEMM) > 1
        if after in _COMMUNICATION and (before is None or is_between):
            after = _nearest_stage(kernels, range(end, num))
        stages = [Stage.EXPERTS] * len(run) if is_mlp else stages_between(before, after, kinds)
        for number, stage in zip(run, stages, strict=True):
            found[number] = stage
        at = end
    return found


def _with_topk_stages(kernels: Sequence[KernelContext]) -> list[KernelContext]:
    """The kernels, each top-k with its stage: the router if experts follow, else the head."""
    found = list(kernels)
    for at in range(len(found) - 1, -1, -1):
        if found[at].kind is Kind.TOPK:
            following = _nearest_stage(found, range(at + 1, len(found)))
            is_router = following in (Stage.ROUTER, Stage.DISPATCH, Stage.EXPERTS)
            stage = Stage.ROUTER if is_router else Stage.HEAD
            found[at] = replace(found[at], stage=stage, kind=None)
    return found


def _with_exchanges(kernels: Sequence[KernelContext]) -> list[KernelContext]:
    """The kernels, with the stages of exchanges (all-gather, all-to-all, reduce-scatter).

    An exchange between router and experts is a dispatch, and the next one after the experts the
    combine. vLLM also dispatches the router's logits, between the router's product and its top-k.
    """
    found = list(kernels)
    befores = _last_stages(kernels)
    afters = _last_stages(kernels[::-1])[::-1]
    is_out = False  # dispatched, and not yet combined
    for at, kernel in enumerate(kernels):
        if not kernel.exchange:
            continue
        is_behind = befores[at] in (Stage.ROUTER, Stage.DISPATCH) and afters[at] in _OUTWARD
        if is_behind or (afters[at] is Stage.ROUTER and _follows_router_product(kernels, at)):
            found[at], is_out = replace(kernel, stage=Stage.DISPATCH), True
        elif is_out and befores[at] is Stage.EXPERTS:
            found[at], is_out = replace(kernel, stage=Stage.COMBINE), False
    return found


def _follows_router_product(kernels: Sequence[KernelContext], at: int) -> bool:
    """Whether a kernel runs after the router's matrix product and before its top-k."""
    for kernel in kernels[at + 1 : at + 1 + _NEAR]:
        if kernel.kind is Kind.GEMM:
            return False
        if kernel.stage is Stage.ROUTER:
            break
    nearest = (kernel.kind for kernel in kernels[max(0, at - _NEAR) : at][::-1])
    return next((kind for kind in nearest if kind in (Kind.GEMM, Kind.NORM)), None) is Kind.GEMM


def _last_stages(kernels: Sequence[KernelContext]) -> list[Stage | None]:
    """For each kernel the last stage before it that a name gives, collectives left out."""
    found: list[Stage | None] = []
    last: Stage | None = None
    for kernel in kernels:
        found.append(last)
        if kernel.stage is not None and kernel.stage not in _COMMUNICATION:
            last = kernel.stage
    return found


def _nearest_stage(kernels: Sequence[KernelContext], order: Iterable[int]) -> Stage | None:
    """The nearest stage that a name gives, collectives and send/recv left out."""
    stages = (kernels[at].stage for at in order)
    return next(
        (stage for stage in stages if stage is not None and stage not in _COMMUNICATION), None
    )


def _neighbour(
    kernels: Sequence[KernelContext], order: Iterable[int], region: int, inside: Stage | None
) -> tuple[Stage | None, bool]:
    """The nearest stage that a name gives, and whether its kernel is in the same annotation.

    If the annotation ends first, and has a stage, that stage.
    """
    for at in order:
        if inside is not None and kernels[at].region != region:
            return inside, False
        if (stage := kernels[at].stage) is not None:
            return stage, kernels[at].region == region
    return inside, False


_NORM_GAP = 3  # kernels from one part of a norm to the next
_NORMS = (Kind.NORM,)
_PRODUCTS = (Kind.GEMM,)
_COMMUNICATION = (Stage.COLLECTIVES, Stage.HAND_OVER)
_NEAR = 40  # kernels
_OUTWARD = (Stage.EXPERTS, Stage.DISPATCH)


def stages_between(
    before: Stage | None, after: Stage | None, kinds: Sequence[Kind]
) -> list[Stage | None]:
    """The stages of kernels that run between two whose stages are known.

    Args:
        before, after: stages of those two; None at the beginning and the end of the trace.
        kinds: kinds of the kernels between, in order.
    """
    num = len(kinds)
    if before is None:
        if after is None:
            return [None] * num
        before = Stage.EMBED if after is Stage.ATTENTION else after
    if after is None or (after is HOST and before is not HOST):  # a step, or the trace, ends
        after = Stage.HEAD if before is Stage.COLLECTIVES else before
    if (
        after is Stage.DISPATCH
        and before in (Stage.ATTENTION, *_COMMUNICATION)
        and Kind.GEMM in kinds
    ):
        after = Stage.ROUTER  # the router's product, and the norm before it
    first, second, border = _boundary(before, after, kinds)
    found = [first] * border + [second] * (num - border)
    products = [at for at in range(border, num) if kinds[at] is Kind.GEMM]
    # Before a shared expert's activation: norm and gate, then its first product.
    is_gated = before is not second is Stage.EXPERTS and len(products) == 2
    if is_gated and Kind.NORM in kinds[border : products[0]]:
        found[border : products[1]] = [Stage.ROUTER] * (products[1] - border)
    return found


def _boundary(
    before: Stage, after: Stage, kinds: Sequence[Kind]
) -> tuple[Stage | None, Stage | None, int]:
    """The stage before the border, the stage after it, and the number of kernels before it."""
    num = len(kinds)
    match before, after:
        case (one, _) if one in _COMMUNICATION:
            return after, after, 0
        case (one, other) if one is HOST and other in _COMMUNICATION:
            # Compiled: the rows of the embedding, which ranks then sum.
            border = _first(kinds, (Kind.COMPILED,))
            return before, Stage.EMBED, num if border is None else border
        case (_, other) if other in _COMMUNICATION:
            return before, before, num
        case (one, other) if one is other and one is not Stage.DISPATCH:
            return before, before, num
        case (one, Stage.EMBED) if one is not HOST:
            return after, after, 0
        case Stage.ATTENTION, (Stage.ROUTER | Stage.DISPATCH | Stage.EXPERTS):
            # The output projection, then the norm of the second half.
            norm = _last_norm(kinds)
            border = norm if norm is not None else _after(kinds, _PRODUCTS)
            return before, after, num if border is None else border
        case (
            (Stage.ROUTER | Stage.DISPATCH),
            (Stage.EXPERTS | Stage.COMBINE | Stage.DISPATCH | Stage.ATTENTION),
        ) if Kind.GEMM in kinds:
            product = kinds.index(Kind.GEMM)
            while product and kinds[product - 1] is Kind.CAST:
                product -= 1  # the quantisation of the product's input
            return before, Stage.EXPERTS, product
        case Stage.ROUTER, (Stage.DISPATCH | Stage.EXPERTS):
            border = _first(kinds, (Kind.CAST, Kind.ALLOC))
            return before, after, num if border is None else border
        case (one, Stage.EMBED) if one is HOST:
            # Compiled: the vocabulary's mask of this rank, or all that runs before the layers.
            border = _first(kinds, (Kind.COMPILED,))
            return before, after, num if border is None else border
        case Stage.DISPATCH, (Stage.EXPERTS | Stage.COMBINE):
            return Stage.EXPERTS, Stage.EXPERTS, 0
        case Stage.EXPERTS, Stage.ROUTER:
            border = _after(kinds, _PRODUCTS)  # a shared expert's second product
            return before, after, 0 if border is None else border
        case Stage.COMBINE, Stage.EXPERTS:
            border = _first(kinds, _PRODUCTS)
            return before, after, num if border is None else border
        case (_, Stage.ATTENTION | Stage.ROUTER | Stage.HEAD):
            border = _first(kinds, _NORMS)
            if border is None and (before is Stage.EXPERTS or before is HOST):
                border = _first(kinds, (Kind.COMPILED,))  # which has the norm
            if border is None and before is Stage.EXPERTS:
                border = _after(kinds, _PRODUCTS)
            if border is None and before in (Stage.HEAD, Stage.EMBED, HOST):
                border = _first(kinds, _PRODUCTS)
            return before, after, 0 if border is None else border
        case _:
            return before, before, num


def _first(kinds: Sequence[Kind], wanted: Sequence[Kind]) -> int | None:
    return next((number for number, kind in enumerate(kinds) if kind in wanted), None)


def _last_norm(kinds: Sequence[Kind]) -> int | None:
    """Index of the first operator of the last norm, which may consist of several."""
    norms = [at for at, kind in enumerate(kinds) if kind is Kind.NORM]
    if not norms:
        return None
    begin = norms.pop()
    while norms and begin - norms[-1] <= _NORM_GAP and Kind.GEMM not in kinds[norms[-1] : begin]:
        begin = norms.pop()
    return begin


def _after(kinds: Sequence[Kind], wanted: Sequence[Kind]) -> int | None:
    first = _first(kinds, wanted)
    return None if first is None else first + 1
