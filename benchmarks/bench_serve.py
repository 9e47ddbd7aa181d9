"""`expertlane serve` and `vllm serve` on one checkpoint: throughput, latency, what the front costs.

The checkpoint is that of bench_engine.py (a Mixtral of 235 million parameters, random weights,
bfloat16), with a byte-level tokenizer of as many tokens, trained on this repository. Each server is
started once, alone, which gives its time to a first token; then they take turns at every number of
streams, the order rotating from round to round, all with the same prompts of random ids, new in
each round. One client process sends streaming completions, greedy and past any end token, and only
counts bytes (engine_peers/http_load.py). It shares the cores, as do the servers' fronts.

The front is the process that speaks HTTP; for expertlane it schedules too. Its processor time, and
that of all its descendants, is read from /proc/PID/task/TID/schedstat. vLLM runs with its own
defaults but for the lengths; `vllm:auto` lets it choose its cores (one is left to its front),
`vllm:0,1` names them. How to install it: see bench_engine.py.

Prints a table for each number of streams, an answer, then one JSON line. Ratios of a round hold on
a busy machine too; for other numbers run it with nothing else on the machine:

    python benchmarks/bench_serve.py --vllm-python ENV/bin/python
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from bench_engine import add_machine_arguments, make_checkpoint, wait_until_idle
from engine_peers.contender import ContenderError
from engine_peers.http_load import Load, Taken, run_load
from engine_peers.servers import NAME, CpuSeconds, Server, serving
from rich.console import Console
from rich.table import Table
from tokenizers import decoders, models, pre_tokenizers, trainers

from expertlane import __version__
from expertlane.engine.ops.host import num_cores

SERVERS = ("ours:tp=1", "vllm:auto", "vllm:0,1")
STREAMS = (8, 32, 128)
WARM_UP_TOKENS = 8
VOCAB_SIZE = 8192
SPECIAL = ["<unk>", "<s>", "</s>"]  # as Mixtral numbers them
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Sample:
    """What a server did with a load."""

    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    main_us: float
    others_us: float
    ranks_us: float

    @classmethod
    def of(cls, taken: Taken, cpu: CpuSeconds) -> "Sample":
        """Times on a processor are given by output token."""
        return cls(
            taken.num_tokens / taken.seconds,
            *np.quantile(taken.ttft_s, (0.5, 0.99)).tolist(),
            statistics.median(taken.tpot_s) if taken.tpot_s else 0.0,
            *(1e6 * seconds / taken.num_tokens for seconds in cpu),
        )

    @property
    def front_share(self) -> float:
        """Of the front in the engine's time on processors."""
        return (self.main_us + self.others_us) / self.ranks_us


Samples = dict[str, list[Sample]]  # by server, in order of rounds


