"""Near-equal cuts of a range; the one rule by which everything is shared out."""

from itertools import pairwise


def partition(total: int, num_parts: int) -> list[range]:
    """Cut `range(total)` into `num_parts` contiguous ranges whose sizes differ by at most one.

    The first `total % num_parts` parts are the longer ones; parts may be empty.
    """
    size, num_longer = divmod(total, num_parts)
    starts = [part * size + min(part, num_longer) for part in range(num_parts + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]
