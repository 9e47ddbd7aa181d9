"""Drawing tokens from scores, for many sequences at once; each row is independent of the others."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

# SplitMix64: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_NUM_BITS = 48  # of a uniform number: a little under float64's, so that u · total < total

_NUM_DIGITS = 3  # of a float32 from 0 to 1, whose two highest bits are 0
_DIGIT_BITS = 10
_RADIX = 1 << _DIGIT_BITS
_GREATEST_KEY = (1 << _NUM_DIGITS * _DIGIT_BITS) - 1
_BLOCK = 128  # tokens whose probabilities are summed together when drawing


def uniform_numbers(
    seeds: npt.NDArray[np.uint64], indices: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, index): output `index` of SplitMix64 from `seed`.

    Args:
        seeds, indices: [num_rows]; an index is 0 or more.

    Returns:
        [num_rows].
    """
    bits = seeds + (indices.astype(np.uint64) + np.uint64(1)) * _GAMMA
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    bits ^= bits >> np.uint64(31)
    upper: npt.NDArray[np.float64] = (bits >> np.uint64(64 - _NUM_BITS)).astype(np.float64)
    return upper * 2.0**-_NUM_BITS


def probabilities(scores: Tensor, greatest: Tensor, temperature: Tensor) -> Tensor:
    """Softmax of (scores - greatest) / temperature, which does not overflow at tiny temperatures.

    Args:
        scores: [num_rows, vocab_size]; some may be -inf.
        greatest: [num_rows, 1]; finite.
        temperature: [num_rows, 1]; above 0.

    Returns:
        [num_rows, vocab_size] float32.
    """
    return (scores - greatest).div_(temperature).softmax(1)


def keep_likeliest(
    p: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """Apply top-k, then top-p to the probability that is left, then min-p; None leaves one out.

    Args:
        p: [num_rows, vocab_size] float32; probabilities.
        top_k: [num_rows, 1] float64; tokens to keep, inf for all.
        top_p: [num_rows, 1] float64; share to keep of the probability that top-k left, inf for all.
        min_p: [num_rows, 1] float32; the least ratio to the likeliest.

    Returns:
        [num_rows, vocab_size] float32; `p` with 0 for tokens that are not kept.
    """
    if top_k is not None:
        ones = p.new_ones((), dtype=torch.float64).expand_as(p)
        # Half a token less than k, since counts are whole and a share is rounded.
        p = _at_least(p, _threshold(p, ones, (top_k - 0.5) / p.shape[1]))
        if top_p is not None:
            p = _at_least(p, _threshold_of_few(p, top_p))
    elif top_p is not None:
        p = _at_least(p, _threshold(p, p.double(), top_p))
    if min_p is not None:
        p = _at_least(p, min_p * p.amax(1, keepdim=True))
    return p


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the probabilities, summed in vocabulary order, pass uniform · their sum.

    Args:
        p: [num_rows, vocab_size]; need not sum to 1.
        uniform: [num_rows] float64; in [0, 1).

    Returns:
        [num_rows]; token ids.
    """
    # Blocks first, then inside one block: a cumulative sum of all tokens would take longest.
    num_rows, vocab_size = p.shape
    if vocab_size % _BLOCK:
        p = F.pad(p, (0, -vocab_size % _BLOCK))
    blocks = p.view(num_rows, -(-vocab_size // _BLOCK), _BLOCK)
    sums = blocks.sum(2, dtype=torch.float64)
    passed = sums.cumsum(1)
    goal = uniform[:, None] * passed[:, -1:]
    block = torch.searchsorted(passed, goal, right=True)
    inside = blocks.take_along_dim(block[:, :, None], 1).squeeze(1).double().cumsum(1)
    goal -= passed.gather(1, block) - sums.gather(1, block)
    # Rounding must not carry the goal out of the block, nor to a token of probability 0.
    total = inside[:, -1:]
    goal = goal.clamp(min=0).minimum(total.nextafter(torch.zeros_like(total)))
    return (block * _BLOCK + torch.searchsorted(inside, goal, right=True)).squeeze(1)


def token_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of given tokens and of the likeliest, the lowest id of equals first.

    Args:
        logits: [num_rows, vocab_size] float32.
        token_ids: [num_rows].

    Returns:
        Log-probabilities of the given tokens, [num_rows]; ids of the likeliest, and their
        log-probabilities, both [num_rows, num_top].
    """
    logprobs = logits.log_softmax(1)
    chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1)
    if not num_top:
        return chosen, token_ids.new_empty(len(logits), 0), logprobs[:, :0]
    vocab_size = logits.shape[1]
    # Whole numbers that order by log-probability, which is never positive, then by token id.
    keys = logprobs.abs().view(torch.int32).long().mul_(vocab_size)
    keys += torch.arange(vocab_size, device=keys.device)
    ids = keys.topk(num_top, 1, largest=False).values % vocab_size
    return chosen, ids, logprobs.gather(1, ids)


