"""expertlane and aiconfigurator side by side on public measurements that both can project.

    python -m venv /tmp/aic && /tmp/aic/bin/pip install aiconfigurator-core==0.12.0
    python benchmarks/bench_aiconfigurator.py inferencex.csv --aiconfigurator /tmp/aic/bin/python

The file is InferenceX's (SemiAnalysis) as a table of DeepSeek-R1. Of each configuration (hardware,
framework, type, layout, lengths) of one pool without speculation a row is taken, that of the middle
load, on its newest day; `--loads all` takes all loads. expertlane simulates its load request by
request; aiconfigurator has `run_agg` of the same layout, load and lengths, in an environment of its
own, with its own defaults (experts' loads by a power law). Nothing was fitted to these rows here.
Seconds are of the CPU, one thread.
"""

import argparse
import csv
import json
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.profile_file import ModelledCluster, read_profile
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import PowerLawRouting
from expertlane.errors import UserError
from expertlane.results.metrics import serving_record
from expertlane.simulate.simulator import ServingSetup, Simulator
from expertlane.spec.deployment import Options
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.ranges import DEFAULT_SKEW
from expertlane.spec.workload import LengthRange, Load

CONFIGURATION = ("hardware", "framework", "precision", "tp", "ep", "dp_attention", "isl", "osl")
TYPES = {"fp8": "float8", "fp4": "nvfp4"}
REQUESTS = 3  # of a load, times those at once
MODEL = from_hf({"model_type": "deepseek_v3", "max_position_embeddings": 163840}, "DeepSeek-R1")
Row = dict[str, Any]


class Answer(NamedTuple):
    """What a projection says of a row; `error` where it has no answer."""

    tpot_s: float = 0.0
    tps_per_gpu: float = 0.0
    seconds: float = 0.0
    error: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--aiconfigurator", type=Path, required=True, help="its Python")
    parser.add_argument("--loads", choices=["middle", "all"], default="middle")
    options = parser.parse_args()
    with options.table.open(encoding="utf-8", newline="") as file:
        rows = sample(csv.DictReader(file), options.loads == "all")
    others = of_aiconfigurator(options.aiconfigurator, rows)
    own = [simulated(row) for row in rows]
    both = [
        (row, mine, theirs)
        for row, mine, theirs in zip(rows, own, others, strict=True)
        if not (mine.error or theirs.error)
    ]
    show(both)
    for name, answers in (("expertlane", own), ("aiconfigurator", others)):
        failed = [each.error for each in answers if each.error]
        print(f"\nNo answer of {name}: {len(failed)} of {len(rows)} rows. {'; '.join({*failed})}")
    print(json.dumps({"rows": len(rows), "both": [_line(*each) for each in both]}))


def sample(rows: Iterable[dict[str, str]], all_loads: bool) -> list[Row]:
    """The rows of one pool without speculation, one of each load, or of each configuration."""
    newest: dict[tuple[Any, ...], Row] = {}
    for each in rows:
        if each["disagg"] == "True" or each["spec_method"] != "none":
            continue
        row = {
            **{name: each[name] for name in ("hardware", "framework", "precision", "date")},
            **{name: int(each[name]) for name in ("isl", "osl", "conc")},
            "tp": int(each["decode_tp"]),
            "ep": int(each["decode_ep"]),
            "dp_attention": each["decode_dp_attention"] == "True",
            "tpot_s": float(each["median_tpot"]),
            "tps_per_gpu": float(each["output_tput_per_gpu"]),
        }
        key = (*(row[name] for name in CONFIGURATION), row["conc"])
        if key not in newest or row["date"] > newest[key]["date"]:
            newest[key] = row
    if all_loads:
        return list(newest.values())
    loads: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for (*configuration, _), row in sorted(newest.items()):
        loads[tuple(configuration)].append(row)
    return [each[len(each) // 2] for each in loads.values()]


def of_aiconfigurator(python: Path, rows: Sequence[Row]) -> list[Answer]:
    """Its answers, from a process of its own; the first row of each table pays for reading it."""
    script = Path(__file__).with_name("aiconfigurator_rows.py")
    asked = "".join(json.dumps(row) + "\n" for row in rows)
    done = subprocess.run([python, script], input=asked, capture_output=True, text=True, check=True)
    return [Answer(**json.loads(line)) for line in done.stdout.splitlines()]


def simulated(row: Row) -> Answer:
    """Our answer: the load request by request."""
    started = time.process_time()
    tp, load = row["tp"], row["conc"]
    layout = Layout(dp=tp, ep=row["ep"]) if row["dp_attention"] else Layout(tp=tp, ep=row["ep"])
    setup = ServingSetup(
        layout=layout,
        prefill_layout=None,
        options=Options(dispatch="all_to_all"),
        types=NumberTypes.asked(TYPES[row["precision"]]),
        execution=Execution.GRAPH,
        routing=PowerLawRouting.of(MODEL, DEFAULT_SKEW),
        max_num_seqs=max(256, load),
        max_num_batched_tokens=8192,
    )
    cluster = ModelledCluster(read_profile(row["hardware"]), tp)
    lengths = [LengthRange(row[name], row[name]) for name in ("isl", "osl")]
    try:
        simulator = Simulator(MODEL, cluster, setup, Load(REQUESTS * load, *lengths, batch=load))
        found = serving_record(simulator.run(0).served)
    except UserError as error:
        return Answer(error=str(error))
    assert found.tpot_s is not None, "of several tokens"
    assert found.tpot_s.median is not None, "simulated"
    seconds = time.process_time() - started
    return Answer(found.tpot_s.median.value, found.output_tps.value / tp, seconds)


def show(both: Sequence[tuple[Row, Answer, Answer]]) -> None:
    """The errors of both, by hardware, framework and type, as Markdown."""
    print("| rows of | rows | | TPOT: median signed | absolute: median | p90 | output tokens/s: "
          "median signed | absolute: median | p90 | CPU s a row, median |")  # fmt: skip
    print("| --- | ---: | --- |" + " ---: |" * 7)
    kinds = sorted({_kind(row) for row, _, _ in both})
    for kind in [*kinds, "all"]:
        of_kind = [each for each in both if kind in ("all", _kind(each[0]))]
        for name, place in (("expertlane", 1), ("aiconfigurator", 2)):
            answers = [(each[0], each[place]) for each in of_kind]
            cells = [kind, str(len(answers)), name]
            for field in ("tpot_s", "tps_per_gpu"):
                errors = [getattr(answer, field) / row[field] - 1 for row, answer in answers]
                absolute = np.abs(errors)
                cells += [f"{median(errors):+.0%}", f"{median(absolute):.0%}"]
                cells.append(f"{np.quantile(absolute, 0.9):.0%}")
            cells.append(f"{median(answer.seconds for _, answer in answers):.2f}")
            print(f"| {' | '.join(cells)} |")


def _kind(row: Row) -> str:
    return f"{row['hardware'].upper()}, {row['framework']}, {row['precision']}"


def _line(row: Row, mine: Answer, theirs: Answer) -> Row:
    own, other = ({name: round(getattr(each, name), 5) for name in ("tpot_s", "tps_per_gpu",
                                                                   "seconds")}
                  for each in (mine, theirs))  # fmt: skip
    return row | {"expertlane": own, "aiconfigurator": other}


if __name__ == "__main__":
    main()
