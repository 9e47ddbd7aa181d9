"""Take pairs of layouts that differ in EP alone from a file of public measurements.

    python experiments/ep_map/pairs.py inferencex.csv > experiments/ep_map/measured.csv

The file is InferenceX's (SemiAnalysis) as a table of DeepSeek-R1: a row a run. A pair is two runs
of one pool on one hardware, framework, type and load, both with tensor-parallel attention over the
same devices, one with ep = tp and the other with ep = 1: of several the two whose days are nearest,
at most `MOST_DAYS` apart, since frameworks get faster from release to release.
"""

import argparse
import csv
import sys
from collections import defaultdict
from datetime import date
from itertools import product
from pathlib import Path

from cells import Pair

MOST_DAYS = 60
ALIKE = (*("hardware", "framework", "precision", "spec_method", "decode_tp", "isl", "osl", "conc"),)


def main() -> int:
    """Print the pairs as a table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="InferenceX's runs as CSV")
    with parser.parse_args().file.open(encoding="utf-8", newline="") as file:
        found = pairs_of(list(csv.DictReader(file)))
    writer = csv.DictWriter(sys.stdout, list(Pair.__annotations__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(each) for each in found)
    return 0


def pairs_of(rows: list[dict[str, str]]) -> list[Pair]:
    """The pairs, by hardware and load."""
    alike: defaultdict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        if (row["disagg"], row["decode_dp_attention"], row["spec_method"]) == (
            *("False", "False", "none"),
        ):
            alike[tuple(row[name] for name in ALIKE)].append(row)
    found = []
    for of_load in alike.values():
        spread = [each for each in of_load if each["decode_ep"] == each["decode_tp"] != "1"]
        cut = [each for each in of_load if each["decode_ep"] == "1" != each["decode_tp"]]
        close = [
            (days, *both) for both in product(spread, cut) if (days := _days(*both)) <= MOST_DAYS
        ]
        if close:
            found.append(_pair(*min(close, key=lambda each: each[0])))
    return sorted(
        found,
        key=lambda each: (
            each.hardware,
            each.dtype,
            each.prompt_len,
            each.output_len,
            each.num_seqs,
        ),
    )


def _days(one: dict[str, str], other: dict[str, str]) -> int:
    return abs((date.fromisoformat(one["date"]) - date.fromisoformat(other["date"])).days)


def _pair(days: int, spread: dict[str, str], cut: dict[str, str]) -> Pair:
    with_ep, without = (float(each["output_tput_per_gpu"]) for each in (spread, cut))
    return Pair(
        spread["hardware"],
        spread["framework"],
        spread["precision"],
        int(spread["decode_tp"]),
        int(spread["isl"]),
        int(spread["osl"]),
        int(spread["conc"]),
        round(with_ep / without, 3),
        days,
    )


if __name__ == "__main__":
    sys.exit(main())
