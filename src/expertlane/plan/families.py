"""Kinds of deployment that people choose between, and the best of each."""

from collections.abc import Sequence

from expertlane.plan.option import Option
from expertlane.spec.layout import Layout


def family_of(layout: Layout) -> str:
    """In a few words; how attention is cut is left to the layout."""
    parts = ["expert parallel" if layout.ep > 1 else "no expert parallelism"]
    if layout.pp > 1:
        parts.append("pipeline")
    if layout.replicas > 1:
        parts.append("replicas")
    return ", ".join(parts)


def best_of_families(options: Sequence[Option]) -> dict[str, Option]:
    """By family, the option with most tokens a second that keeps the limits; best first."""
    best: dict[str, Option] = {}
    for option in options:
        family = family_of(option.candidate.layout)
        if option.place is not None and option.tps > (best[family].tps if family in best else 0):
            best[family] = option
    return dict(sorted(best.items(), key=lambda each: -each[1].tps))


def pareto(options: Sequence[Option]) -> list[tuple[Option, int]]:
    """Options and numbers of sequences such that none has both more TPS and a lower TPOT."""
    points = [
        (float(option.served.tpot_s[1, place]), float(option.served.tps[1, place]), option, place)
        for option in options
        for place in range(len(option.steps.num_seqs))
    ]
    front: list[tuple[Option, int]] = []
    most = 0.0
    for _, tps, option, place in sorted(points, key=lambda point: (point[0], -point[1])):
        if tps > most:
            most = tps
            front.append((option, place))
    return front
