"""Tests whether differences of log-probabilities are larger than rounding, token by token.

A server's differences `d` from a reference stand beside differences `c` that rounding alone made on
the same tokens, such as the reference's own in bfloat16 from itself in float32. Where a server only
rounds, `d` of a token is as likely to be the larger of the two as `c`: so of blocks of tokens, the
difference `u` of any of their sums is as likely positive as negative, whatever their distribution,
router flips included. For `T = sum(u) / sqrt(sum(u ** 2))` with independent fair signs

    P(T >= t) <= exp(-t ** 2 / 2)

holds for every number of blocks (Hoeffding, Probability inequalities for sums of bounded random
variables, 1963; for self-normalised sums Efron, Student's t-test under symmetry conditions, 1969).
That is the bound behind every test here but `outliers`. Rounding of another implementation is
granted `TOLERATED` times the scale, so that only what exceeds it counts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

FALSE_ALARMS = 0.01  # the most of all runs on a good server
TOLERATED = 2.0  # scale of another implementation's rounding, over the reference's
_TOLERATED_SHIFT = 0.15  # of the mean, in scales
_TOLERATED_FLIPS = 3.0  # how often another implementation's routers flip, over the reference's
_FAR, _FAR_SHARE = 8.0, 0.004  # scales, and share of rounding's tokens beyond: router flips
_CLIPPED = 4.0  # scales, of one token in a mean
_BLOCK, _SHORT_BLOCK = 64, 16  # tokens
_FEW_BLOCKS = 48
_LEAST_TOKENS = 32  # of a group that is tested
_LEAST_IN_BIN = 48
_MAD = 0.6744897501960817  # median of the size of a standard normal number
_TAIL_SHARE, _LEAST_TAIL = 0.1, 0.05
_TAIL_FACTORS = 1.5, 1.25  # of the mean excess, for the most and the second most deviating prompt
_EDGES = 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536
_MOST_NAMED = 24  # experts
_NAMED_ALARM = 1e-3
_FAR_BEFORE = 4.0  # the share of far tokens after a position is so many times that before it
_EPSILONS = {  # half a unit in the last place of 1; of scaled integers at their usual spread
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "int8": 2.0**-8,
    "float8": 2.0**-4,
    "nvfp4": 2.0**-2,
    "mxfp4": 2.0**-2,
    "int4": 2.0**-4,
}
_USUAL, _LEAST = 8.0, 0.5  # scale of log-probabilities, over epsilon: usual, and at least
_FLOAT32_SCALE = 5e-5  # sums of thousands of terms, and logits of tens: 1e-5 of them


def usual_scale(dtype: str) -> float:
    """Scale of log-probabilities' rounding, in nats, that is taken where it cannot be measured."""
    return _FLOAT32_SCALE if dtype == "float32" else _USUAL * _EPSILONS[dtype]


def least_scale(dtype: str) -> float:
    """Scale, in nats, under which no difference counts, however little a reference rounds."""
    return _FLOAT32_SCALE if dtype == "float32" else _LEAST * _EPSILONS[dtype]


def drawn_rounding(num_tokens: int, scale: float) -> Floats:
    """Rounding where none was measured: normal, of this scale; the same numbers at every call."""
    return scale * np.random.default_rng(20).standard_normal(num_tokens)


