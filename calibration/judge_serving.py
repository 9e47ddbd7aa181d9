"""DeepSeek-R1 as others served it, against the request-level simulation of each row.

python calibration/judge_serving.py FILE              errors on the half that was not fitted
python calibration/judge_serving.py FILE --write      and what expertlane reads of it

FILE: public end-to-end measurements as CSV; `serving_rows.py` says what is taken for granted of
them. Prints Markdown. What was simulated stays in build/judge_*.jsonl until the model or the rows
change, so that an interrupted run goes on.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path

import numpy as np
from serving_errors import FEWEST, NOISE, Errors, Pair, by_group, orders, single_rows, table
from serving_fit import (
    Sides,
    acceptance_of,
    acceptances,
    fit,
    unfitted,
    with_overheads,
    write,
)
from serving_rows import TYPES, Row, read_rows
from serving_simulation import Question, project
from serving_waves import all_in_waves

from expertlane.cost.laws.frameworks import FILE, Framework, JudgedGroup, judged_groups


def main() -> int:
    """Fit, simulate and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", action="store_true", help="the fitted overheads too")
    parser.add_argument("--jobs", type=int, default=2, help="processes that simulate")
    asked = parser.parse_args()
    rows, unknown = read_rows(asked.file)
    sides = Sides.drawn(rows)
    accepted = acceptances(sides.fitted)

    questions = [
        Question(row, unfitted(row.framework), acceptance_of(row, accepted)) for row in rows
    ]
    # In a drawn order: what is done tells how long the rest takes.
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    answers = dict(zip(order, project([questions[i] for i in order], asked.jobs), strict=True))
    base = [(row, answers[place]) for place, row in enumerate(rows)]
    refused = [pair for pair in base if pair[1].refused]
    base = [pair for pair in base if not pair[1].refused]
    waves = all_in_waves(base, asked.jobs)
    base = [(row, each) for (row, _), each in zip(base, waves, strict=True)]
    fitted = {row.configuration for row in sides.fitted}
    frameworks = fit([each for each in base if each[0].configuration in fitted])
    pairs = [(row, with_overheads(row, each, frameworks[row.framework])) for row, each in base]
    _print(fitted, pairs)
    print("\nWithout any overhead, on the half that was not fitted:\n")
    rest = [pair for pair in base if pair[0].configuration not in fitted]
    print("\n".join(table(by_group(rest, lambda row: row.hardware))))
    print(f"\nLeft out: {len(unknown)} rows of unknown layouts; {len(refused)} that do not fit.")
    for row, each in refused:
        print(f"- {row.hardware} {row.decode}: {each.refused}", file=sys.stderr)
    _print_frameworks(frameworks)
    if asked.write:
        judged = [pair for pair in pairs if pair[0].configuration not in fitted]
        others = [each for each in judged_groups() if each.model != "DeepSeek-R1"]
        write(frameworks, [*_groups(judged, _own), *_groups(rest, _none), *others], FILE)
    return 0


def _own(row: Row) -> str:
    return row.framework


def _none(row: Row) -> str:
    return ""


def _groups(pairs: Sequence[Pair], overheads_of: Callable[[Row], str]) -> Iterator[JudgedGroup]:
    """Those with enough rows to be told of."""

    def kind_of(row: Row) -> tuple[str, str, bool, bool, str]:
        types, framework = TYPES[row.precision], overheads_of(row)
        return row.hardware, types, row.prefill is not None, row.is_speculative, framework

    for kind in sorted({kind_of(row) for row, _ in pairs}):
        own = [pair for pair in pairs if kind_of(pair[0]) == kind]
        if len(own) >= FEWEST:
            errors = [Errors.of(what, own) for what in NOISE]
            sizes = (round(each.size, 3) for each in errors)
            ranges = (each.ratios for each in errors)
            yield JudgedGroup(*kind, len(own), *sizes, *ranges)


def _print(fitted: Set[object], pairs: Sequence[Pair]) -> None:
    judged = [pair for pair in pairs if pair[0].configuration not in fitted]
    h100 = [pair for pair in pairs if pair[0].hardware == "h100"]
    print(f"{len(pairs) - len(judged)} rows were fitted to, {len(judged)} are judged.\n")
    parts = {
        "On the half that was not fitted, by hardware": by_group(judged, lambda row: row.hardware),
        "By framework": by_group(judged, lambda row: row.framework),
        "By all": by_group(judged, lambda row: row.group),
        "On the half that was fitted": by_group(
            [pair for pair in pairs if pair[0].configuration in fitted], lambda row: row.hardware
        ),
    }
    for title, groups in parts.items():
        print(f"\n{title}:\n")
        print("\n".join(table(groups)))
    print("\nH100's rows, fitted or not:\n")
    print("\n".join(single_rows(h100)))
    print("\nPairs of layouts, both not fitted:\n")
    print("\n".join(orders(judged, lambda one, other: True)))
    print("\nPairs of layouts, at least one of them not fitted:\n")

    def is_judged(one: Row, other: Row) -> bool:
        return one.configuration not in fitted or other.configuration not in fitted

    print("\n".join(orders(pairs, is_judged)))


def _print_frameworks(frameworks: Mapping[str, Framework]) -> None:
    print("\n| framework | of | value | low | high |")
    print("| --- | --- | ---: | ---: | ---: |")
    for each in frameworks.values():
        for name, term in each.terms.items():
            numbers = " | ".join(f"{1e3 * x:.2f} ms" for x in (term.value, term.low, term.high))
            print(f"| {each.title} | {name} | {numbers} |")


if __name__ == "__main__":
    sys.exit(main())
