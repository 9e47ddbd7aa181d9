"""Other models than DeepSeek's as others served them, against the simulation that `plan` shows.

python calibration/judge_models.py FILE           errors by model, card and type of weights
python calibration/judge_models.py FILE --most N  of at most N rows of each (30)

FILE: rows in the columns of aiconfigurator-core's `silicon_sample.csv`, and `split_layout` and
`split_concurrency`. Nothing was fitted to these rows. Models are read from the configurations that
aiconfigurator-core brings. Prints Markdown, and the tables of `cost/laws/frameworks.toml`.
Benchmarks begin all requests at once, and a steady state has no such queue: errors of TTFT are
printed, and not among those tables.
"""

import argparse
import csv
import importlib.util
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tomli_w
from judge_published import model_of
from serving_errors import FEWEST, range_of

from expertlane.cost.laws.execution import LIKELY, Execution
from expertlane.cost.laws.frameworks import JudgedGroup, attention_of, sizes_of
from expertlane.cost.laws.profile_file import ModelledCluster, read_profile
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import choose_routing
from expertlane.errors import UserError
from expertlane.plan.candidates import Candidate, Goals, PlanRequest
from expertlane.plan.project import Setting
from expertlane.plan.screen import fitting
from expertlane.plan.search import Search
from expertlane.plan.simulated import simulate
from expertlane.results.hardware import below_above
from expertlane.simulate.steady import ROUGH
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.workload import Workload

_MODELS = {
    "Qwen/Qwen3-235B-A22B-FP8": "Qwen3-235B",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "MiniMaxAI/MiniMax-M2.5": "MiniMax-M2.5",
}
_TYPES = {"bf16": "bfloat16", "fp8": "float8", "fp4": "nvfp4"}
_SEED = 0

Kind = tuple[str, str, str]
Row = dict[str, str]


def main() -> int:
    """Simulate and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--most", type=int, default=30, help="rows of a kind")
    asked = parser.parse_args()
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        print("install the tables first: pip install '.[calibration]'", file=sys.stderr)
        return 2
    package = Path(spec.origin).parent
    kinds: defaultdict[Kind, list[Row]] = defaultdict(list)
    with asked.file.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["model_path"] in _MODELS and row["mode"] == "agg":
                kinds[_kind(row)].append(row)
    groups = []
    print("| model | card | weights | rows | of | median error | absolute | nine in ten within |")
    print("| --- | --- | --- | ---: | --- | ---: | ---: | ---: |")
    for kind, rows in sorted(kinds.items()):
        if len(rows) < FEWEST:
            print(f"| {' | '.join(kind)} | {len(rows)} | too few rows | | | |", flush=True)
            continue
        some = np.random.default_rng(_SEED).permutation(len(rows))[: asked.most]
        found = list(_errors(kind, [rows[each] for each in sorted(some.tolist())], package))
        if len(found) < FEWEST:
            print(f"| {' | '.join(kind)} | {len(found)} | too few fit | | | |", flush=True)
            continue
        ratios = np.array(found)
        sizes = np.abs(ratios - 1)
        for place, what in enumerate(("TPOT", "TTFT")):
            print(
                f"| {' | '.join(kind)} | {len(found)} | {what} | "
                f"{np.median(ratios[:, place]) - 1:+.0%} | {np.median(sizes[:, place]):.0%} | "
                f"{below_above(range_of(ratios[:, place]))} |",
                flush=True,
            )
        groups.append(_group(kind, model_of(package, rows[0]["model_path"]), ratios))
    print(f"\n{tomli_w.dumps({'judged': [asdict(each) for each in groups]})}")
    return 0


def _kind(row: Row) -> Kind:
    model = _MODELS[row["model_path"]]
    weights = _TYPES[row["precision"]]
    if weights == "nvfp4" and model.startswith("gpt-oss"):
        weights = "mxfp4"
    return model, row["system"].removesuffix("_sxm"), weights


def _group(kind: Kind, config: ModelConfig, ratios: np.ndarray) -> JudgedGroup:
    model, hardware, weights = kind
    tpot, ttft = np.median(np.abs(ratios - 1), axis=0).round(3).tolist()
    low, high = range_of(ratios[:, 0])
    return JudgedGroup(
        hardware,
        weights,
        has_two_pools=False,
        has_drafts=False,
        framework="",
        num_rows=len(ratios),
        tpot=tpot,
        output=tpot,
        ttft=ttft,
        tpot_range=(low, high),
        output_range=(round(1 / high, 3), round(1 / low, 3)),
        ttft_range=(1.0, 1.0),
        model=model,
        sizes=sizes_of(config),
        attention=attention_of(config),
    )


def _errors(kind: Kind, rows: Sequence[Row], package: Path) -> Iterator[tuple[float, float]]:
    """TPOT and TTFT, projected over measured; of rows that fit."""
    for row in rows:
        try:
            found = _projected(kind, row, package)
        except UserError as error:
            print(f"{row['id']}: {error}", file=sys.stderr)
            continue
        if found is not None:
            measured = float(row["silicon_tpot_ms"]), float(row["silicon_ttft_ms"])
            yield 1e3 * found[0] / measured[0], 1e3 * found[1] / measured[1]


def _projected(kind: Kind, row: Row, package: Path) -> tuple[float, float] | None:
    """Mean TPOT and TTFT, seconds; None of what does not fit."""
    _, hardware, weights = kind
    model = model_of(package, row["model_path"])
    layout, num = Layout.parse(row["split_layout"]), int(row["split_concurrency"])
    routing = choose_routing(model, None, None, _SEED).source
    setting = Setting(NumberTypes.asked(weights), Execution.GRAPH, routing)
    cluster = ModelledCluster(read_profile(hardware), layout.world_size)
    workload = Workload(num_sequences=num, prompt_len=int(row["isl"]), output_len=int(row["osl"]))
    request = PlanRequest(model, cluster, workload, Goals(), setting)
    candidate = Candidate(layout, Options(dispatch="all_gather" if layout.ep > 1 else "all_to_all"))
    for option in fitting(Search(request).screen(candidates=[candidate])):
        served = simulate(option.at(option.most_seqs, workload), ROUGH, request=request)
        if served is not None:
            return float(served.tpot_s[LIKELY, 0]), float(served.ttft_s[LIKELY, 0])
    return None


if __name__ == "__main__":
    sys.exit(main())