@dataclass(frozen=True, eq=False)
class Differences:
    """Differences of tokens, and what rounding does to them; [num_tokens] each.

    Attributes:
        differences: of log-probabilities, in nats; all finite.
        rounding: differences that rounding made on the same tokens, or as large as those.
        scales: of rounding, in nats.
        prompts, positions: each token's prompt, and its index there.
        topk_ids: [num_moe_layers, num_tokens, top_k]; None where they aren't known.
        is_measured: whether the rounding was measured, else it is a usual one.
        is_own: whether a server is compared with itself: then both round alike, so that signs of
            differences are fair. Those from exact numbers are not: rounding makes given tokens less
            likely in the mean (Jensen's inequality).
        is_greedy: whether the server chose the tokens as the likeliest, by its own rounding: where
            two were nearly tied, that makes them likelier in its eyes.
    """

    differences: Floats
    rounding: Floats
    scales: Floats
    prompts: Ints
    positions: Ints
    topk_ids: Ints | None = None
    is_measured: bool = True
    is_own: bool = False
    is_greedy: bool = False

    def __len__(self) -> int:
        return len(self.differences)

    @property
    def sizes(self) -> Floats:
        """Sizes of the differences, in scales."""
        return np.abs(self.differences) / self.scales

    def of(self, chosen: Bools) -> "Differences":
        """Some of the tokens."""
        routed = None if self.topk_ids is None else self.topk_ids[:, chosen]
        return replace(
            self,
            differences=self.differences[chosen],
            rounding=self.rounding[chosen],
            scales=self.scales[chosen],
            prompts=self.prompts[chosen],
            positions=self.positions[chosen],
            topk_ids=routed,
        )

    def blocks(self, length: int) -> Ints:
        """[num_tokens]: the block of each, which is a range of positions of one prompt, from 0."""
        keys = self.prompts * (2**32) + self.positions // length
        _, found = np.unique(keys, return_inverse=True)
        return np.asarray(found.reshape(-1), dtype=np.int64)

    @property
    def spread(self) -> float:
        """Scale of the differences over that of rounding, by medians: of most tokens, not all."""
        own, other = np.median(self.sizes), np.median(np.abs(self.rounding) / self.scales)
        return float(own / max(other, 1e-9))


def fit_scales(rounding: Floats, logprobs: Floats, margins: Floats | None, least: float) -> Floats:
    """Scale of each token's rounding: of tokens that are alike the median size.

    A likely token's log-probability moves less, for a change of logits changes it by `1 - p` of
    that; a token whose experts were nearly others is moved more often.

    Args:
        rounding: [num_tokens], measured.
        logprobs: [num_tokens], of the reference.
        margins: [num_tokens], the least of a token's router margins over layers; None: unknown.
        least: in nats.
    """
    sizes = np.abs(rounding)
    found = np.full(len(sizes), _scale(sizes, least))
    surprise = _quantile_bins(1 - np.exp(np.minimum(logprobs, 0.0)), 4)
    near = np.zeros_like(surprise) if margins is None else _quantile_bins(margins, 3)
    cells = surprise * 3 + near
    for cell in np.unique(cells):
        inside = cells == cell
        if inside.sum() >= _LEAST_IN_BIN:
            found[inside] = _scale(sizes[inside], least)
    return found


def _scale(sizes: Floats, least: float) -> float:
    return max(float(np.median(sizes)) / _MAD, least) if len(sizes) else least


def _quantile_bins(values: Floats, num: int) -> Ints:
    edges = np.quantile(values, np.arange(1, num) / num)
    return np.searchsorted(edges, values).astype(np.int64)


TestName = Literal["size", "far", "higher", "lower", "outliers", "experts", "positions"]


class Test(NamedTuple):
    """A test of one comparison.

    Attributes:
        statistic: `T` of the module's text, or of `outliers` the excess in scales of their tail.
        p_value: bound on its chance where a server only rounds, its groups counted.
        what: the group that it is of: an expert or positions; empty for all tokens.
    """

    name: TestName
    statistic: float
    p_value: float
    what: str = ""

    def is_alarm(self, alarm: float) -> bool:
        """Whether its chance is too small for rounding."""
        return self.p_value < alarm


def _damped(sizes: Floats) -> Floats:
    """`log(1 + z ** 2)`: grows with every difference, and no single one outweighs the others."""
    return np.log1p(np.square(sizes))


def _bound(statistic: float, num: int = 1) -> float:
    return min(1.0, num * float(np.exp(-(max(statistic, 0.0) ** 2) / 2)))


def _self_normalised(sums: NDArray[Any]) -> float:
    """`T` of sums of blocks; 0 where all are 0."""
    norm = float(np.sqrt(np.square(sums).sum()))
    return float(sums.sum()) / norm if norm > 0 else 0.0


Tests = Callable[[Differences], Iterable[Test]]


