"""The verdict on a server from log-probabilities under several conditions, and its likely cause."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from expertlane.endpoint.scored import PromptScores
from expertlane.endpoint.statistics import (
    FALSE_ALARMS,
    TOLERATED,
    Bools,
    Differences,
    Floats,
    Test,
    drawn_rounding,
    find_position,
    fit_scales,
    least_scale,
    least_seen,
    name_experts,
    run_tests,
    usual_scale,
)
from expertlane.results.verified_record import (
    Against,
    ConditionRecord,
    ExpertRecord,
    SignificanceRecord,
    TokenRecord,
    Verdict,
)

ALONE, AGAIN = "alone", "again, alone"
_LEAST_TOKENS = 200
_BLUNT = 0.5  # nats: no use in a test that misses this
_MANY_EXCUSED = 0.2
_MUCH = 3.0  # times what is tolerated: beyond, even rounding that was not measured is none
_FAR = 8.0  # scales
_NEAR_TIE = 1e-5  # of a router's scores, in float32
_FINER = 0.05  # median size over rounding's: a server that rounds less than was thought
_UNRELATED = 0.2  # correlation of log-probabilities: those of one model, if wrong, have more
_MOST_WORST = 20
_LEAST_P = 1e-50


@dataclass(frozen=True, eq=False)
class Rounding:
    """Sequences as a reference scores them, and what rounding does to them.

    Attributes:
        exact: of every sequence; logprobs of float32, or of the second server.
        rounding: of every sequence [len - 1], differences by rounding; drawn where not measured.
        scales: of every sequence [len - 1], in nats.
        is_measured: whether the rounding was measured.
        own: what a server is granted against itself, where that is less: rounded weights are the
            same in both. None for the same, as both round.
    """

    exact: Sequence[PromptScores]
    rounding: Sequence[Floats]
    scales: Sequence[Floats]
    is_measured: bool
    own: "Rounding | None" = None


@dataclass(frozen=True, eq=False)
class ConditionScores:
    """A server's log-probabilities of tokens, under one condition.

    Attributes:
        name: name of the condition.
        logprobs: [len - 1] by sequence, NaN where it gave none; sequences may be missing.
        rank: the data-parallel rank that was asked; None for any.
        num_at_once: requests at once.
        is_warm: whether the prompt's beginning was in the prefix cache.
        is_generated: whether the server generated the tokens, or they were given.
    """

    name: str
    logprobs: dict[int, Floats]
    rank: int | None = None
    num_at_once: int = 1
    is_warm: bool = False
    is_generated: bool = False

    @property
    def against(self) -> Against:
        """The side it is compared with: for ranks, and the first condition, the reference."""
        return "reference" if self.name == ALONE or self.rank is not None else "alone"


@dataclass(frozen=True, eq=False)
class Comparison:
    """A condition's tokens, compared."""

    observed: ConditionScores
    compared: Differences
    tests: tuple[Test, ...]
    expected: Floats = field(repr=False)
    token_ids: Floats = field(repr=False)

    def alarms(self, alarm: float) -> tuple[str, ...]:
        """Names of its tests that alarm."""
        return tuple(each.name for each in self.tests if each.is_alarm(alarm))


def measured_rounding(
    exact: Sequence[PromptScores], rounded: Sequence[PromptScores], dtype: str
) -> Rounding:
    """Rounding of every token in a number type, with a scale for tokens that are alike."""
    apart = [one.logprobs - other.logprobs for one, other in zip(rounded, exact, strict=True)]
    joined = np.concatenate(apart)
    known = np.isfinite(joined)
    scales = np.full(len(joined), np.nan)
    margins = [_margins(each)[:-1] for each in exact]
    logprobs = np.concatenate([each.logprobs for each in exact])
    near = np.concatenate(margins)[known] if all(map(_has_margins, exact)) else None
    scales[known] = fit_scales(joined[known], logprobs[known], near, least_scale(dtype))
    ends = np.cumsum([len(each) for each in apart])[:-1]
    return Rounding(exact, apart, np.split(scales, ends), is_measured=True)


