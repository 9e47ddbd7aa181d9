"""What `--check light` and `full` cost: tokens per second against those without, in turns.

Every layout runs three times at once, without checks and with each level; prompts and then decodes
go to them in turns. A ratio is the median over rounds of a round's own, so that whatever else the
machine does meets all three. CPU time is that of all ranks.

    python benchmarks/bench_check.py [--model MODEL] [--batch 8] [LAYOUT …]
"""

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from typing import get_args

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from expertlane import LLM, SamplingParams
from expertlane.spec.names import CheckLevel

LAYOUTS = ("tp=1", "tp=2", "dp=2,ep=2", "dp=2,tp=2,ep=4")
PROMPT_LEN, OUTPUT_LEN = 64, 48
LEVELS = get_args(CheckLevel)


def cpu_s(llm: LLM) -> float:
    """Of all ranks so far."""
    pids = [llm._pool.pid(rank) for rank in range(llm._pool.num_ranks)]
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(each.user + each.system for each in times)


def run(llm: LLM, number: int, batch: int, output_len: int) -> tuple[float, float]:
    """Wall and CPU seconds of a batch of prompts and their outputs."""
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    prompts = np.random.default_rng(number).integers(0, llm.model.vocab_size, (batch, PROMPT_LEN))
    began_cpu_s, began_s = cpu_s(llm), time.perf_counter()
    llm.generate(prompts.tolist(), params)
    return time.perf_counter() - began_s, cpu_s(llm) - began_cpu_s


def measure(model: str, layout: str, batch: int, rounds: int) -> dict[str, float]:
    """Ratios by name: wall and CPU time without checks over that with a level."""
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        llms = {
            level: stack.enter_context(
                LLM(model, layout=layout, check=level, num_blocks=1024, prefix_caching=False)
            )
            for level in LEVELS
        }
        for output_len, phase in ((1, "prefill"), (OUTPUT_LEN, "decode")):
            for number in range(rounds + 1):
                order = LEVELS if number % 2 else LEVELS[::-1]
                took = {level: run(llms[level], number, batch, output_len) for level in order}
                if number == 0:
                    continue  # the first one of each warms it up
                for level in LEVELS[1:]:
                    for place, kind in enumerate(("wall", "cpu")):
                        ratio = took["off"][place] / max(took[level][place], 1e-9)
                        found.setdefault(f"{phase} {level} {kind}", []).append(ratio)
    return {name: statistics.median(ratios) for name, ratios in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layouts", nargs="*", default=LAYOUTS)
    parser.add_argument("--model", default="paper-small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = {
        layout: measure(options.model, layout, options.batch, options.rounds)
        for layout in options.layouts
    }
    if options.json:
        print(json.dumps(rows))
        return
    table = Table("layout", *next(iter(rows.values())), title=f"{options.model}: with over without")
    for layout, ratios in rows.items():
        table.add_row(layout, *(f"{ratio:.2f}" for ratio in ratios.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