def run_tests(compared: Differences) -> list[Test]:
    """All tests of one comparison.

    Returns:
        tests, in a fixed order and number but for groups that are unknown or too small.
    """
    if len(compared) < _LEAST_TOKENS:
        return []
    blocks = _usual_blocks(compared)
    own, rounding = compared.sizes, TOLERATED * np.abs(compared.rounding) / compared.scales
    excess = np.bincount(blocks, _damped(own) - _damped(rounding))
    limit = max(_FAR, float(np.quantile(rounding, 1 - _FAR_SHARE)))
    far = np.bincount(
        compared.blocks(_SHORT_BLOCK), (own > limit) - _TOLERATED_FLIPS * (rounding > limit)
    )
    found = [Test("size", *_tested(excess)), Test("far", *_tested(far))]
    found += _shifts(compared, blocks)
    found.append(_outliers(compared))
    relative = _relative_excess(compared)
    found += _group_test("experts", _by_expert(compared, relative, blocks))
    found += _group_test("positions", _by_position(compared, relative))
    return found


def _usual_blocks(compared: Differences) -> Ints:
    """Blocks of a length that leaves enough of them: `T` is at most the root of their number."""
    blocks = compared.blocks(_BLOCK)
    few = blocks.max(initial=0) + 1 < _FEW_BLOCKS
    return compared.blocks(_SHORT_BLOCK) if few else blocks


def _tested(sums: NDArray[Any]) -> tuple[float, float]:
    statistic = _self_normalised(sums)
    return statistic, _bound(statistic)


def _shifts(compared: Differences, blocks: Ints) -> Iterator[Test]:
    """Whether all log-probabilities are higher or lower, by more than a part of the scale.

    Sizes are clipped, so that flips of routers do not count more than others. Against itself, a
    server's differences have fair signs; against exact numbers they have those of rounding. Tokens
    that it chose as the likeliest may be higher.
    """

    def clipped(values: Floats) -> Floats:
        return np.clip(values / compared.scales, -_CLIPPED, _CLIPPED)

    moved = clipped(compared.differences)
    if not compared.is_own:
        moved -= clipped(compared.rounding)
    granted = np.bincount(blocks) * _TOLERATED_SHIFT
    signs: list[tuple[TestName, float]] = [("higher", 1.0), ("lower", -1.0)]
    for name, sign in signs[compared.is_greedy :]:
        sums = np.bincount(blocks, sign * moved)
        norm = float(np.sqrt(np.square(sums).sum()))
        statistic = float(sums.sum() - granted.sum()) / norm if norm > 0 else 0.0
        yield Test(name, statistic, _bound(statistic))


def _outliers(compared: Differences) -> Test:
    """Whether short blocks deviate by more than the tail of rounding's own blocks allows.

    Means of blocks above a high quantile `q` are taken as exponential with the mean excess `m`
    that rounding's have (peaks over threshold; Pickands, Statistical inference using extreme order
    statistics, 1975): `P(mean > x) = share * exp(-(x - q) / m)`, `m` several times what was seen,
    since flips make heavier tails. The largest block of each prompt counts; a block of a single
    prompt must be farther out than the second of two prompts.
    """
    blocks = compared.blocks(_SHORT_BLOCK)
    num = np.bincount(blocks)
    whole = num >= _SHORT_BLOCK // 2
    own = (np.bincount(blocks, _damped(compared.sizes)) / num)[whole]
    sizes = TOLERATED * np.abs(compared.rounding) / compared.scales
    rounding = (np.bincount(blocks, _damped(sizes)) / num)[whole]
    if len(own) < 2:
        return Test("outliers", 0.0, 1.0)
    first = np.unique(blocks, return_index=True)[1]
    prompts = compared.prompts[first][whole]
    high = float(np.quantile(rounding, 1 - _TAIL_SHARE))
    above = rounding[rounding > high]
    tail = max(float((above - high).mean()) if len(above) else 0.0, _LEAST_TAIL)
    largest = sorted(float(own[prompts == each].max()) for each in np.unique(prompts))[::-1]
    best, least = 0.0, 1.0
    for value, factor in zip(largest, _TAIL_FACTORS, strict=False):
        exponent = (value - high) / (factor * tail)
        p_value = min(1.0, 2 * len(own) * _TAIL_SHARE * float(np.exp(-max(exponent, 0.0))))
        if p_value < least:
            best, least = exponent, p_value
    return Test("outliers", best, least)


