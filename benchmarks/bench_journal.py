"""What a journal costs the server: its processor time for a token, with one and without, in turns.

Two servers with the real front (HTTP, scheduler, detokenizer) and no model, in processes of their
own: steps choose tokens at random, and sleep for a while, so that each token is an event. A round
sends each of them the same streams; the order changes from round to round. Clients name their
requests in both.

    python benchmarks/bench_journal.py [--streams 8 64] [--rounds 9] [--journal DIR]
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from bench_engine_overhead import VOCAB_SIZE, StubRunner, byte_level_tokenizer

from expertlane import __version__
from expertlane.engine.engine import Engine
from expertlane.engine.ops.host import num_cores
from expertlane.schedule.plan import StepOutcome, StepPlan
from expertlane.schedule.request import Limits
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout

NUM_TOKENS = 400
STEP_S = 0.004
PROMPT = list(range(64))


class SlowRunner(StubRunner):
    """Sleeps in every step."""

    def collect(self, handle: StepPlan) -> StepOutcome:
        """As its base, later."""
        time.sleep(STEP_S)
        return super().collect(handle)


def run_server(journal: Path | None) -> None:
    """Serve until told to end; prints the port."""
    from expertlane.server.journal.file import JournalFile
    from expertlane.server.run import Running, bind, serve
    from expertlane.server.setup import ServedModel, ServerOptions

    limits = Limits(VOCAB_SIZE, 4096, 4096, max_num_seqs=256)
    scheduler = ContinuousScheduler(Layout(), Options(), limits, lookahead=True, record=False)
    tokenizer = byte_level_tokenizer()
    engine = Engine(scheduler, SlowRunner(logprobs=False), tokenizer=tokenizer)
    file = None if journal is None else JournalFile(journal)
    bound = bind("127.0.0.1", 0)

    def on_start(running: Running) -> None:
        print(bound.getsockname()[1], flush=True)

    options = ServerOptions(journal=file, reconnect_s=1.0)
    serve(ServedModel("stub", engine, limits, tokenizer), options, bound, on_start=on_start)


class Server:
    """One of the two, in a process of its own."""

    def __init__(self, journal: Path | None) -> None:
        command = [sys.executable, __file__, "--serve", "" if journal is None else str(journal)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{self.process.stdout.readline().strip()}"
        self.num_sent = 0

    def cpu_s(self) -> float:
        """Of all its threads, since its start."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(each.read_text().split()[0]) for each in threads) / 1e9

    def token_s(self, num_streams: int) -> float:
        """Processor seconds a token, of a round of streams."""
        before = self.cpu_s()
        asyncio.run(self._round(num_streams))
        return (self.cpu_s() - before) / (num_streams * NUM_TOKENS)

    async def _round(self, num_streams: int) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as client:
            await asyncio.gather(*(self._stream(client) for _ in range(num_streams)))

    async def _stream(self, client: httpx.AsyncClient) -> None:
        self.num_sent += 1
        body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
        body |= {"temperature": 0}
        headers = {"X-Request-Id": str(self.num_sent)}
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for _ in answer.aiter_bytes():
                pass

    def metric(self, name: str) -> float:
        """One of `/metrics`."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name)).rpartition(" ")[2])

    def end(self) -> None:
        """Let it end."""
        self.process.terminate()
        self.process.wait(60)


def measure(num_streams: int, num_rounds: int, journal: Path) -> dict[str, Any]:
    """Rounds in turns; microseconds of processor time a token."""
    servers = {"without": Server(None), "with": Server(journal / str(num_streams))}
    found: dict[str, list[float]] = {name: [] for name in servers}
    try:
        for number in range(num_rounds + 1):
            for name in list(servers)[:: 1 if number % 2 else -1]:
                token_s = servers[name].token_s(num_streams)
                if number:  # the first one warms up
                    found[name].append(1e6 * token_s)
        num_tokens = (num_rounds + 1) * num_streams * NUM_TOKENS
        written = servers["with"].metric("expertlane:journal_bytes_total")
        write_s = servers["with"].metric("expertlane:journal_write_seconds_total")
    finally:
        for server in servers.values():
            server.end()
    more = [one - other for one, other in zip(found["with"], found["without"], strict=True)]
    return {
        "streams": num_streams,
        "rounds": num_rounds,
        **{f"{name}_us": statistics.median(each) for name, each in found.items()},
        "more_us": statistics.median(more),
        "more_us_of_rounds": [round(each, 2) for each in more],
        "write_us": 1e6 * write_s / num_tokens,
        "bytes_a_token": written / num_tokens,
    }


def main() -> None:
    """Measure; a table, then one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--journal", type=Path, help="folder on the disk to be measured")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        run_server(Path(options.serve) if options.serve else None)
        return
    with tempfile.TemporaryDirectory(dir=options.journal) as folder:
        rows = [measure(each, options.rounds, Path(folder)) for each in options.streams]
    print("streams  without     with     more  writes  (µs of processor a token)  bytes a token")
    for row in rows:
        print(
            f"{row['streams']:7} {row['without_us']:8.1f} {row['with_us']:8.1f} "
            f"{row['more_us']:8.1f} {row['write_us']:7.1f} {row['bytes_a_token']:42.1f}"
        )
    result = {"benchmark": "journal", "version": __version__, "num_cores": num_cores()}
    print(json.dumps(result | {"rows": rows}))


if __name__ == "__main__":
    main()
