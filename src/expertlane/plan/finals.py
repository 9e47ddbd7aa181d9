"""The best options projected in full: those that keep the limits then too."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from expertlane.plan.option import Finalist, Option
from expertlane.plan.setting import Goals

NUM_FINALISTS = 12
_MOST_OF_LAYOUT = 2  # finalists, and trials of as many sequences
_MOST_BROKEN = 24  # trials that break a limit, before what was found is all
_NUM_NEAREST = 6


@dataclass(frozen=True, eq=False)
class Finals:
    """What was projected in full.

    Attributes:
        options: all, each with the best number of sequences that is not known to break a limit.
        kept: those that keep the limits, the best first.
        broke: those that do not.
    """

    options: Sequence[Option]
    kept: Sequence[Finalist]
    broke: Sequence[Finalist]


def best_in_full(
    options: Sequence[Option],
    goals: Goals,
    finish: Callable[[Option], Finalist],
    advance: Callable[[int], None],
) -> Finals:
    """The best by tokens a second, not too many of one layout.

    What breaks a limit in full is taken up again with fewer sequences. Where all break one, those
    that come nearest as screened are tried as well.

    Args:
        finish: projects an option in full.
        advance: called with 1 for each finalist.
    """
    current = list(options)
    queue = [(-each.tps, number) for number, each in enumerate(options) if each.place is not None]
    heapq.heapify(queue)
    kept: list[Finalist] = []
    broke: list[Finalist] = []
    of_layout, tried = Counter[object](), Counter[object]()
    while queue and len(kept) < NUM_FINALISTS and len(broke) < _MOST_BROKEN:
        _, number = heapq.heappop(queue)
        option = current[number]
        layout = option.candidate.layout
        size = layout, option.num_seqs
        if of_layout[layout] == _MOST_OF_LAYOUT or tried[size] == _MOST_OF_LAYOUT:
            continue
        tried[size] += 1
        finalist = finish(option)
        if finalist.keeps(goals):
            kept.append(finalist)
            of_layout[layout] += 1
            advance(1)
            continue
        broke.append(finalist)
        current[number] = lower = option.next_best(goals)
        if lower.place is not None:
            heapq.heappush(queue, (-lower.tps, number))
    if not kept:
        for number in _nearest(options, goals):
            finalist = finish(options[number].nearest(goals))
            if finalist.keeps(goals):
                current[number] = finalist.option
                kept.append(finalist)
            else:
                broke.append(finalist)
    return Finals(current, sorted(kept, key=lambda each: -each.tps), broke)


def _nearest(options: Sequence[Option], goals: Goals) -> list[int]:
    """Numbers of those that come nearest to the limits as screened, one of each layout."""
    breaches = [float(each.served.breach(goals).min()) for each in options]
    nearest: dict[object, int] = {}
    for number in sorted(range(len(options)), key=lambda number: breaches[number]):
        nearest.setdefault(options[number].candidate.layout, number)
        if len(nearest) == _NUM_NEAREST:
            break
    return list(nearest.values())
