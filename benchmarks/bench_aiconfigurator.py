"""expertlane and aiconfigurator side by side on public measurements that both can project.

    python -m venv /tmp/aic && /tmp/aic/bin/pip install aiconfigurator-core==0.12.0
    python benchmarks/bench_aiconfigurator.py inferencex.csv --aiconfigurator /tmp/aic/bin/python

The file is InferenceX's (SemiAnalysis) as a table of DeepSeek-R1. Rows are those of one pool
without speculation in the half that expertlane's overheads of frameworks were not fitted to; of
repeats on several days the newest. expertlane simulates a stretch of the load in its steady state,
as calibration/judge_serving.py does; aiconfigurator has `run_agg` of the same layout, load and
lengths, in an environment of its own, with its own defaults (experts' loads by a power law).
Seconds are of the CPU, without reading tables and profiles.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from expertlane.cost.laws.frameworks import frameworks
from expertlane.cost.laws.profile_file import read_profile
from expertlane.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "calibration"))

from serving_fit import Sides, unfitted
from serving_rows import Row, read_rows
from serving_simulation import Question, simulate


class Answer(NamedTuple):
    """What a projection says of a row; `error` where it has no answer."""

    tpot_s: float = 0.0
    output_tps: float = 0.0
    seconds: float = 0.0
    error: str = ""


Both = tuple[Row, Answer, Answer]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--aiconfigurator", type=Path, required=True, help="its Python")
    options = parser.parse_args()
    rows = sample(Sides.drawn(read_rows(options.table)[0]).judged)
    others = of_aiconfigurator(options.aiconfigurator, rows)
    own = [projected(row) for row in rows]
    every = list(zip(rows, own, others, strict=True))
    both = [each for each in every if not (each[1].error or each[2].error)]
    known = frameworks()
    of_hosts = "with" if {row.framework for row in rows} <= known.keys() else "without"
    print(f"{len(both)} rows, expertlane {of_hosts} fitted overheads of frameworks.\n")
    print("\n".join(table(both)))
    for name, answers in (("expertlane", own), ("aiconfigurator", others)):
        failed = [each.error for each in answers if each.error]
        print(f"\nNo answer of {name}: {len(failed)} of {len(rows)} rows. {'; '.join({*failed})}")
    print(json.dumps([_line(*each) for each in both]))


def sample(rows: Sequence[Row]) -> list[Row]:
    """Of one pool without speculation, each point once: its newest row."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda each: each.date):
        if row.prefill is None and not row.is_speculative:
            newest[row.point] = row
    return list(newest.values())


def of_aiconfigurator(python: Path, rows: Sequence[Row]) -> list[Answer]:
    """Its answers, from a process of its own."""
    script = Path(__file__).with_name("aiconfigurator_rows.py")
    fields = ("hardware", "framework", "precision", "isl", "osl", "conc")
    asked = [
        {name: getattr(row, name) for name in fields}
        | {name: getattr(row.decode, name) for name in ("tp", "ep", "dp_attention")}
        for row in rows
    ]
    done = subprocess.run(
        [python, script],
        input="".join(json.dumps(each) + "\n" for each in asked),
        env=os.environ | {"PYTHONPATH": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Answer(**json.loads(line)) for line in done.stdout.splitlines()]


def projected(row: Row) -> Answer:
    """Our answer."""
    read_profile(row.hardware)  # before the clock
    framework = frameworks().get(row.framework) or unfitted(row.framework)
    started = time.process_time()
    try:
        found = simulate(Question(row, framework, 0.0))
    except UserError as error:
        return Answer(error=str(error))
    return Answer(found.tpot_s[1], found.output_tps[1], time.process_time() - started)


def table(both: Sequence[Both]) -> list[str]:
    """The errors of both, by hardware, framework and type, as Markdown."""
    quantities = ("TPOT", "output tokens/s")
    of_each = " | ".join(f"{each}: signed | absolute | p90" for each in quantities)
    lines = [f"| rows of | rows | model | {of_each} | CPU s a row |"]
    lines.append("| --- | ---: | --- |" + " ---: |" * 7)
    kinds = dict.fromkeys(sorted(_kind(row) for row, _, _ in both))
    for kind in [*kinds, "all"]:
        of_kind = [each for each in both if kind in ("all", _kind(each[0]))]
        for place, name in ((1, "expertlane"), (2, "aiconfigurator")):
            answers = [(each[0], each[place]) for each in of_kind]
            cells = [kind, str(len(answers)), name]
            for field in ("tpot_s", "output_tps"):
                errors = [
                    getattr(answer, field) / getattr(row, field) - 1 for row, answer in answers
                ]
                cells += [f"{median(errors):+.0%}", f"{np.median(np.abs(errors)):.0%}"]
                cells.append(f"{np.quantile(np.abs(errors), 0.9):.0%}")
            cells.append(f"{median(answer.seconds for _, answer in answers):.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _kind(row: Row) -> str:
    return f"{row.hardware.upper()}, {row.framework}, {row.precision}"


def _line(row: Row, mine: Answer, theirs: Answer) -> dict[str, Any]:
    return {
        "row": [*map(str, row.point)],
        "measured": [row.tpot_s, row.output_tps],
        "expertlane": mine[:3],
        "aiconfigurator": theirs[:3],
    }


if __name__ == "__main__":
    main()
