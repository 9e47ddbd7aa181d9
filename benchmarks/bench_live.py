"""What it costs to be watched: ranks that count, and ten open pages of `/live`.

    python benchmarks/bench_live.py [LAYOUT] [ROUNDS]

Sides take turns, so that what else the machine does hits them alike; medians over the rounds.

1. Calls: CPU time of a rank's calls with a meter and without, in one process.
2. Idle: CPU time of an idle server's front in a second, with ten pages open and with none.
3. Ranks: two engines of the same model, one of them watched (twice a second); CPU time of the ranks
   for 8 greedy sequences, and wall time of the same.
4. Load: one server under a steady load of 8 streams; CPU time of its front an output token, and
   tokens a second, with ten pages open and with none.
"""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median

import httpx
import psutil
import torch

from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.llm import LLM
from expertlane.spec.names import Stage
from expertlane.spec.sampling import SamplingParams

MODEL = "paper-small"
NUM_STREAMS, NUM_TOKENS, NUM_VIEWERS = 8, 100, 10
LOAD_S = 8.0
NUM_CALLS = 20_000
PROMPTS = [[seq + 1] * 8 for seq in range(NUM_STREAMS)]
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


def seconds_of_ranks(llm: LLM) -> float:
    """CPU time that its ranks have had so far."""
    pids = [llm._pool.pid(rank) for rank in range(llm._pool.num_ranks)]
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(each.user + each.system for each in times)


def run(llm: LLM, watch) -> tuple[float, float]:
    """CPU and wall seconds of one generation."""
    if watch is not None:
        llm.engine.on_commit = lambda step: watch.poll()
    before_s, began_s = seconds_of_ranks(llm), time.perf_counter()
    llm.generate(PROMPTS, GREEDY)
    return seconds_of_ranks(llm) - before_s, time.perf_counter() - began_s


def bench_calls(num_rounds: int) -> None:
    """The first part."""
    progress = ProgressBoard(1).reporter(0)
    counts, zeros = torch.ones(16, dtype=torch.int64), torch.zeros(16, dtype=torch.int64)

    def calls(recorder: Recorder) -> dict[str, Callable[[], object]]:
        meter = recorder.meter
        found = {
            "enter": lambda: recorder.enter(Stage.EXPERTS, 3),
            "wait": lambda: recorder.wait_at_once(lambda: None),
        }
        if meter is not None:
            found["sent to 16"] = lambda: meter.sent([0] * 16, [1] * 16, 64)
            found["counts"] = lambda: zeros.add_(counts)
        return found

    recorders = [Recorder(0, 8, 64, progress, HostClock(), 16) for _ in range(2)]
    recorders[1].totals()
    taken: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(num_rounds):
        for side, recorder in enumerate(recorders):
            for name, call in calls(recorder).items():
                began_s = time.process_time()
                for _ in range(NUM_CALLS):
                    call()
                taken[name, side].append((time.process_time() - began_s) / NUM_CALLS)
    for name in calls(recorders[1]):
        without, with_ = (1e9 * median(taken.get((name, side), [0.0])) for side in (0, 1))
        print(f"{name}: {without:.0f} ns without, {with_:.0f} with a meter")


def bench_ranks(layout: str, num_rounds: int) -> None:
    """The third part."""
    given = {"layout": layout, "num_blocks": 512, "prefix_caching": False}
    with LLM(MODEL, **given) as plain, LLM(MODEL, **given) as watched:
        watch, rounds = watched.watch(), []
        for llm, own in ((plain, None), (watched, watch)):
            run(llm, own)  # warm
        for number in range(num_rounds):
            sides = [(plain, None), (watched, watch)]
            found = {own is not None: run(llm, own) for llm, own in sides[:: (-1) ** number]}
            rounds.append([w / p for p, w in zip(found[False], found[True], strict=True)])
        cpu, wall = (median(column) for column in zip(*rounds, strict=True))
        print(
            f"ranks that count, {layout}: CPU time × {cpu:.4f}, wall time × {wall:.4f}", flush=True
        )


