"""Why one deployment serves fewer tokens a second than another, in words made from the numbers."""

import numpy as np

from expertlane.plan.option import Option
from expertlane.plan.setting import Traffic
from expertlane.plan.throughput import LIKELY
from expertlane.spec.names import ProjectedCause

_CAUSES = [str(cause) for cause in ProjectedCause]
_NAMED = 2  # causes
_LEAST = 0.1  # of the difference, for a cause to be named


def time_by_cause(option: Option, traffic: Traffic) -> dict[str, float]:
    """Seconds of the whole system for one output token, its part of prefill included."""
    assert option.place is not None, "it keeps the limits"
    screened = option.screened
    assert screened.decode is not None, "it fits"
    assert screened.prefill is not None, "it fits"
    decode = screened.decode.by_cause_s[:, option.place] / option.steps.num_seqs[option.place]
    shares = screened.prefill.by_cause_s[:, 0] / screened.prefill.by_cause_s[:, 0].sum()
    per_token = traffic.prompt_len / traffic.output_len
    prefill = per_token / float(option.steps.prefill_tps[LIKELY]) * shares
    named = {f"{cause} in decode": float(s) for cause, s in zip(_CAUSES, decode, strict=True)}
    named |= {f"{cause} in prefill": float(s) for cause, s in zip(_CAUSES, prefill, strict=True)}
    return named


def why_it_loses(winner: Option, loser: Option, traffic: Traffic) -> str:
    """For example `µs a token: weight reads in decode +12; memory for 316 sequences`."""
    if winner is loser:
        return ""
    mine, best = (time_by_cause(each, traffic) for each in (loser, winner))
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
    most = np.minimum(traffic.num_sequences, winner.steps.num_seqs.max())
    room = int(loser.steps.num_seqs.max())
    if room < most:
        text += f"; memory for {room:,} sequence{'' if room == 1 else 's'}"
    return text
