"""Table of aiconfigurator's projections and ours beside each other, from the rows of both.

`docs/conf.py` writes it into the documentation; `beside.py --write` makes the rows.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "beside_aiconfigurator.csv"
OF = ("measured", "expertlane", "aiconfigurator")
_TIMES = ("tpot", "ttft")


def saved_rows() -> list[dict[str, str]]:
    """The rows as they were written; a time is empty where a side refuses the row."""
    with ROWS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Lines: all rows, then each model on a card under a framework."""
    heads = "rows", "refused", "TPOT ours", "theirs", "TTFT ours", "theirs", "nearer"
    yield f"| of | {' | '.join(heads)} |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    cells: defaultdict[str, list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        cells[f"{row['model']}, {row['hardware']}, {row['framework']}"].append(row)
    for name, own in (("all", rows), *sorted(cells.items())):
        yield _line(name, own)


def _line(name: str, rows: Sequence[Mapping[str, str]]) -> str:
    _, ours, theirs = OF
    refused = ", ".join(str(sum(not row[f"{of}_tpot_ms"] for row in rows)) for of in (ours, theirs))
    head = f"| {name} | {len(rows)} | {refused} |"
    both = [row for row in rows if row[f"{ours}_tpot_ms"] and row[f"{theirs}_tpot_ms"]]
    if not both:
        return f"{head} | | | | |"
    errors = {
        (what, of): [
            abs(float(row[f"{of}_{what}_ms"]) / float(row[f"measured_{what}_ms"]) - 1)
            for row in both
        ]
        for what in _TIMES
        for of in (ours, theirs)
    }
    pairs = zip(errors["tpot", ours], errors["tpot", theirs], strict=True)
    nearer = sum(own < other for own, other in pairs) / len(both)
    sizes = " | ".join(f"{median(each):.0%}" for each in errors.values())
    return f"{head} {sizes} | {nearer:.0%} |"