def usual_rounding(exact: Sequence[PromptScores], dtype: str) -> Rounding:
    """Rounding of the usual size of a number type; of float32 a bound that is sure."""
    scale = usual_scale(dtype)
    lens = [len(each.logprobs) for each in exact]
    drawn = np.split(drawn_rounding(sum(lens), scale), np.cumsum(lens)[:-1])
    is_sure = dtype == "float32" and all(map(_has_margins, exact))
    return Rounding(exact, drawn, [np.full(each, scale) for each in lens], is_measured=is_sure)


def _has_margins(scored: PromptScores) -> bool:
    return scored.router_margins is not None


def _margins(scored: PromptScores) -> Floats:
    """[len]: the least of each token's margins; infinite where they aren't known."""
    if scored.router_margins is None or not len(scored.router_margins):
        return np.full(len(scored.token_ids), np.inf)
    return np.asarray(scored.router_margins.min(axis=0), dtype=np.float64)


def rounds_less(alone: ConditionScores, rounded: Rounding) -> bool:
    """Whether a server rounds far less than the number type that was taken for its own."""
    sizes, rounding = [], []
    for place, own in alone.logprobs.items():
        apart = own - rounded.exact[place].logprobs
        known = np.isfinite(apart)
        sizes.append(np.abs(apart[known]))
        rounding.append(np.abs(rounded.rounding[place][known]))
    if not sizes:
        return False
    return bool(np.median(np.concatenate(sizes)) < _FINER * np.median(np.concatenate(rounding)))


def rounds_as_float32(observed: Sequence[ConditionScores]) -> bool:
    """Whether a server under load is as near to itself alone as float32 is, in most tokens.

    The same request again says nothing: it may be computed in the very same order.
    """
    alone, sizes = observed[0].logprobs, []
    for each in observed[1:]:
        if each.name != AGAIN and each.against == "alone":
            sizes += [np.abs(own - alone[at]) for at, own in each.logprobs.items() if at in alone]
    joined = np.concatenate([*sizes, np.empty(0)])
    joined = joined[np.isfinite(joined)]
    return bool(len(joined)) and float(np.median(joined)) < TOLERATED * usual_scale("float32")


def compare(observed: ConditionScores, alone: ConditionScores, rounded: Rounding) -> Comparison:
    """A condition's tokens against the reference, or against themselves alone."""
    is_own = observed.against == "alone"
    if is_own and rounded.own is not None:
        rounded = rounded.own
    parts: list[Differences] = []
    expected, token_ids = [], []
    for place, own in sorted(observed.logprobs.items()):
        scored = rounded.exact[place]
        other = alone.logprobs.get(place) if is_own else scored.logprobs
        if other is None:
            continue
        apart = own - other
        known = np.isfinite(apart) & np.isfinite(rounded.scales[place])
        factor = 2**0.5 if is_own else 1.0  # both round
        positions = np.arange(1, len(scored.token_ids))
        routed = scored.topk_ids
        parts.append(
            Differences(
                apart[known],
                factor * rounded.rounding[place][known],
                factor * rounded.scales[place][known],
                np.full(int(known.sum()), place),
                positions[known],
                # The token before is the one that was computed to tell this one's probability.
                None if routed is None else routed[:, :-1][:, known],
                rounded.is_measured,
                is_own,
                observed.is_generated,
            )
        )
        expected.append(other[known])
        token_ids.append(scored.token_ids[1:][known])
    compared = _joined(parts)
    return Comparison(
        observed,
        compared,
        tuple(_tests(compared)),
        np.concatenate([*expected, np.empty(0)]),
        np.concatenate([*token_ids, np.empty(0)]),
    )


def _joined(parts: Sequence[Differences]) -> Differences:
    routed = [each.topk_ids for each in parts if each.topk_ids is not None]
    empty = np.empty(0)

    def all_of(name: str) -> Floats:
        return np.concatenate([getattr(each, name) for each in parts] or [empty])

    return Differences(
        all_of("differences"),
        all_of("rounding"),
        all_of("scales"),
        all_of("prompts").astype(np.int64),
        all_of("positions").astype(np.int64),
        np.concatenate(routed, axis=1) if parts and len(routed) == len(parts) else None,
        all(each.is_measured for each in parts),
        all(each.is_own for each in parts),
        any(each.is_greedy for each in parts),
    )


