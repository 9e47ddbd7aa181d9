"""What the busiest rank does where routing is skewed: the law of imbalance that is judged.

aiconfigurator draws the experts' loads from a power law (between 1 and 0.8 of the tokens), scales
them to the pairs there are, and times the rank with the most. Which loads it drew is not in its
tables, so this draws some of its own and takes the mean. An expert's time then follows from the
law of balanced routing at that rank's pairs and experts with any.
"""

import numpy as np
from tables import Array, Columns

_NUM_DRAWS = 16
_SEED = 0
_MOST_OF_TOKENS = 0.8


def busiest_rank(columns: Columns) -> tuple[Array, Array]:
    """Pairs, and experts with any, on the busiest rank; [N] each."""
    names = ("num_tokens", "topk", "num_experts", "moe_ep_size", "alpha")
    cases = np.stack([columns[name] for name in names], axis=1)
    distinct, which = np.unique(cases, axis=0, return_inverse=True)
    random = np.random.default_rng(_SEED)
    busiest = np.array([_busiest(*case, random) for case in distinct.tolist()])
    return busiest[which.reshape(-1), 0], busiest[which.reshape(-1), 1]


def _busiest(
    tokens: float,
    topk: float,
    experts: float,
    ranks: float,
    alpha: float,
    random: np.random.Generator,
) -> tuple[float, float]:
    pairs = tokens * topk
    least, most = (1.0, tokens * _MOST_OF_TOKENS) if pairs > experts else (0.01, 2.0)
    power = 1 - alpha
    uniform = random.random((_NUM_DRAWS, int(experts)))
    drawn = ((most**power - least**power) * uniform + least**power) ** (1 / power)
    counts = np.minimum(np.rint(drawn / drawn.sum(axis=1, keepdims=True) * pairs), tokens)
    by_rank = counts.reshape(_NUM_DRAWS, int(ranks), -1)
    load = by_rank.sum(axis=2)
    rank = load.argmax(axis=1)
    draw = np.arange(_NUM_DRAWS)
    active = (by_rank[draw, rank] > 0).sum(axis=1)
    return max(load[draw, rank].mean(), 1.0), max(active.mean(), 1.0)
