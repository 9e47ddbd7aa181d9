"""The factor of the paper's proposal in virtual time, by batch, speed of links, and skew.

.venv/bin/python benchmarks/bench_factor.py [--batches 64 256 1024]
`paper-small` with other batches and routers, its deployments but those of scaling. For each: decode
TPS of EP 16, of which the faster with and without overlap counts, over the best baseline's and over
that of the best with 4 micro-batches, on no links, on the paper's cluster's (1:N, as `compare`
chooses N), and on links 4 times as fast and as slow; then why, in a sentence, at 1:N. The paper
reports 3.75. Prints a table, then one JSON line. Timings are CPU times, so other programs on the
machine change little.
"""

import argparse
import json
from dataclasses import replace

from expertlane.compare.run import run_comparison
from expertlane.compare.virtual import VirtualSettings
from expertlane.cost.laws.profile_file import read_profile
from expertlane.engine.launch import start_pool
from expertlane.progress import Silent
from expertlane.report.compared import run
from expertlane.report.verdict import verdict
from expertlane.results.record import EXPERIMENT
from expertlane.results.results import Results
from expertlane.spec.experiment import Experiment, read_experiment, shipped_experiments

PAPERS_FACTOR = 3.75
SKEWS = (0.0, 1.0)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    batches = parser.parse_args().batches
    experiment = read_experiment(shipped_experiments()["paper-small"])
    settings = VirtualSettings(read_profile("h100"))
    lines, cpu = [], ""
    pool = start_pool(experiment.num_ranks, timeout_s=120.0)
    assert pool is not None, "torchrun's ranks have nothing to say here"
    with pool:
        for skew in SKEWS:
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
                lines.append(line)
                print(f"batch {batch}, skew {skew:g}, 1:{line['scale']:.4g}")
                for each in line["factors"]:
                    print(
                        f"  links 1:{each['scale']:<8.4g} x best baseline "
                        f"{each['over_best_baseline']:.2f}   x best of m=4 "
                        f"{each['over_best_of_m4']:.2f}   (the paper reports {PAPERS_FACTOR})"
                    )
                print(f"  {' '.join(line['why'])}", flush=True)
    print(json.dumps({"cpu": cpu, "cases": lines}))


if __name__ == "__main__":
    main()