def _at_least(p: Tensor, threshold: Tensor) -> Tensor:
    """`p` with 0 for values below their row's threshold, [num_rows, 1]."""
    kept = torch.empty_like(p)  # not booleans, which torch is several times slower with
    return torch.ge(p, threshold, out=kept).mul_(p)


def _threshold(p: Tensor, weights: Tensor, share: Tensor) -> Tensor:
    """The least of the greatest probabilities that together hold a share of their row's weight.

    A radix selection, digit by digit from the greatest: the bits of positive numbers order as the
    numbers do. It is several times faster than sorting, however flat the distribution.

    Args:
        p: [num_rows, vocab_size] float32; 0 to 1.
        weights: [num_rows, vocab_size] float64.
        share: [num_rows, 1] float64; more than 1 takes all.

    Returns:
        [num_rows, 1] float32; 0 where all are taken.
    """
    keys = _keys(p)
    shift = (_NUM_DIGITS - 1) * _DIGIT_BITS
    digits = keys >> shift
    histogram = weights.new_zeros(len(p), _RADIX).scatter_add_(1, digits.long(), weights)
    digit, goal = _digit_of_goal(histogram, share * histogram.cumsum(1)[:, -1:])
    # The last digit holds tokens too unlikely to be drawn, mostly zeros: take it whole.
    sought = torch.where(digit == _RADIX - 1, -1, digit).int()
    chosen = torch.eq(digits, sought, out=torch.empty_like(digits)).bool()
    rows = torch.arange(len(p), device=p.device)[:, None].expand_as(p)
    entries = _only(chosen, rows, keys, weights)
    return _select(*entries, goal, digit << shift, shift)


def _threshold_of_few(p: Tensor, share: Tensor) -> Tensor:
    """`_threshold` with the probabilities as weights, most of which are 0."""
    rows = torch.arange(len(p), device=p.device)[:, None].expand_as(p)
    rows, values, weights = _only(p > 0, rows, p, p)
    weights = weights.double()
    goal = share * weights.new_zeros(len(p)).index_add_(0, rows, weights)[:, None]
    start = torch.zeros_like(goal, dtype=torch.int64)
    return _select(rows, _keys(values), weights, goal, start, _NUM_DIGITS * _DIGIT_BITS)


def _only(chosen: Tensor, *columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen entries of three columns, of which the last holds weights."""
    if chosen.device.type != "cpu":
        return _all_weighted(chosen, *columns)
    places = chosen.nonzero(as_tuple=True)
    rows, keys, weights = (column[places] for column in columns)
    return rows, keys, weights


def _all_weighted(chosen: Tensor, *columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All entries, those not chosen with weight 0.

    It replaces `_only` on GPUs, where the host would have to wait for the number of entries.
    """
    rows, keys, weights = (column.reshape(-1) for column in columns)
    return rows, keys, weights * chosen.reshape(-1)


def _keys(p: Tensor) -> Tensor:
    """int32 keys of `_NUM_DIGITS` digits, in the shape of p; the greatest value has the least."""
    return p.view(torch.int32) ^ _GREATEST_KEY


def _select(
    rows: Tensor, keys: Tensor, weights: Tensor, goal: Tensor, selected: Tensor, shift: int
) -> Tensor:
    """Find the digits below bit `shift` of each row's key, among the entries that can still be it.

    Args:
        rows, keys, weights: [num_entries].
        goal: [num_rows, 1]; the weight that these entries have to reach.
        selected: [num_rows, 1]; the higher digits of the keys.

    Returns:
        [num_rows, 1] float32; the probability of the key.
    """
    num_rows = len(goal)
    while shift:
        shift -= _DIGIT_BITS
        digits = (keys >> shift) & (_RADIX - 1)
        flat = weights.new_zeros(num_rows * _RADIX)
        histogram = flat.index_add_(0, rows * _RADIX + digits, weights).view(num_rows, _RADIX)
        digit, goal = _digit_of_goal(histogram, goal)
        selected = selected + (digit << shift)
        rows, keys, weights = _only(digits == digit[rows, 0], rows, keys, weights)
    return (selected.int() ^ _GREATEST_KEY).view(torch.float32)


def _digit_of_goal(histogram: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """The digit at which the cumulative weight reaches a goal; the last one if it never does.

    Returns:
        The digit, and the rest of the goal for its own entries: both [num_rows, 1].
    """
    taken = histogram.cumsum(1)
    digit = torch.searchsorted(taken, goal).clamp_(max=_RADIX - 1)
    return digit, goal - (taken.gather(1, digit) - histogram.gather(1, digit))