class Server:
    """`expertlane serve` as a process."""

    def __init__(self, layout: str) -> None:
        command = [sys.executable, "-m", "expertlane", "serve", MODEL, "--layout", layout]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--json", "--num-blocks", "1024"],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = json.loads(self.process.stdout.readline())["live"].removesuffix("/live")
        self._seen = psutil.Process(self.process.pid)

    def measure(self) -> tuple[float, float]:
        """CPU seconds of the process so far, and output tokens."""
        text = httpx.get(f"{self.url}/metrics").text
        (tokens,) = re.findall(r"^vllm:generation_tokens_total{.*} (\S+)", text, re.MULTILINE)
        times = self._seen.cpu_times()
        return times.user + times.system, float(tokens)


async def load(url: str, until_s: float) -> None:
    """One stream after the other."""
    body = {"prompt": [3] * 8, "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while time.monotonic() < until_s:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for _ in answer.aiter_raw():
                    pass


async def view(url: str) -> None:
    """An open page: reads all that comes."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:  # noqa: SIM117
        async with client.stream("GET", "/live/feed") as answer:
            async for _ in answer.aiter_raw():
                pass


async def round_of(server: Server, num_viewers: int) -> tuple[float, float]:
    """CPU seconds of the front a token, and tokens a second."""
    viewers = [asyncio.create_task(view(server.url)) for _ in range(num_viewers)]
    until_s = time.monotonic() + LOAD_S
    loads = [asyncio.create_task(load(server.url, until_s + 1)) for _ in range(NUM_STREAMS)]
    await asyncio.sleep(1)
    before, began_s = server.measure(), time.monotonic()
    await asyncio.sleep(LOAD_S - 1)
    after, ended_s = server.measure(), time.monotonic()
    for each in viewers:
        each.cancel()
    await asyncio.gather(*loads)
    tokens = after[1] - before[1]
    return (after[0] - before[0]) / tokens, tokens / (ended_s - began_s)


async def idle(server: Server, num_viewers: int) -> float:
    """CPU time of the front in a second."""
    viewers = [asyncio.create_task(view(server.url)) for _ in range(num_viewers)]
    await asyncio.sleep(1)
    before, began_s = server.measure(), time.monotonic()
    await asyncio.sleep(LOAD_S)
    after, ended_s = server.measure(), time.monotonic()
    for each in viewers:
        each.cancel()
    return (after[0] - before[0]) / (ended_s - began_s)


def bench_pages(layout: str, num_rounds: int) -> None:
    """The second and the fourth part."""
    server, rounds = Server(layout), []
    try:
        idles = [
            [asyncio.run(idle(server, num)) for num in (0, NUM_VIEWERS)] for _ in range(num_rounds)
        ]
        none, ten = (1e3 * median(column) for column in zip(*idles, strict=True))
        print(f"idle, {layout}: {none:.1f} ms of CPU time a second, {ten:.1f} with ten pages")
        asyncio.run(round_of(server, 0))  # warm
        for number in range(num_rounds):
            found = {
                num: asyncio.run(round_of(server, num))
                for num in (0, NUM_VIEWERS)[:: (-1) ** number]
            }
            rounds.append((*found[0], *found[NUM_VIEWERS]))
    finally:
        server.process.terminate()
        server.process.wait()
    columns = list(zip(*rounds, strict=True))
    cpu = [with_ / without for without, _, with_, _ in rounds]
    speed = [with_ / without for _, without, _, with_ in rounds]
    print(
        f"{NUM_VIEWERS} pages, {layout}: CPU time of the front a token × {median(cpu):.4f} "
        f"({1e6 * median(columns[0]):.0f} to {1e6 * median(columns[2]):.0f} µs), tokens/s × "
        f"{median(speed):.4f} ({median(columns[1]):.0f} to {median(columns[3]):.0f})"
    )
    added_s = median(b * t - a * s for a, s, b, t in rounds)
    print(f"  ten pages take {1e3 * added_s:.1f} ms of CPU time a second")


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "dp=2,ep=2"
    times = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    bench_calls(times)
    bench_pages(chosen, times)
    bench_ranks(chosen, times)
