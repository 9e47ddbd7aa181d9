"""Explanations beside a plan's ranking: kinds of deployment, the Pareto front, and gaps."""

from collections.abc import Sequence

from expertlane.cost.laws.execution import LIKELY
from expertlane.planner.candidates import family_of
from expertlane.planner.screen import ScreenedCandidate
from expertlane.planner.search import Finalist
from expertlane.planner.ties import Contender, Ranking
from expertlane.spec.workload import Workload


def best_of_families(ranking: Ranking) -> dict[str, Contender]:
    """The best contender of each family."""
    best: dict[str, Contender] = {}
    for each in ranking.contenders:
        best.setdefault(family_of(each.finalist.candidate.layout), each)
    return best


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


_NAMED = 2  # causes
_MET = "decode delayed by prefill"
_LEAST = 0.1  # share of the growth that a cause needs to be named


def time_by_cause(finalist: Finalist, workload: Workload) -> dict[str, float]:
    """Seconds of the whole system for one output token, its part of prefill included.

    What is left of those simulated is how requests met, beside steps of decodes or prompts alone.
    """
    per_token = finalist.steps.prompts.length / workload.output_len
    of_phases = (
        (finalist.decode, 1 / (finalist.num_seqs * float(finalist.steps.tokens_per_step[LIKELY]))),
        (finalist.prefill, per_token / finalist.prefill.num_tokens),
    )
    seconds = {
        f"{cause} in {step.phase}": seconds * share
        for step, share in of_phases
        for cause, seconds in step.breakdown_s.items()
    }
    return seconds | {_MET: 1 / finalist.tps - sum(seconds.values())}


def gap_to(best: Contender, other: Contender, workload: Workload) -> str:
    """Causes of the gap to the best, of a plan that does not tie.

    For example `µs per token: weight reads in decode +12; memory for 316 sequences`.
    """
    mine, least = (time_by_cause(each.finalist, workload) for each in (other, best))
    more = {cause: seconds - least.get(cause, 0.0) for cause, seconds in mine.items()}
    growth = sum(value for value in more.values() if value > 0)
    named = sorted(more, key=lambda cause: -more[cause])[:_NAMED]
    parts = [
        f"{cause} +{1e6 * more[cause]:.3g}" for cause in named if more[cause] > _LEAST * growth
    ]
    text = f"µs per token: {', '.join(parts)}" if parts else "slightly more of every cost"
    room, of_best = (int(each.finalist.option.steps.num_seqs.max()) for each in (other, best))
    if room < min(workload.num_sequences, of_best):
        text += f"; memory for {room:,} sequence{'' if room == 1 else 's'}"
    return text
