"""Errors of virtual time: replays of local runs against the times that `measure.py` measured.

Each case runs again on local ranks, and is replayed on links with the bandwidth and latency that
ping-pong measured: nothing is fitted. An error is that of the time from token to token, against the
measured time multiplied by the share of a core. A slowed core can need more CPU time for the same
work (`dilation.py`), which is not in a replay of an unslowed run: the second error is that of a
replay with the CPU time of the measured ranks, to a first approximation (the difference is added).
Pairs of cases of the same work whose measured times differ by more than 15 % show whether virtual
time orders them in the same way.

    python benchmarks/judge/judge.py results/judge [--beside FOLDER …]

Finished cases are kept in the folder's `judged.jsonl`; the same command continues after them.

Prints a table, then one JSON line, which it also writes to the folder as `judged.json`. With
--beside, the table also has earlier results of each case, from the first folder that has it.
"""

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import Any

from cases import CASES, Case
from network import JudgeError
from rich.console import Console
from rich.table import Table
from rows import Rows, add

from expertlane.comparison.run import run_comparison
from expertlane.comparison.virtual import VirtualSettings
from expertlane.cost.laws.profile import read_profile
from expertlane.engine.launch import start_pool
from expertlane.errors import UserError
from expertlane.progress import Silent
from expertlane.spec.names import Cause

MOST_ERROR = 0.15
APART = 1.15


_COMPUTING = (Cause.ATTENTION, Cause.ROUTER, Cause.EXPERTS, Cause.HEAD)
_STAGES = ("embed", "attention", "router", "experts", "head")


def virtual_s(case: Case, profile: Path) -> tuple[float, float]:
    """Virtual seconds from token to token, and the part of them that is computing."""
    pool = start_pool(case.num_ranks, timeout_s=300.0, dtype="float32")
    assert pool is not None, "not under torchrun"
    settings = VirtualSettings(read_profile(profile), 1.0)
    with pool:
        results = run_comparison(case.experiment, pool, Silent(), command="", virtual=settings)
    (record,) = results.select("virtual")
    assert record.decode is not None, "every case decodes"
    token_s = record.decode.token_s
    assert token_s is not None, "every case has several tokens a sequence"
    compute_s = sum(record.decode.breakdown_s[cause] for cause in _COMPUTING)
    return token_s.median.value, compute_s


def judge(truth: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """A row per case: both times in seconds and the errors; profiles are read from the folder."""
    known, rows = {case.name: case for case in CASES}, []
    head = {key: truth[key] for key in ("version", "torch")} | {"cpu": truth.get("cpu")}
    kept = Rows(folder / "judged.jsonl", head)
    for row in truth["cases"]:
        case = known[row["case"]["name"]]
        true_s = row["token_median_s"] * case.share
        found = [each for each in kept.of("judged") if each["case"] == case.name]
        if not any(each["true_s"] == true_s for each in found):
            virtual, compute_s = virtual_s(case, folder / row["profile"])
            spread = row["token_spread_s"] / row["token_median_s"]
            true_compute_s = sum(mean(row["cpu_s"][stage]) for stage in _STAGES)
            with_same_s = virtual + true_compute_s - compute_s
            found = [
                {"case": case.name, "bound": case.bound, "layout": case.layout}
                | {"true_s": true_s, "spread": spread, "virtual_s": virtual}
                | {"error": virtual / true_s - 1, "cpu_ratio": true_compute_s / compute_s}
                | {"error_with_same_cpu": with_same_s / true_s - 1}
            ]
            add(kept.path, "judged", found[0])
            print(f"{case.name}: {found[0]['error']:+.1%}", file=sys.stderr, flush=True)
        rows.append(next(each for each in found if each["true_s"] == true_s))
    return rows


def earlier(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """Earlier rows by case; one that was only measured has no error."""
    found: dict[str, dict[str, Any]] = {}
    files = [file for folder in folders for file in sorted(folder.glob("judged*.json"))]
    for file in files:
        for row in json.loads(file.read_text())["rows"]:
            found.setdefault(row["case"], row)
    for file in (folder / "truth.json" for folder in folders):
        for row in json.loads(file.read_text())["cases"] if file.exists() else ():
            true_s = row["token_median_s"] * row["case"]["share"]
            found.setdefault(row["case"]["name"], {"true_s": true_s})
    return found


def orders(rows: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """Pairs of cases of the same work, and whether virtual time orders them as measured."""
    work = {
        case.name: (case.num_ranks, case.batch, case.num_layers, case.link, case.share)
        for case in CASES
    }
    found = []
    for one, other in combinations(rows, 2):
        ratio = one["true_s"] / other["true_s"]
        if work[one["case"]] == work[other["case"]] and max(ratio, 1 / ratio) > APART:
            is_right = (ratio > 1) == (one["virtual_s"] > other["virtual_s"])
            found.append((one["case"], other["case"], is_right))
    return found


def table_of(rows: list[dict[str, Any]], before: dict[str, dict[str, Any]]) -> Table:
    """Milliseconds and errors of each case; the last columns are those of earlier results."""
    names = ["case", "bound", "true ms", "±", "virtual ms", "error"]
    names += ["measured CPU", "error with it"]
    names += ["true before", "virtual", "error"] if before else []
    table = Table(*names, title="decode, from token to token, one core per rank")

    def texts(row: dict[str, Any]) -> list[str]:
        times = [f"{1e3 * row[key]:.1f}" if key in row else "—" for key in ("true_s", "virtual_s")]
        return [*times, f"{row['error']:+.1%}" if "error" in row else "—"]

    for row in rows:
        true_ms, virtual_ms, error = texts(row)
        told = [row["case"], row["bound"]]
        told += [true_ms, f"{row['spread']:.1%}", virtual_ms, error]
        told += [f"× {row['cpu_ratio']:.2f}", f"{row['error_with_same_cpu']:+.1%}"]
        table.add_row(*told, *(texts(before.get(row["case"], {})) if before else ()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder that measure.py wrote")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="earlier folders")
    asked = parser.parse_args()
    rows = judge(json.loads((asked.folder / "truth.json").read_text()), asked.folder)
    console = Console(width=140)
    console.print(table_of(rows, earlier(asked.beside)))
    for key, name in (("error", ""), ("error_with_same_cpu", "with the measured CPU time: ")):
        errors = [abs(row[key]) for row in rows]
        num_good = sum(error <= MOST_ERROR for error in errors)
        console.print(
            f"{name}{num_good} of {len(rows)} within {MOST_ERROR:.0%}; median "
            f"{median(errors):.1%}, most {max(errors):.1%}"
        )
    pairs = orders(rows)
    for one, other, is_right in pairs:
        console.print(f"order of {one} and {other}: {'right' if is_right else 'WRONG'}")
    line = json.dumps({"benchmark": "judge of virtual time", "rows": rows, "orders": pairs})
    (asked.folder / "judged.json").write_text(line + "\n")
    console.out(line, highlight=False)


if __name__ == "__main__":
    try:
        main()
    except (JudgeError, UserError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