def _relative_excess(compared: Differences) -> Floats:
    """[num_tokens]: excess over rounding of the server's own scale, so that groups differ.

    That scale is by the median, which tokens of a few wrong experts do not move.
    """
    spread = min(max(1.25 * compared.spread, 1.25), TOLERATED)
    rounding = spread * np.abs(compared.rounding) / compared.scales
    return _damped(compared.sizes) - _damped(rounding)


class _Group(NamedTuple):
    name: str
    statistic: float


def _by_expert(compared: Differences, excess: Floats, blocks: Ints) -> list[_Group]:
    """`T` of the tokens of every expert of every layer."""
    if compared.topk_ids is None:
        return []
    found = []
    for layer, routed in enumerate(compared.topk_ids):
        for expert in np.unique(routed):
            inside = (routed == expert).any(axis=1)
            if inside.sum() >= _LEAST_TOKENS:
                sums = np.bincount(blocks[inside], excess[inside])
                found.append(_Group(f"{layer}:{expert}", _self_normalised(sums)))
    return found


def _by_position(compared: Differences, excess: Floats) -> list[_Group]:
    """`T` of the tokens of every range of positions, beyond what their prompts had before it.

    A flip early in a prompt moves all that follows; only what begins later counts here.
    """
    blocks = compared.blocks(_SHORT_BLOCK)
    found = []
    for low, high in pairwise((*_EDGES, 2**62)):
        early = compared.positions < low
        inside = (compared.positions >= low) & (compared.positions < high)
        if inside.sum() < _LEAST_TOKENS:
            continue
        num = np.bincount(compared.prompts[early], minlength=int(compared.prompts.max()) + 1)
        sums = np.bincount(compared.prompts[early], excess[early], minlength=len(num))
        before = np.maximum(sums / np.maximum(num, 1), 0.0)[compared.prompts]
        own = np.bincount(blocks[inside], (excess - before)[inside])
        found.append(_Group(f"{low}:", _self_normalised(own)))
    return found


def _group_test(name: TestName, groups: Sequence[_Group]) -> list[Test]:
    """The group with the largest `T`; its chance is that of any of them (Bonferroni)."""
    if not groups:
        return []
    most = max(groups, key=lambda each: each.statistic)
    return [Test(name, most.statistic, _bound(most.statistic, len(groups)), most.name)]


class NamedExpert(NamedTuple):
    """An expert whose tokens deviate more than others.

    Attributes:
        layer: index among MoE layers.
        inside, outside: median size of its tokens' differences and of others, in nats.
        p_value: bound on the chance of its association, all experts counted.
    """

    layer: int
    expert: int
    num_tokens: int
    inside: float
    outside: float
    p_value: float


def name_experts(compared: Differences) -> list[NamedExpert]:
    """Experts that are over-represented among tokens that deviate, the most striking first.

    Within every block, tokens of an expert are set against the block's others: `u` is the
    covariance of excess and choice, which is as likely positive as negative where the expert has no
    part in it. After each one found, what it explains is taken out (forward selection).
    """
    if compared.topk_ids is None or len(compared) < _LEAST_TOKENS:
        return []
    keys, chosen = _choices(compared.topk_ids)
    if not keys:
        return []
    blocks = _usual_blocks(compared)
    num = np.maximum(np.bincount(blocks), 1)
    centred = chosen - (_sums(blocks, chosen) / num)[:, blocks]
    excess = _damped(compared.sizes)
    sizes = np.abs(compared.differences)
    places: list[int] = []
    found: list[NamedExpert] = []
    left = excess - (np.bincount(blocks, excess) / num)[blocks]
    while len(found) < min(_MOST_NAMED, len(keys)):
        sums = _sums(blocks, centred * left)
        norms = np.sqrt(np.square(sums).sum(axis=1))
        statistics = np.where(norms > 0, sums.sum(axis=1) / np.maximum(norms, 1e-300), 0.0)
        statistics[places] = 0.0
        place = int(statistics.argmax())
        p_value = _bound(float(statistics[place]), len(keys))
        if p_value > _NAMED_ALARM:
            break
        places.append(place)
        inside = chosen[place] > 0
        layer, expert = keys[place]
        found.append(
            NamedExpert(
                layer,
                expert,
                int(inside.sum()),
                float(np.median(sizes[inside])),
                float(np.median(sizes[~inside])) if (~inside).any() else 0.0,
                p_value,
            )
        )
        fitted, *_ = np.linalg.lstsq(centred[places].T, excess, rcond=None)
        left = excess - fitted @ centred[places]
        left = left - (np.bincount(blocks, left) / num)[blocks]
    return found


