"""Thousands of drawn requests through `expertlane serve`, in several layouts, judged one by one.

Each request is drawn from (--seed, its number): --first goes on where a run was ended. Every
answer is held against `LLM.generate` on one rank, in float32. Then /metrics has to agree with the
clients, and memory to be as before. From the repository's root:

    PYTHONPATH=src:tests python -m server.soak --requests 20000
"""

import argparse
import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families

from engine.model.chat_checkpoint import save_chat_checkpoint
from engine.ranks.processes import wait_until
from expertlane.engine.llm import LLM
from server import soak_serve
from server.front import Front
from server.soak_client import SOAK_S, send
from server.soak_judge import Arbiter, Judge
from server.soak_requests import DrawnRequest, TrueChoice, draw, right_answers

TEMPLATE = (
    "{% for message in messages %}<u>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
# So small a cache that requests lose their blocks.
CACHE = ("--block-size", "1", "--num-blocks", "600")
COMMON = (*CACHE, "--max-num-seqs", "32", "--max-num-batched-tokens", "256")
LAYOUTS = {
    "dp=2,ep=2": ("--num-redundant-experts", "2", "--rebalance-steps", "40"),
    "tp=2,ep=2": ("--rebalance-steps", "40"),
    "pp=2": ("--num-micro-batches", "2", "--micro-batch-schedule", "rotating"),
    "dp=2,tp=2,ep=4": ("--num-redundant-experts", "4", "--rebalance-steps", "40"),
}
AT_ONCE = (3, 24, 80)  # clients, by turns
TURN = 100  # requests
PART = 500  # requests that are drawn, computed offline and sent together
CALM_SHARE = 0.2  # the last ones of a part: nobody leaves, so that all counts are known
MOST_GROWTH_BYTES = 8_000_000  # of a process


Metrics = dict[str, float]  # by name and labels


class Server(Front):
    """A server whose memory and metrics are read."""

    def resident(self) -> dict[str, int]:
        """Bytes by process: the front, then all that it has started."""
        own = {"front": self.process.memory_info().rss}
        children = self.process.children(recursive=True)
        return own | {f"{c.name()} {c.pid}": c.memory_info().rss for c in children}

    def metrics(self) -> Metrics:
        """Values by name and reason."""
        text = httpx.get(f"{self.url}/metrics", timeout=SOAK_S).text
        return {
            " ".join((sample.name, *_own_labels(sample.labels))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def is_idle(self) -> bool:
        """Whether nothing runs or waits, and no block is held."""
        values = self.metrics()
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(values[f"vllm:{name}"] for name in names)


def _own_labels(labels: dict[str, str]) -> list[str]:
    return [value for name, value in labels.items() if name not in ("model_name", "engine")]


@contextmanager
def serving(folder: Path, layout: str, log: Path) -> Iterator[Server]:
    """A server that rebalances eagerly, ended as a user ends it.

    Raises:
        AssertionError: it did not start, or did not end well.
    """
    options = ("--dtype", "float32", *COMMON, *LAYOUTS[layout])
    program = [str(Path(soak_serve.__file__))]
    server = Server(folder, log, *options, layout=layout, program=program)
    server.start()
    try:
        yield server
    except BaseException:
        server.kill()
        raise
    server.end()


@dataclass
class Soak:
    """Sends requests to a server, and takes note of memory.

    Attributes:
        resident: bytes by process, after every part.
    """

    server: Server
    judge: Judge
    resident: list[dict[str, int]] = field(default_factory=list)

    def send(self, asked: Sequence[DrawnRequest], right: dict[int, list[TrueChoice]]) -> None:
        """Send them all, and wait until nothing is left of them."""
        asyncio.run(self._run(asked, right))
        assert wait_until(self.server.is_idle, SOAK_S, pause_s=0.05), "it does not become idle"

    async def _run(self, asked: Sequence[DrawnRequest], right: dict[int, list[TrueChoice]]) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        async with httpx.AsyncClient(
            base_url=self.server.url, timeout=SOAK_S, limits=limits
        ) as client:
            for begin in range(0, len(asked), TURN):
                turn = iter(asked[begin : begin + TURN])
                number = AT_ONCE[asked[begin].number // TURN % len(AT_ONCE)]
                workers = (self._work(client, turn, right) for _ in range(number))
                await asyncio.gather(*workers)

    async def _work(
        self,
        client: httpx.AsyncClient,
        turn: Iterable[DrawnRequest],
        right: dict[int, list[TrueChoice]],
    ) -> None:
        for asked in turn:
            came = await send(client, asked)
            self.judge.take(asked, came, right.get(asked.number, []))


def check_counts(counts: Counter[str], before: Metrics, after: Metrics) -> None:
    """Hold the server's counts against the clients', where nobody has left.

    Raises:
        AssertionError: they differ.
    """
    num_choices = counts["choices stop"] + counts["choices length"]
    expected = {
        "vllm:request_success_total stop": counts["choices stop"],
        "vllm:request_success_total length": counts["choices length"],
        "vllm:request_success_total abort": 0,
        "vllm:request_success_total error": 0,
        "vllm:generation_tokens_total": counts["completion tokens"],
        "vllm:prompt_tokens_total": counts["prompt tokens"],
        "vllm:time_to_first_token_seconds_count": num_choices,
        "vllm:e2e_request_latency_seconds_count": num_choices,
        "vllm:inter_token_latency_seconds_count": counts["completion tokens"] - num_choices,
    }
    found = {name: after[name] - before.get(name, 0) for name in expected}
    kinds = {"2": "answered", "4": "refused"}  # by a status's first digit
    expected |= {kind: counts[kind] for kind in kinds.values()}
    found |= dict.fromkeys(kinds.values(), 0)
    for name in after:
        if name.startswith("http_requests_total /v1/"):
            status = name.rpartition(" ")[2]
            grown = after[name] - before.get(name, 0)
            assert not grown or status[0] in kinds, f"{grown} answers have status {status}"
            if grown:
                found[kinds[status[0]]] += grown
    assert found == expected, f"/metrics has {found}, the clients {expected}"


def check_memory(resident: Sequence[dict[str, int]]) -> dict[str, int]:
    """By process, how much the last third of the parts has above the third before.

    Raises:
        AssertionError: that is too much.
    """
    third = len(resident) // 3
    if not third:
        return {}
    grown = {
        name: int(
            np.median([each[name] for each in resident[-third:]])
            - np.median([each[name] for each in resident[-2 * third : -third]])
        )
        for name in resident[-1]
        if all(name in each for each in resident)
    }
    assert max(grown.values()) <= MOST_GROWTH_BYTES, grown
    return grown


def soak(
    folder: Path, layout: str, numbers: range, *, seed: int, part: int, log: Path
) -> Counter[str]:
    """Send requests to a server of a layout, and check all that there is to check.

    Args:
        folder: of the checkpoint.
        part: requests at a time.

    Returns:
        What became of them.

    Raises:
        AssertionError: something is wrong.
    """
    with (
        LLM(folder, dtype="float32", num_blocks=4096) as llm,
        serving(folder, layout, log) as server,
    ):
        judge = Judge(Arbiter(folder))
        run = Soak(server, judge)
        for begin in range(numbers.start, numbers.stop, part):
            end = min(begin + part, numbers.stop)
            first_calm = end - int((end - begin) * CALM_SHARE)
            asked = [
                draw(seed, number, is_calm=number >= first_calm) for number in range(begin, end)
            ]
            right = right_answers(llm, asked)
            run.send(asked[: first_calm - begin], right)
            counts, before = judge.counts.copy(), server.metrics()
            run.send(asked[first_calm - begin :], right)
            judge.check()
            after = server.metrics()
            check_counts(judge.counts - counts, before, after)
            run.resident.append(server.resident())
            judge.counts["preemptions"] = int(after["vllm:num_preemptions_total"])
            judge.counts["rebalances"] = log.read_text().count(soak_serve.SWITCHED)
            print(f"{layout}: {end - numbers.start} of {len(numbers)} requests", flush=True)
        print(f"memory grew by {check_memory(run.resident)} bytes")
    return judge.counts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000, help="over all layouts")
    parser.add_argument("--first", type=int, default=0, help="number of the first of each layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--part", type=int, default=PART, help="requests at a time")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    num_each = options.requests // len(options.layouts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tiny"
        folder.mkdir()
        save_chat_checkpoint(folder, TEMPLATE)
        for layout in options.layouts:
            began_s = time.monotonic()
            counts = soak(
                *(folder, layout, range(options.first, options.first + num_each)),
                seed=options.seed,
                part=options.part,
                log=Path(temporary) / "log",
            )
            seconds = time.monotonic() - began_s
            print(f"{layout}, {seconds:.0f} s: {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()