def add_tokenizer(checkpoint: Path) -> None:
    """A byte-level BPE of `VOCAB_SIZE` tokens, where there is none."""
    if (checkpoint / "tokenizer.json").exists():
        return
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    files = sorted(ROOT.glob("src/**/*.py")) + sorted(ROOT.glob("docs/**/*.md"))
    core.train_from_iterator((file.read_text() for file in files), trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    core.save(str(checkpoint / "tokenizer.json"))


def take_sample(server: Server, load: Load, seed: str) -> Sample:
    before = server.cpu_seconds()
    taken = run_load(server.url, NAME, load, seed)
    return Sample.of(taken, server.cpu_seconds().since(before))


def run_rounds(
    servers: Sequence[Server], loads: Sequence[Load], options: argparse.Namespace
) -> list[Samples]:
    """Of each load."""
    found: list[Samples] = [{server.name: [] for server in servers} for _ in loads]
    for load in loads:
        few = replace(load, num_requests=load.num_streams, output_len=WARM_UP_TOKENS)
        for server in servers:
            take_sample(server, few, "warm-up")
    for number in range(options.rounds):
        shift = number % len(servers)
        for load, samples in zip(loads, found, strict=True):
            for server in [*servers[shift:], *servers[:shift]]:
                wait_until_idle(options.max_wait)
                sample = take_sample(server, load, f"{load.num_streams} {number}")
                samples[server.name].append(sample)
                print(
                    f"round {number + 1}: {load.num_streams} streams, {server.name}: "
                    f"{sample.tokens_per_s:.0f} tokens/s, TTFT {1e3 * sample.ttft_p50_s:.0f} and "
                    f"{1e3 * sample.ttft_p99_s:.0f} ms, front {sample.front_share:.1%}",
                    file=sys.stderr,
                )
    return found


def median(samples: Sequence[Sample], name: str) -> float:
    return statistics.median(getattr(sample, name) for sample in samples)


def print_table(load: Load, samples: Samples) -> None:
    table = Table(
        title=f"{load.num_streams} streams, {load.prompt_len} + {load.output_len} tokens: medians"
    )
    for heading in ("", "tokens/s", "TTFT p50, p99 ms", "TPOT ms", "front + ranks µs", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, of_server in samples.items():
        rates = [sample.tokens_per_s for sample in of_server]
        ms = {
            each: 1e3 * median(of_server, each)
            for each in ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s")
        }
        table.add_row(
            name,
            f"{median(of_server, 'tokens_per_s'):.0f} ({min(rates):.0f}–{max(rates):.0f})",
            f"{ms['ttft_p50_s']:.0f}, {ms['ttft_p99_s']:.0f}",
            f"{ms['tpot_p50_s']:.1f}",
            f"{median(of_server, 'main_us'):.0f} + {median(of_server, 'others_us'):.0f} + "
            f"{median(of_server, 'ranks_us'):.0f}",
            f"{median(of_server, 'front_share'):.1%}",
        )
    Console(width=110).print(table)


def ratio(samples: Samples, ours: str, peer: str, name: str) -> float:
    """Ours over the peer's, the median over rounds: each round's two are near in time."""
    pairs = zip(samples[ours], samples[peer], strict=True)
    return statistics.median(getattr(own, name) / getattr(other, name) for own, other in pairs)


def answer(load: Load, samples: Samples) -> dict[str, Any]:
    """Ratios of our first server and the peer with most tokens a second."""
    ours = next(name for name in samples if name.startswith("ours"))
    peers = [name for name in samples if not name.startswith("ours")]
    found: dict[str, Any] = {"num_streams": load.num_streams, "ours": ours}
    found["front_share"] = median(samples[ours], "front_share")
    if peers:
        peer = max(peers, key=lambda name: median(samples[name], "tokens_per_s"))
        found["peer"] = peer
        for name in ("tokens_per_s", "ttft_p50_s", "ttft_p99_s"):
            found[f"ratio_{name}"] = ratio(samples, ours, peer, name)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), help="%(default)s")
    parser.add_argument("--streams", nargs="+", type=int, default=list(STREAMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--requests-per-stream", type=int, default=3)
    add_machine_arguments(parser, "expertlane-bench-serve")
    options = parser.parse_args()
    if options.vllm_python is None:
        options.servers = [name for name in options.servers if not name.startswith("vllm")]
    for name in options.servers:
        if name.partition(":")[0] not in ("ours", "vllm"):
            parser.error(f"no server {name!r}; ours:LAYOUT or vllm:CORES")
    return options


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that children end too
    options = parse_arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = make_checkpoint("mixtral", options.folder)
    add_tokenizer(checkpoint)
    loads = [
        Load(
            num_streams,
            num_streams * options.requests_per_stream,
            *(options.prompt_len, options.output_len, VOCAB_SIZE),
        )
        for num_streams in options.streams
    ]
    given = checkpoint, num_cores(), options.vllm_python, options.cpu_isa
    try:
        with ExitStack() as stack:
            servers = []
            for name in options.servers:
                wait_until_idle(options.max_wait)
                servers.append(stack.enter_context(serving(name, *given)))
                print(f"{name}: first token after {servers[-1].first_token_s:.1f} s", flush=True)
            found = run_rounds(servers, loads, options)
    except (ContenderError, ConnectionError, TimeoutError, subprocess.CalledProcessError) as error:
        sys.exit(f"the run cannot go on: {error}")
    for load, samples in zip(loads, found, strict=True):
        print_table(load, samples)
    answers = [answer(load, samples) for load, samples in zip(loads, found, strict=True)]
    for each in answers:
        print(each)
    result = {
        "benchmark": "serve",
        "version": __version__,
        "num_cores": num_cores(),
        "cpu_isa": options.cpu_isa,
        "first_token_s": {server.name: server.first_token_s for server in servers},
        "answers": answers,
        "loads": [
            asdict(load)
            | {"samples": {name: [asdict(s) for s in each] for name, each in of.items()}}
            for load, of in zip(loads, found, strict=True)
        ],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
