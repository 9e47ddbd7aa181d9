"""How far a comparison's verdict repeats: its winner, its first reason, and its interval.

.venv/bin/python benchmarks/bench_verdict.py [--runs 40] [--only NAME,NAME] [--repeat 7]
Compares two deployments of `paper-small` again and again, each time on new ranks and by the same
code as `expertlane compare --only NAME,NAME`, in virtual time. Prints, of each run, who wins, by
what factor, its 90 % interval and the first reason; then how often each winner and first reason
came, which share of the factors lies inside the intervals that other runs printed, and the median
width of these. Then one JSON line.
"""

import argparse
import json
import time
from collections import Counter
from statistics import median
from typing import Any

from expertlane.comparison.run import Repeats, run_comparison
from expertlane.comparison.virtual import VirtualSettings
from expertlane.cost.laws.profile_file import read_profile
from expertlane.engine.launch import start_pool
from expertlane.progress import Silent
from expertlane.report.compared import run
from expertlane.report.verdict import judge
from expertlane.results.results import Results
from expertlane.spec.experiment import Experiment, read_experiment, shipped_experiments

_EXPERIMENT, _PAIR = "paper-small", "DP 2 × TP 8, EP 2,EP 16"
_PROFILE = "h100"


def compared(experiment: Experiment, repeats: Repeats) -> Results:
    """One comparison, on ranks of its own."""
    settings = VirtualSettings(read_profile(_PROFILE))
    pool = start_pool(experiment.num_ranks, timeout_s=120.0)
    assert pool is not None, "torchrun's ranks have nothing to say here"
    with pool:
        return run_comparison(
            experiment, pool, Silent(), command="", virtual=settings, repeats=repeats
        )


def verdict_of(results: Results, reference: str) -> dict[str, Any]:
    """Who won and why; the ratio is that of `reference` over the other."""
    own, wall = run(results, "virtual"), run(results, "measured")
    assert own is not None
    assert wall is not None
    judged = judge(own)
    assert judged is not None

    def bounds(ratio: Any) -> list[float]:
        low, value, high = ratio.bounds
        is_reference = judged.one.name == reference
        return [low, value, high] if is_reference else [1 / high, 1 / value, 1 / low]

    return {
        "winner": judged.slower_and_faster[1].name,
        "significant": own.pairs[0].is_significant,
        "ratio": bounds(own.pairs[0].ratio),  # on the links that are assumed
        "reason": judged.reasons[0][0] if judged.reasons else "none",
        "reason_ms": judged.reasons[0][1].value if judged.reasons else 0.0,
        "wall_ratio": bounds(wall.pairs[0].ratio),
        "scale": results.virtual_time.scale if results.virtual_time else None,
        "foreign_cpu_share": results.foreign_cpu_share,
    }


def coverage(ratios: list[list[float]]) -> float:
    """The share of values inside the intervals of the others; each with its low, value and high."""
    pairs = [
        low <= value <= high
        for at, (low, _, high) in enumerate(ratios)
        for place, (_, value, _) in enumerate(ratios)
        if place != at
    ]
    return sum(pairs) / len(pairs) if pairs else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--only", default=_PAIR, help="two deployments, as compare --only has it")
    parser.add_argument("--repeat", type=int, default=Repeats().num_runs)
    options = parser.parse_args()
    experiment = read_experiment(shipped_experiments()[_EXPERIMENT]).only(options.only)
    reference = experiment.deployments[-1].name
    rows = []
    for number in range(1, options.runs + 1):
        began_s = time.monotonic()
        row = verdict_of(compared(experiment, Repeats(options.repeat)), reference)
        rows.append(row | {"seconds": time.monotonic() - began_s})
        low, value, high = row["ratio"]
        print(
            f"{number:3}  {row['winner']:20}  {value:.3f} ({low:.3f}-{high:.3f})  "
            f"{'' if row['significant'] else 'not significant  '}"
            f"{row['reason']} {row['reason_ms']:+.2f} ms  others used "
            f"{row['foreign_cpu_share']:.0%}",
            flush=True,
        )
    for what in ("winner", "significant", "reason"):
        print(
            f"{what}: " + ", ".join(f"{k} {n}" for k, n in Counter(r[what] for r in rows).items())
        )
    for clock, name in (("virtual time", "ratio"), ("wall time", "wall_ratio")):
        ratios = [row[name] for row in rows]
        print(
            f"{clock}: {reference} over the other, {min(v for _, v, _ in ratios):.3f} to "
            f"{max(v for _, v, _ in ratios):.3f}; inside the intervals of others "
            f"{coverage(ratios):.0%}; median width {median(h - low for low, _, h in ratios):.1%}"
        )
    print(json.dumps({"repeat": options.repeat, "runs": rows}))


if __name__ == "__main__":
    main()
