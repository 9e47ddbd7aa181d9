"""The factor of the paper's proposal in virtual time, by batch, speed of links, and skew.

.venv/bin/python benchmarks/bench_factor.py [--batches 64 256 1024] [--skews 0 1] [--plot FILE.svg]
.venv/bin/python benchmarks/bench_factor.py --kept FILE.json --plot FILE.svg
`paper-small` with other batches and routers, its deployments but those of scaling. For each: decode
TPS of EP 16, of which the faster with and without overlap counts, over the best baseline's and over
that of the best with 4 micro-batches, on no links, on the paper's cluster's (1:N, as `compare`
chooses N), and on links 4 times as fast and as slow; then why, in a sentence, at 1:N. The paper
reports 3.75. Prints a table, then one JSON line. Timings are CPU times, so other programs on the
machine change little. With --kept, the line of an earlier run is drawn and nothing runs.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertlane.comparison.run import run_comparison
from expertlane.comparison.virtual import VirtualSettings
from expertlane.cost.laws.profile import read_profile
from expertlane.engine.launch import start_pool
from expertlane.progress import Silent
from expertlane.report.compared import run
from expertlane.report.verdict import verdict
from expertlane.results.record import EXPERIMENT
from expertlane.results.results import Results
from expertlane.spec.experiment import Experiment, read_experiment, shipped_experiments

PAPERS_FACTOR = 3.75
OUTPUT_LEN = 5  # decode steps: one less


def variant(experiment: Experiment, batch: int, skew: float) -> Experiment:
    """The experiment with another batch and router."""
    model = experiment.model
    if skew:
        routing = replace(model.routing, router_bias=True, router_skew=skew)
        model = replace(model, routing=routing)
    workload = replace(experiment.workload, num_sequences=batch, output_len=OUTPUT_LEN)
    return replace(experiment, model=model, workload=workload, scaling=())


def factors(results: Results) -> list[dict[str, float]]:
    """Over the best baseline, and over the best with 4 micro-batches, by the links' scale."""
    records = results.select("virtual", EXPERIMENT)
    found = []
    for speed in results.virtual_time.speeds:
        of_record = list(zip(records, speed.tps, strict=True))
        best = max(tps for record, tps in of_record if not record.is_baseline)
        baselines = [each for each in of_record if each[0].is_baseline]
        four = [tps for record, tps in baselines if record.options.num_micro_batches == 4]
        found.append(
            {
                "scale": speed.scale,
                "over_best_baseline": best / max(tps for _, tps in baselines),
                "over_best_of_m4": best / max(four),
            }
        )
    return found


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Curves over the links' slowness: a line a batch size, a row a rival, a column a router."""
    import vl_convert

    rivals = {"over_best_baseline": "best baseline", "over_best_of_m4": "best of m=4"}
    values = [
        {
            "factor": each[name],
            "links": each["scale"] / case["scale"],
            "sequences": f"{case['batch']:,}",
            "rival": f"EP 16 over {rival}",
            "router": f"skew {case['skew']:g}",
        }
        for case in cases
        for each in case["factors"]
        if each["scale"]
        for name, rival in rivals.items()
    ]
    x = {
        "field": "links",
        "type": "quantitative",
        "scale": {"type": "log", "base": 2},
        "title": "transfers take … times as long as assumed",
    }
    y = {"field": "factor", "type": "quantitative", "title": "decode TPS, factor"}
    order = [f"{batch:,}" for batch in sorted({case["batch"] for case in cases})]
    lines = {
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": x,
            "y": y,
            "color": {"field": "sequences", "type": "nominal", "sort": order},
        },
    }
    rules = [
        {"mark": {"type": "rule", "strokeDash": dash}, "encoding": {"y": {"datum": at}}}
        for at, dash in ((1, [1, 0]), (PAPERS_FACTOR, [4, 4]))
    ]
    spec = {
        "title": "Dashed: the paper's 3.75",
        "background": "white",
        "data": {"values": values},
        "facet": {
            "row": {"field": "rival", "title": None},
            "column": {"field": "router", "title": None},
        },
        "spec": {"width": 260, "height": 150, "layer": [lines, *rules]},
    }
    path.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--skews", type=float, nargs="+", default=[0.0, 1.0], help="of the router")
    parser.add_argument("--plot", type=Path, help="where to draw them, as SVG")
    parser.add_argument("--kept", type=Path, help="the JSON line of an earlier run")
    asked = parser.parse_args()
    kept = asked.kept and json.loads(asked.kept.read_text())
    found = kept or measure(asked.batches, asked.skews)
    if asked.plot:
        plot(found["cases"], asked.plot)
    if not asked.kept:
        print(json.dumps(found))


def measure(batches: list[int], skews: list[float]) -> dict[str, Any]:
    """All cases, printed as they come."""
    experiment = read_experiment(shipped_experiments()["paper-small"])
    settings = VirtualSettings(read_profile("h100"))
    cases: list[dict[str, Any]] = []
    cpu = ""
    pool = start_pool(experiment.num_ranks, timeout_s=120.0)
    assert pool is not None, "torchrun's ranks have nothing to say here"
    with pool:
        for skew in skews:
            for batch in batches:
                results = run_comparison(
                    variant(experiment, batch, skew), pool, Silent(), command="", virtual=settings
                )
                own, cpu = run(results, "virtual"), results.measured_on.cpu_name
                assert own is not None
                assert results.virtual_time is not None
                line = {
                    "batch": batch,
                    "skew": skew,
                    "scale": results.virtual_time.scale,
                    "factors": factors(results),
                    "why": verdict(own, results)[:2],
                }
                cases.append(line)
                print(f"batch {batch}, skew {skew:g}, 1:{line['scale']:.4g}")
                for each in line["factors"]:
                    print(
                        f"  links 1:{each['scale']:<8.4g} x best baseline "
                        f"{each['over_best_baseline']:.2f}   x best of m=4 "
                        f"{each['over_best_of_m4']:.2f}   (the paper reports {PAPERS_FACTOR})"
                    )
                print(f"  {' '.join(line['why'])}", flush=True)
    return {"cpu": cpu, "cases": cases}


if __name__ == "__main__":
    main()
