"""aiconfigurator's projections and ours beside each other, on the same public rows.

python calibration/beside.py LIST FILE…            a table
python calibration/beside.py LIST FILE… --write    docs/beside_aiconfigurator.md, and every row

LIST: aiconfigurator's list of measurements; FILE: further rows that ours is fitted to, by halves.
Our two numbers of a kind of serving are fitted to other configurations than a row's: of those to
fit to, ours is from a fit to the others. `aiconfigurator.py` has how the other is asked.
"""

import argparse
import csv
import importlib.util
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from aiconfigurator import Prediction, answers, read
from judge_serving import played_points
from serving_fit import Fit, Point, Sides, out_of_sample
from serving_rows import Row, read_rows

_ROOT = Path(__file__).parents[1]
_PAGE = _ROOT / "docs" / "beside_aiconfigurator.md"
_ROWS = _ROOT / "benchmarks" / "results" / "beside_aiconfigurator.csv"
_OF = ("measured", "expertlane", "aiconfigurator")


@dataclass(frozen=True)
class Beside:
    """A row, and what both say of it; None where it is refused."""

    row: Row
    ours: tuple[float, float] | None
    theirs: tuple[float, float] | None

    @property
    def measured(self) -> tuple[float, float]:
        """TPOT and TTFT, seconds."""
        return self.row.tpot_s, self.row.ttft_s


def main() -> int:
    """Project, read what the other said, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("list", type=Path)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--write", action="store_true", help="the page and the rows")
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
    text = "\n".join(_page(beside, theirs, found.seconds_of_row, found.refused))
    print(text)
    if asked.write:
        _PAGE.write_text(text + "\n", encoding="utf-8")
        _write_rows(beside)
    return 0


def _beside(row: Row, ours: Mapping[object, Point], theirs: Mapping[str, Prediction]) -> Beside:
    point, other = ours.get(row.point), theirs[row.id]
    own = None if point is None else (point.played.tpot_s, point.played.ttft_s)
    has_both = other.tpot_s is not None and other.ttft_s is not None
    return Beside(row, own, (other.tpot_s, other.ttft_s) if has_both else None)  # type: ignore[arg-type]


def _page(
    beside: Sequence[Beside],
    theirs: Mapping[str, Prediction],
    seconds_of_row: float,
    refused: Sequence[tuple[Row, str]],
) -> Iterator[str]:
    yield "# Beside aiconfigurator"
    yield ""
    yield (
        f"What aiconfigurator-core 0.12 and expertlane say of the same {len(beside):,} public "
        "measurements (aiconfigurator's own list, Apache-2.0). Our two numbers of each kind of "
        "serving are fitted to other configurations than the row's. aiconfigurator is asked as it "
        "comes; whether its constants were set on this list is not known. Errors are medians of "
        "their size, on rows that both project. *Nearer*: the share of those rows whose TPOT is "
        "nearer in ours. *Refused*: by us, by them."
    )
    yield ""
    yield (
        "Made by `python calibration/beside.py LIST FILE… --write`; every row is in "
        "`benchmarks/results/beside_aiconfigurator.csv`."
    )
    yield ""
    yield from _table(beside)
    yield ""
    yield (
        "For gpt-oss under TensorRT-LLM its default is 16-bit activations with 4-bit weights, "
        "which explains much of its error on B200. Its TTFT of one pool leaves out the queue as a "
        "benchmark begins."
    )
    yield ""
    seconds = np.mean([each.seconds for each in theirs.values()])
    yield (
        f"CPU seconds per row: ours {seconds_of_row:.2f}, theirs {seconds:.2f}, each with reading "
        "its tables."
    )
    yield ""
    yield "## What each refuses"
    yield ""
    yield "| rows | by | why |"
    yield "| ---: | --- | --- |"
    ids = {each.row.id for each in beside}
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


def _table(beside: Sequence[Beside]) -> Iterator[str]:
    heads = "rows", "refused", "TPOT ours", "theirs", "TTFT ours", "theirs", "nearer"
    yield f"| of | {' | '.join(heads)} |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    cells: defaultdict[str, list[Beside]] = defaultdict(list)
    for each in beside:
        cells[f"{each.row.model}, {each.row.hardware}, {each.row.framework}"].append(each)
    for name, own in (("all", beside), *sorted(cells.items())):
        yield _line(name, own)


def _line(name: str, own: Sequence[Beside]) -> str:
    refused = (sum(each.ours is None for each in own), sum(each.theirs is None for each in own))
    head = f"| {name} | {len(own)} | {refused[0]}, {refused[1]} |"
    both = [each for each in own if each.ours and each.theirs]
    if not both:
        return f"{head} | | | | |"
    measured = np.array([each.measured for each in both])
    ours, theirs = (
        np.abs(np.array([each.ours for each in both]) / measured - 1),
        np.abs(np.array([each.theirs for each in both]) / measured - 1),
    )
    sizes = [np.median(each[:, place]) for place in (0, 1) for each in (ours, theirs)]
    nearer = np.mean(ours[:, 0] < theirs[:, 0])
    return f"{head} {' | '.join(f'{each:.0%}' for each in sizes)} | {nearer:.0%} |"


def _write_rows(beside: Sequence[Beside]) -> None:
    with _ROWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", *(f"{of}_{what}_ms" for what in ("tpot", "ttft") for of in _OF)])
        for each in beside:
            times = (each.measured, each.ours, each.theirs)
            writer.writerow(
                [
                    each.row.id,
                    *(
                        "" if of is None else f"{1e3 * of[place]:.4g}"
                        for place in (0, 1)
                        for of in times
                    ),
                ]
            )


if __name__ == "__main__":
    sys.exit(main())