def _choices(topk_ids: Ints) -> tuple[list[tuple[int, int]], Floats]:
    """(layer, expert) of those with enough tokens, and [their number, num_tokens], 1 if chosen."""
    keys, rows = [], []
    for layer, routed in enumerate(topk_ids):
        for expert in np.unique(routed):
            inside = (routed == expert).any(axis=1)
            if _LEAST_TOKENS // 2 <= inside.sum() < len(inside):
                keys.append((layer, int(expert)))
                rows.append(inside)
    return keys, np.array(rows, dtype=np.float64).reshape(len(keys), topk_ids.shape[1])


def _sums(blocks: Ints, values: Floats) -> Floats:
    """[..., num_blocks]: sums of the last axis by block."""
    order = np.argsort(blocks, kind="stable")
    starts = np.unique(blocks[order], return_index=True)[1]
    return np.add.reduceat(values[:, order], starts, axis=1)


def find_position(compared: Differences) -> int | None:
    """The first position from which on tokens deviate while those before do not; None without one.

    Tried are the usual edges, from the first on, then every block after the one that parts them.
    """
    excess = _relative_excess(compared)
    last = int(compared.positions.max())
    for edge in (each for each in _EDGES if each <= last):
        late = compared.positions >= edge
        if min(late.sum(), (~late).sum()) < _LEAST_TOKENS:
            continue
        is_parting = _is_off(compared, excess, late) and not _is_off(compared, excess, ~late)
        if (
            is_parting
            and _far_beyond_rounding(compared, ~late)
            <= _far_beyond_rounding(compared, late) / _FAR_BEFORE + _FAR_SHARE * _TOLERATED_FLIPS
        ):
            return _first_off(compared, excess, edge)
    return None


def _far_beyond_rounding(compared: Differences, inside: Bools) -> float:
    """Share of tokens that are far off, less those that rounding makes so."""
    own = compared.of(inside)
    return float((own.sizes > _FAR).mean() - (np.abs(own.rounding) > _FAR * own.scales).mean())


def _is_off(compared: Differences, excess: Floats, inside: Bools) -> bool:
    blocks = compared.blocks(_SHORT_BLOCK)[inside]
    own = np.median(compared.sizes[inside])
    rounding = np.median(np.abs(compared.rounding[inside]) / compared.scales[inside])
    statistic = _self_normalised(np.bincount(blocks, excess[inside]))
    return _bound(statistic) < _NAMED_ALARM and bool(own > TOLERATED * max(rounding, _MAD))


def _first_off(compared: Differences, excess: Floats, edge: int) -> int:
    """The start of the first short block from `edge` on whose tokens mostly deviate."""
    starts = compared.positions // _SHORT_BLOCK * _SHORT_BLOCK
    for start in np.unique(starts[compared.positions >= edge]):
        if np.median(compared.sizes[starts == start]) > _FAR / 2:
            return int(start)
    return edge


def least_seen(
    compared: Differences, alarm: float, chosen: Bools | None = None, tests: Tests | None = None
) -> float:
    """The least error, in nats, that would have been an alarm: planted into these differences.

    Args:
        chosen: the tokens that have it, such as those of one expert; None for all.
        tests: that the differences themselves passed; None for `run_tests`.

    Returns:
        standard deviation of the planted normal error; infinite where none up to 30 nats is seen.
    """
    tests = tests or run_tests
    planted = np.random.default_rng(40).standard_normal(len(compared))
    if chosen is not None:
        planted = planted * chosen
    low, high = float(np.log(1e-7)), float(np.log(30.0))
    if not _is_seen(compared, planted * np.exp(high), alarm, tests):
        return float("inf")
    for _ in range(12):
        middle = (low + high) / 2
        if _is_seen(compared, planted * np.exp(middle), alarm, tests):
            high = middle
        else:
            low = middle
    return float(np.exp(high))


def _is_seen(compared: Differences, planted: Floats, alarm: float, tests: Tests) -> bool:
    more = replace(compared, differences=compared.differences + planted)
    return any(each.is_alarm(alarm) for each in tests(more))
