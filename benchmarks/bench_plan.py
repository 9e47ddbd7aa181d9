"""How fast the planner is, and how good: candidates a second, and whether screening loses the best.

python benchmarks/bench_plan.py [--devices 16]
python benchmarks/bench_plan.py --screening 6 [--candidates 200]

The first: a model of 94 layers and 128 experts, on one core, and what the command costs before it
begins. The second: drawn questions, for each so many drawn candidates, all simulated roughly: at
which place as screened is the best as simulated, and how much less has the best of the ten best
screened, and what `plan` finds of them. Of many that are nearly as good the rough best is also the
luckiest, so losses are those of both simulated again, precisely. Prints a table, then a JSON line.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from expertlane.cost.laws.profile import LIKELY, Execution, parse_cluster
from expertlane.cost.projector import Setting
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.operation import NumberTypes
from expertlane.cost.throughput import Goals
from expertlane.planner.candidates import PlanRequest
from expertlane.planner.search import Search, Trials
from expertlane.planner.simulated import Race, simulate, simulated_pool
from expertlane.planner.two_pools import TwoPoolSearch
from expertlane.simulator.watch import ROUGH, USUAL
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


_MOST_LOOKED_AT = 10  # as screened


def drawn(dice: random.Random) -> PlanRequest:
    """A model, a cluster and a load; every other one with a limit of TPOT."""
    model = dice.choice([MODEL, PRESETS["paper"]])
    cluster = parse_cluster(f"{dice.choice(['h100', 'h200'])}x{dice.choice([8, 16])}")
    prompt_len, output_len = dice.choice([(2000, 500), (500, 500), (1000, 200), (100, 300)])
    workload = Workload(dice.choice([32, 128, 512]), prompt_len, output_len, dice.randrange(9))
    routing = PowerLawRouting.of(model, dice.choice([0.0, 0.5, 0.8]), num_sampled_layers=2)
    setting = Setting(NumberTypes(), Execution.GRAPH, routing)
    return PlanRequest(model, cluster, workload, Goals(), setting)


def judge_screening(num_questions: int, num_candidates: int) -> None:
    """Simulate drawn candidates of drawn questions, and compare with their order as screened."""
    rows = []
    for number in range(num_questions):
        dice = random.Random(number)
        request = drawn(dice)
        search = Search(request)
        options = search.options(search.screen())
        if number % 2:  # what the best by the formula takes, and a quarter more
            best = max(options, key=lambda each: each.tps)
            limit_s = 1.25 * float(best.served.tpot_s[LIKELY, best.place or 0])
            request = replace(request, goals=Goals(max_tpot_s=limit_s / dice.choice([1, 2])))
        chosen = dice.sample(options, min(num_candidates, len(options)))
        chosen.sort(key=lambda each: -each.within(request.goals)[1])
        run = partial(simulate, request=request)
        trials = [Trials(each, request, run, ROUGH) for each in chosen]
        for each in trials:
            each.settle(0.03)
        best = max(trials, key=lambda each: each.tps)
        place = trials.index(best)
        raced = Race(chosen, request, run, lambda _: None).result()
        ahead = max(trials[:_MOST_LOOKED_AT], key=lambda each: each.tps)
        losses = [
            0.0 if place < _MOST_LOOKED_AT else loss_of([ahead], best),
            loss_of(raced.able[:3], best),
        ]
        rows.append(
            {"candidates": len(chosen), "place": place + 1}
            | dict(zip(("loss", "raced"), losses, strict=True))
        )
        print(
            f"{number:2} {request.model.name:10} {request.cluster!s:8} "
            f"{request.workload.num_sequences:4} at once, {len(chosen):3} candidates: best "
            f"simulated is #{place + 1:<3} as screened; ten best {losses[0]:.1%} below it, "
            f"raced ({raced.num_simulated}) {losses[1]:.1%}",
            flush=True,
        )
    among = sum(row["place"] <= _MOST_LOOKED_AT for row in rows) / len(rows)
    loss, raced = (max(row[name] for row in rows) for name in ("loss", "raced"))
    print(f"among the ten best screened: {among:.0%}; largest loss {loss:.1%}, raced {raced:.1%}")
    print(json.dumps({"questions": rows}))


def loss_of(some: Sequence[Trials], best: Trials) -> float:
    """How much less the best of some has than the best of all, simulated precisely; a share."""
    most, *others = [each.again(USUAL) for each in (best, *some)]
    for each in (most, *others):
        each.settle(0.005)
    have = max((each.tps for each in others), default=0.0)
    return max(1 - have / most.tps, 0.0) if most.tps else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--screening", type=int, metavar="QUESTIONS")
    parser.add_argument("--candidates", type=int, default=200)
    given = parser.parse_args()
    num_devices = given.devices
    if given.screening:
        judge_screening(given.screening, given.candidates)
        return
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
    start_s = started_s("-c", "import expertlane.cli.plan, expertlane.planner.results")
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