def _tests(compared: Differences) -> Iterator[Test]:
    """Tests; where rounding was not measured, they must hold without the farthest prompt too.

    A router's flip at a near tie moves all that follows it in one prompt.
    """
    tests = run_tests(compared)
    if compared.is_measured or not tests:
        yield from tests
        return
    sums = np.bincount(compared.prompts, np.log1p(np.square(compared.sizes)))
    rest = {each.name: each for each in run_tests(compared.of(compared.prompts != sums.argmax()))}
    for each in tests:
        other = rest.get(each.name)
        yield (
            each._replace(p_value=1.0)
            if other is None
            else max(each, other, key=lambda test: test.p_value)
        )


def excuse_ties(
    observed: Sequence[ConditionScores], rounded: Rounding, *, is_own: bool = False
) -> tuple[list[ConditionScores], int]:
    """Leave out what follows a near tie of a router at which a float32 server chose otherwise.

    There the first token of a prompt that is far off stands at a router margin of at most
    `_NEAR_TIE`, which no float32 implementation can hold; all before it is within rounding.

    Args:
        is_own: whether conditions are compared with the first one, else all with the reference.

    Returns:
        the same without those tokens, and the largest number of prompts so excused in one.
    """
    kept, most = [], 0
    for each in observed:
        excused = 0
        logprobs = {}
        if is_own and each.against == "reference":
            kept.append(each)
            continue
        for place, own in each.logprobs.items():
            scored = rounded.exact[place]
            expected = observed[0].logprobs.get(place) if is_own else scored.logprobs
            if expected is None:
                continue
            sizes = np.abs(own - expected) / rounded.scales[place]
            far = np.flatnonzero(np.nan_to_num(sizes) > _FAR)
            if len(far):
                # Of `logprobs[i]` the choices were those of token i.
                near = _margins(scored)[max(far[0] - 1, 0) : far[0] + 1].min()
                if near <= _NEAR_TIE:
                    excused += 1
                    own = own.copy()
                    own[max(far[0] - 1, 0) :] = np.nan
            logprobs[place] = own
        most = max(most, excused)
        kept.append(replace(each, logprobs=logprobs))
    return kept, most


def _spread(compared: Differences) -> float:
    """The tenth of the tokens that is farthest off, over rounding's, by their least sizes."""
    own, rounding = compared.sizes, np.abs(compared.rounding) / compared.scales
    return float(np.quantile(own, 0.9) / max(np.quantile(rounding, 0.9), 1e-9))


@dataclass(frozen=True)
class _Cause:
    """The likely cause of differences; fields as in `VerifiedRecord`."""

    why: list[str]
    experts: Sequence[ExpertRecord] = ()
    position: int | None = None
    ranks: Sequence[int] = ()


@dataclass(frozen=True)
class Finding:
    """The answer and what it rests on; fields as in `VerifiedRecord`."""

    verdict: Verdict
    why: tuple[str, ...]
    conditions: tuple[ConditionRecord, ...]
    tests: tuple[SignificanceRecord, ...]
    worst: tuple[TokenRecord, ...]
    experts: tuple[ExpertRecord, ...]
    position: int | None
    ranks: tuple[int, ...]
    least_seen: float | None
    least_seen_expert: float | None
    alarm: float
    num_excused: int


