"""What a plan says of its options: the best of each kind, and why one serves less than another."""

from collections.abc import Sequence

import numpy as np

from expertlane.cost.laws.execution import LIKELY
from expertlane.plan.screen import ScreenedCandidate
from expertlane.spec.layout import Layout
from expertlane.spec.names import ProjectedCause
from expertlane.spec.workload import Workload


def family_of(layout: Layout) -> str:
    """In a few words; how attention is cut is left to the layout."""
    parts = ["expert parallel" if layout.ep > 1 else "no expert parallelism"]
    if layout.pp > 1:
        parts.append("pipeline")
    if layout.replicas > 1:
        parts.append("replicas")
    return ", ".join(parts)


def best_of_families(options: Sequence[ScreenedCandidate]) -> dict[str, ScreenedCandidate]:
    """By family, the option with most tokens a second that keeps the limits; best first."""
    best: dict[str, ScreenedCandidate] = {}
    for option in options:
        family = family_of(option.candidate.layout)
        if option.place is not None and option.tps > (best[family].tps if family in best else 0):
            best[family] = option
    return dict(sorted(best.items(), key=lambda each: -each[1].tps))


def pareto(options: Sequence[ScreenedCandidate]) -> list[tuple[ScreenedCandidate, int]]:
    """Options and numbers of sequences such that none has both more TPS and a lower TPOT."""
    points = [
        (float(option.served.tpot_s[1, place]), float(option.served.tps[1, place]), option, place)
        for option in options
        for place in range(len(option.steps.num_seqs))
    ]
    front: list[tuple[ScreenedCandidate, int]] = []
    most = 0.0
    for _, tps, option, place in sorted(points, key=lambda point: (point[0], -point[1])):
        if tps > most:
            most = tps
            front.append((option, place))
    return front


_CAUSES = [str(cause) for cause in ProjectedCause]
_NAMED = 2  # causes
_LEAST = 0.1  # of the difference, for a cause to be named


def time_by_cause(option: ScreenedCandidate, workload: Workload) -> dict[str, float]:
    """Seconds of the whole system for one output token, its part of prefill included."""
    assert option.place is not None, "it keeps the limits"
    decode = option.decode_by_cause_s[:, option.place] / option.num_seqs
    shares = option.prefill_by_cause_s / option.prefill_by_cause_s.sum()
    per_token = workload.prompt_len / workload.output_len
    prefill = per_token / float(option.steps.prefill_tps[LIKELY]) * shares
    named = {f"{cause} in decode": float(s) for cause, s in zip(_CAUSES, decode, strict=True)}
    named |= {f"{cause} in prefill": float(s) for cause, s in zip(_CAUSES, prefill, strict=True)}
    return named


def why_it_loses(winner: ScreenedCandidate, loser: ScreenedCandidate, workload: Workload) -> str:
    """For example `µs a token: weight reads in decode +12; memory for 316 sequences`."""
    if winner is loser:
        return ""
    mine, best = (time_by_cause(each, workload) for each in (loser, winner))
    total, least = sum(mine.values()), sum(best.values())
    more = {cause: mine[cause] - best[cause] for cause in mine}
    growth = sum(value for value in more.values() if value > 0)
    named = sorted(more, key=lambda cause: -more[cause])[:_NAMED]
    parts = [
        f"{cause} +{1e6 * more[cause]:.3g}"
        for cause in named
        if growth > 0 and more[cause] > _LEAST * growth
    ]
    if total <= least:
        return "as fast by this count"
    text = f"µs a token: {', '.join(parts)}" if parts else "a little more of everything"
    most = np.minimum(workload.num_sequences, winner.steps.num_seqs.max())
    room = int(loser.steps.num_seqs.max())
    if room < most:
        text += f"; memory for {room:,} sequence{'' if room == 1 else 's'}"
    return text
