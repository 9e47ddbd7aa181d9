"""How fast the planner is: candidates a second, and what the command costs before it begins.

python benchmarks/bench_plan.py [--devices 16]

A model of 94 layers and 128 experts, on one core. Prints a table, then one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.profile_file import parse_cluster
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import PowerLawRouting
from expertlane.plan.candidates import Goals, PlanRequest
from expertlane.plan.project import Setting
from expertlane.plan.search import Search
from expertlane.plan.simulated import simulated_pool
from expertlane.plan.two_pools import TwoPoolSearch
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

MODEL = PRESETS["paper"].with_overrides(
    name="94 layers",
    num_hidden_layers=94,
    hidden_size=4096,
    num_attention_heads=64,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=1536,
    gated_mlp=True,
    hidden_act="silu",
    vocab_size=151_936,
)
WORKLOAD = Workload(num_sequences=1024, prompt_len=2000, output_len=500)
_STARTS = 5


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def started_s(*words: str) -> float:
    """The median of some starts of a program."""
    run = [sys.executable, *words]
    times = [
        seconds(lambda: subprocess.run(run, check=True, capture_output=True))
        for _ in range(_STARTS)
    ]
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=16)
    num_devices = parser.parse_args().devices
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cluster = parse_cluster(f"h100x{num_devices}")
    routing = PowerLawRouting.of(MODEL, 0.0, num_sampled_layers=2)
    setting = Setting(NumberTypes(), Execution.GRAPH, routing)
    request = PlanRequest(MODEL, cluster, WORKLOAD, Goals(), setting)
    search = Search(request)
    num_candidates = len(search.candidates)
    screen_s = seconds(lambda: search.screen())
    whole_s = seconds(lambda: simulated_pool(search, search.screen(), lambda _: None))
    pools_s = seconds(lambda: TwoPoolSearch(request).run())
    help_s = started_s("-m", "expertlane", "plan", "--help")
    start_s = started_s("-c", "import expertlane.cli.plan, expertlane.plan.results")
    rows = {
        f"{num_candidates:,} candidates screened": screen_s,
        "the same for 2,000": screen_s * 2000 / num_candidates,
        "with the best twelve in full": whole_s,
        "two pools as well": whole_s + pools_s,
        "plan --help": help_s,
        "plan, everything imported": start_s,
    }
    for name, value in rows.items():
        print(f"{name:34} {value:6.2f} s")
    print(json.dumps({"devices": num_devices, "candidates": num_candidates, "seconds": rows}))


if __name__ == "__main__":
    main()