def judge(observed: Sequence[ConditionScores], rounded: Rounding, dtype: str) -> Finding:
    """Compare every condition and answer.

    Args:
        observed: the first is `ALONE`.
        dtype: number type whose rounding was taken.
    """
    num_excused = 0
    if dtype == "float32":
        observed, num_excused = excuse_ties(observed, rounded)
    elif rounded.own is not None:
        observed, num_excused = excuse_ties(observed, rounded.own, is_own=True)
    alone = observed[0]
    comparisons = [compare(each, alone, rounded) for each in observed]
    alarm = FALSE_ALARMS / max(1, sum(len(each.tests) for each in comparisons))
    off = [each for each in comparisons if each.alarms(alarm)]
    first = comparisons[0]
    seen = of_expert = float("inf")
    if first not in off and len(first.compared):
        seen = least_seen(first.compared, alarm, tests=_tests)
        of_expert = _least_of_expert(first.compared, alarm)
    doubt = _doubt(first, off, seen, num_excused, dtype)
    cause = _causes(comparisons, off) if off and not doubt else _Cause(doubt)
    verdict: Verdict = "can't tell" if doubt else "differs" if off else "same"
    return Finding(
        verdict,
        tuple(cause.why),
        tuple(_condition(each, alarm) for each in comparisons),
        tuple(_test(each.observed.name, test) for each in comparisons for test in each.tests),
        tuple(_worst(off)) if verdict == "differs" else (),
        tuple(cause.experts),
        cause.position,
        tuple(cause.ranks),
        _finite(seen),
        _finite(of_expert),
        alarm,
        num_excused,
    )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _least_of_expert(compared: Differences, alarm: float) -> float:
    """The least error of an expert's tokens that would be seen; an expert of median popularity."""
    if compared.topk_ids is None or not len(compared):
        return float("inf")
    routed = compared.topk_ids[len(compared.topk_ids) // 2]
    experts, nums = np.unique(routed, return_counts=True)
    expert = experts[np.argsort(nums)[len(nums) // 2]]
    chosen: Bools = (routed == expert).any(axis=1)
    return least_seen(compared, alarm, chosen, _tests)


def _doubt(
    first: Comparison, off: Sequence[Comparison], seen: float, num_excused: int, dtype: str
) -> list[str]:
    """Reasons for the answer *can't tell*; empty if there are none."""
    num, found = len(first.compared), []
    num_prompts = len(first.observed.logprobs)
    if num < _LEAST_TOKENS:
        found.append(
            f"Only {num} tokens could be compared; {_LEAST_TOKENS} are needed. Give a longer "
            "--budget-s, or no --quick."
        )
    elif num_excused > max(2, _MANY_EXCUSED * num_prompts):
        found.append(
            f"{num_excused} of {num_prompts} prompts left the reference at near ties of a router. "
            "Give the number type that the server computes in with --dtype."
        )
    elif not off and not seen <= _BLUNT:
        found.append(
            f"Rounding of {dtype} hides whatever is smaller than {seen:.2g} nats of a token's "
            "log-probability. More would be told of the same model served in a finer number type."
        )
    elif off and not first.compared.is_measured:
        spread = max(_spread(each.compared) for each in off)
        if spread < _MUCH * TOLERATED:
            found.append(
                f"A difference is seen, but of {spread:.1f} times the usual rounding of {dtype}, "
                "which was not measured for this model. --reference CHECKPOINT measures it; "
                "--dtype names the number type."
            )
    return found


def _causes(comparisons: Sequence[Comparison], off: Sequence[Comparison]) -> _Cause:
    """The likely cause: where it holds, and where it does not."""
    first = comparisons[0]
    ranks = [each for each in comparisons if each.observed.rank is not None]
    off_ranks = [each.observed.rank for each in ranks if each in off]
    if off_ranks and len(off_ranks) < len(ranks):
        names = ", ".join(map(str, off_ranks))
        clean = next(each for each in off if each.observed.rank is not None)
        said = f"Only data-parallel {_ranks(len(off_ranks))} {names} of {len(ranks)}."
        within = _within(clean.compared)
        numbers = [each for each in off_ranks if each is not None]
        return replace(within, why=[said, *within.why], ranks=numbers)
    if first not in off:
        return _of_conditions(comparisons, off)
    if any(each.observed.name == AGAIN for each in off):
        return _Cause(
            [
                "The same prompt gets other answers when it is asked again: as if requests went to "
                "replicas or ranks of which some are wrong, or chance had a part, as in a race."
            ]
        )
    if _is_unrelated(first):
        return _Cause(
            [
                "The log-probabilities have nothing in common with the reference's, as of another "
                "model or another tokenizer: is it the same checkpoint?"
            ]
        )
    return _within(first.compared)


def _is_unrelated(first: Comparison) -> bool:
    """Whether server and reference agree no better on which tokens are likely than two models."""
    own = first.expected + first.compared.differences
    spread = float(own.std() * first.expected.std())
    common = float(((own - own.mean()) * (first.expected - first.expected.mean())).mean())
    return spread > 0 and common / spread < _UNRELATED


def _ranks(num: int) -> str:
    return "rank" if num == 1 else "ranks"


def _of_conditions(comparisons: Sequence[Comparison], off: Sequence[Comparison]) -> _Cause:
    """Alone it is right: what the conditions under which it is not have in common."""
    names = ", ".join(each.observed.name for each in off)
    why = [f"Alone it computes the model; not so: {names}."]
    sizes = {each.observed.num_at_once for each in off}
    clean = [each for each in comparisons if each not in off]
    generated = [each.observed.is_generated for each in off]
    if min(sizes) > 1:
        least = min(sizes)
        most = max((each.observed.num_at_once for each in clean), default=1)
        why.append(
            f"Likely cause: under load only, from {least} requests at once"
            + (f"; {most} at once are right." if most < least else ".")
        )
    elif all(each.observed.is_warm for each in off):
        why.append("Likely cause: blocks of the prefix cache that are stale or of other prompts.")
    elif all(generated) and not any(each.observed.is_generated for each in clean):
        why.append("Likely cause: decoding, since given prompts are scored right.")
    within = _within(max(off, key=lambda each: len(each.compared)).compared)
    is_place = within.position is not None or within.experts
    return replace(within, why=[*why, *(within.why if is_place else ())])


def _within(compared: Differences) -> _Cause:
    """Which tokens are off: from a position on, of some experts, or all."""
    position = find_position(compared)
    if position is not None:
        said = f"Likely cause: long contexts only, from about token {position:,} on."
        return _Cause([said], position=position)
    named = name_experts(compared)
    experts = [ExpertRecord(*each[:5], _p(each.p_value)) for each in named]
    if experts:
        return _Cause([_said_of(experts, compared)], experts)
    if compared.topk_ids is None:
        return _Cause(["Which experts or layers can't be told without a checkpoint."])
    return _Cause(
        [
            "Tokens of all experts are off alike: likely what every token passes, such as "
            "attention, norms, shared experts, the head, or how experts are chosen and weighted."
        ]
    )


def _said_of(experts: Sequence[ExpertRecord], compared: Differences) -> str:
    assert compared.topk_ids is not None, "experts are named by it"
    layers = sorted({each.layer for each in experts})
    ids = sorted({each.expert for each in experts})
    num_layers = len(compared.topk_ids)
    if len(layers) > max(1, num_layers // 2) and len(ids) > 1:
        return (
            f"Likely experts: {', '.join(map(str, ids))} in {len(layers)} of {num_layers} layers, "
            "as if all experts of one rank were wrong."
        )
    several = [f"{each.expert} of MoE layer {each.layer}" for each in experts[:4]]
    more = f" and {len(experts) - 4} more" if len(experts) > 4 else ""
    return f"Likely expert{'s' * (len(experts) > 1)}: {', '.join(several)}{more}."


def _condition(comparison: Comparison, alarm: float) -> ConditionRecord:
    sizes = np.abs(comparison.compared.differences)
    sizes = sizes if len(sizes) else np.zeros(1)
    rounding = np.abs(comparison.compared.rounding)
    rounding = rounding if len(rounding) else np.zeros(1)
    return ConditionRecord(
        comparison.observed.name,
        comparison.observed.against,
        len(comparison.observed.logprobs),
        len(comparison.compared),
        float(np.median(sizes)),
        float(np.quantile(sizes, 0.99)),
        float(sizes.max()),
        float(np.median(rounding)),
        float(np.quantile(rounding, 0.99)),
        float((comparison.compared.sizes > _FAR).mean()) if len(comparison.compared) else 0.0,
        comparison.alarms(alarm),
    )


def _test(condition: str, test: Test) -> SignificanceRecord:
    return SignificanceRecord(condition, test.name, test.what, test.statistic, _p(test.p_value))


def _p(value: float) -> float:
    """A chance as a file takes it: it has no numbers that are too small to calculate with."""
    return 0.0 if value < _LEAST_P else value


def _worst(off: Sequence[Comparison]) -> Iterator[TokenRecord]:
    """The tokens that are farthest off, of the first condition that is."""
    own = off[0]
    compared = own.compared
    for place in np.argsort(-compared.sizes)[:_MOST_WORST]:
        expected = float(own.expected[place])
        yield TokenRecord(
            own.observed.name,
            int(compared.prompts[place]),
            int(compared.positions[place]),
            int(own.token_ids[place]),
            expected + float(compared.differences[place]),
            expected,
            float(compared.scales[place]),
        )
