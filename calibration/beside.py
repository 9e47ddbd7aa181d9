"""aiconfigurator's projections and ours beside each other, on the same public rows.

python calibration/beside.py LIST FILE…            a table
python calibration/beside.py LIST FILE… --write    also writes every row, see beside_table.py

LIST: aiconfigurator's list of measurements; FILE: further rows that ours is fitted to, by halves.
Our two numbers of a kind of serving are fitted to other configurations than a row's: of those to
fit to, ours is from a fit to the others. `aiconfigurator.py` has how the other is asked.
"""

import argparse
import csv
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from aiconfigurator import Prediction, answers, read
from beside_table import OF, ROWS, table
from judge_serving import played_points
from serving_fit import Fit, Point, Sides, out_of_sample
from serving_rows import Row, read_rows


def main() -> int:
    """Project, read what the other said, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("list", type=Path)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument(
        "--write", action="store_true", help="the rows, from which the documentation has its table"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    asked = parser.parse_args()
    if importlib.util.find_spec("aiconfigurator_core") is None:
        print("install the tables first: pip install '.[calibration]'", file=sys.stderr)
        return 2
    listed, _ = read_rows([asked.list])
    others, _ = read_rows(asked.files)
    rows = [*listed, *others]  # rows in both stay: means in the list, medians in the others
    found = played_points(rows, Sides.of(rows), asked.jobs)
    fit = Fit.to([point for point in found.points if point.is_fitted])
    ours = {
        point.row.point: point
        for point in (
            *out_of_sample([each for each in found.points if each.is_fitted]),
            *(each.corrected(fit.of(each.row)) for each in found.points if not each.is_fitted),
        )
    }
    asked_of_theirs = read(asked.list)
    theirs = {
        row["id"]: answer
        for row, answer in zip(asked_of_theirs, answers(asked_of_theirs), strict=True)
    }
    beside = [_beside(row, ours, theirs) for row in listed]
    print("\n".join(_report(beside, theirs, found.seconds_of_row, found.refused)))
    if asked.write:
        _write_rows(beside)
    return 0


def _beside(
    row: Row, ours: Mapping[object, Point], theirs: Mapping[str, Prediction]
) -> dict[str, str]:
    """What was measured, and what both say of it; empty where one refuses the row."""
    point, other = ours.get(row.point), theirs[row.id]
    own = None if point is None else (point.played.tpot_s, point.played.ttft_s)
    has_both = other.tpot_s is not None and other.ttft_s is not None
    times = ((row.tpot_s, row.ttft_s), own, (other.tpot_s, other.ttft_s) if has_both else None)
    cells = {"id": row.id, "model": row.model}
    cells |= {"hardware": row.hardware, "framework": row.framework}
    for place, what in enumerate(("tpot", "ttft")):
        for of, pair in zip(OF, times, strict=True):
            seconds = None if pair is None else pair[place]
            cells[f"{of}_{what}_ms"] = "" if seconds is None else f"{1e3 * seconds:.4g}"
    return cells


def _report(
    rows: Sequence[Mapping[str, str]],
    theirs: Mapping[str, Prediction],
    seconds_of_row: float,
    refused: Sequence[tuple[Row, str]],
) -> Iterator[str]:
    yield from table(rows)
    yield ""
    seconds = np.mean([each.seconds for each in theirs.values()])
    yield (
        f"CPU seconds per row: ours {seconds_of_row:.2f}, theirs {seconds:.2f}, each with reading "
        "its tables."
    )
    yield ""
    yield "| rows refused | by | why |"
    yield "| ---: | --- | --- |"
    ids = {row["id"] for row in rows}
    why = Counter(("ours", _shortened(text)) for row, text in refused if row.id in ids)
    why.update(("theirs", _shortened(each.refused)) for each in theirs.values() if each.refused)
    for (by, reason), number in why.most_common():
        yield f"| {number} | {by} | {reason} |"


def _shortened(reason: str) -> str:
    """Without what differs from row to row."""
    text = reason.split(";")[0]
    if " needs " in text:
        text = f"out of memory: {text.split(' needs ')[0]}"
    text = text.split(" (")[0]
    return text if len(text) <= 100 else text[:97] + "…"


def _write_rows(rows: Sequence[Mapping[str, str]]) -> None:
    with ROWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
