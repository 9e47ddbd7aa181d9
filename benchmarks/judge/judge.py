"""Virtual time against the truth: what `measure.py` found, and what a replay of a local run says.

Each case runs again on local ranks, whatever their number, and is replayed on the links that
ping-pong told of: nothing is fitted. Errors are of the time from token to token; the truth is
divided by dilation. Then the order of each two cases of the same work: right where they differ by
more than 15 %.

    python benchmarks/judge/judge.py results/judge/truth.json

Prints a table, then one JSON line.
"""

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from cases import CASES, Case
from rich.console import Console
from rich.table import Table

from expertlane.compare.run import run_comparison
from expertlane.compare.virtual import VirtualSettings
from expertlane.cost.laws.profile_file import read_profile
from expertlane.engine.launch import start_pool
from expertlane.errors import UserError
from expertlane.progress import Silent

MOST_ERROR = 0.15
APART = 1.15


def virtual_s(case: Case, profile: Path) -> float:
    """Seconds from token to token in virtual time."""
    pool = start_pool(case.num_ranks, timeout_s=300.0, dtype="float32")
    assert pool is not None, "not under torchrun"
    settings = VirtualSettings(read_profile(profile), 1.0)
    with pool:
        results = run_comparison(case.experiment, pool, Silent(), command="", virtual=settings)
    (record,) = results.select("virtual")
    assert record.decode is not None, "every case decodes"
    token_s = record.decode.token_s
    assert token_s is not None, "every case has several tokens a sequence"
    return token_s.median.value


def judged(truth: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Each case with both times and the error; profiles are in the folder."""
    known = {case.name: case for case in CASES}
    rows = []
    for row in truth["cases"]:
        case = known[row["case"]["name"]]
        true_s = row["token_median_s"] * case.share
        found_s = virtual_s(case, folder / row["profile"])
        rows.append(
            {
                "case": case.name,
                "bound": case.bound,
                "layout": case.layout,
                "true_s": true_s,
                "spread": row["token_spread_s"] / row["token_median_s"],
                "virtual_s": found_s,
                "error": found_s / true_s - 1,
            }
        )
        print(f"{case.name}: {rows[-1]['error']:+.1%}", file=sys.stderr, flush=True)
    return rows


def orders(rows: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """Each two cases of the same work whose true throughputs differ enough, and if told right."""
    work = {case.name: (case.num_ranks, case.batch, case.num_layers, case.link) for case in CASES}
    found = []
    for one, other in combinations(rows, 2):
        ratio = one["true_s"] / other["true_s"]
        if work[one["case"]] == work[other["case"]] and max(ratio, 1 / ratio) > APART:
            is_right = (ratio > 1) == (one["virtual_s"] > other["virtual_s"])
            found.append((one["case"], other["case"], is_right))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("truth", type=Path)
    path = parser.parse_args().truth
    rows = judged(json.loads(path.read_text()), path.parent)
    names = "case", "bound", "layout", "true ms", "±", "virtual ms", "error"
    table = Table(*names, title="decode, from token to token, a core a rank")
    for row in rows:
        times = (
            f"{1e3 * row['true_s']:.1f}",
            f"{row['spread']:.1%}",
            f"{1e3 * row['virtual_s']:.1f}",
        )
        table.add_row(row["case"], row["bound"], row["layout"], *times, f"{row['error']:+.1%}")
    console = Console(width=110)
    console.print(table)
    errors = [abs(row["error"]) for row in rows]
    num_good = sum(error <= MOST_ERROR for error in errors)
    console.print(
        f"{num_good} of {len(rows)} within {MOST_ERROR:.0%}; median {median(errors):.1%}, "
        f"most {max(errors):.1%}"
    )
    pairs = orders(rows)
    for one, other, is_right in pairs:
        console.print(f"order of {one} and {other}: {'right' if is_right else 'WRONG'}")
    head = {"benchmark": "judge of virtual time", "rows": rows, "orders": pairs}
    console.out(json.dumps(head), highlight=False)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
