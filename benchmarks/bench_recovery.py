"""What clients see when a rank dies or hangs: the longest gap between two tokens of a request.

    python benchmarks/bench_recovery.py [LAYOUT ...] [--runs 100] [--harm kill|stop] [--bound-s 2]
        [--on-failure replace|shrink] [--redundant N]

For each layout one engine (`paper-small`, random weights, N redundant experts) decodes 16
requests all the time; ended ones are followed by others. Again and again a rank, drawn at random,
is killed (SIGKILL) or stopped (SIGSTOP); the engine recovers while the same process counts tokens.
A request is *lost* if its keys and values were on that rank, else *unaffected*. With `stop`, ranks
count as hung after `--bound-s` without progress, so that much of a gap is the bound itself. With
`shrink` the next harm waits until all ranks serve again; the gap when they do is counted apart.

Prints the median and the greatest gap over the runs, what the time went into, whether memory and
processes stayed as they were, and one JSON line. Ranks share the cores of this machine, so gaps are
those of a machine with a core for several ranks.
"""

import argparse
import json
import os
import signal
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from expertlane import __version__
from expertlane.engine.elastic.recovery_record import RecoveryKind, State
from expertlane.engine.llm import LLM
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import OnFailure
from expertlane.spec.sampling import SamplingParams

MODEL = "paper-small"
NUM_REQUESTS, PROMPT_LEN, OUTPUT_LEN = 16, 16, 100
STEPS_BETWEEN = 20  # of serving, before the next harm
# As their authors report them, for other engines, models and clusters.
REPORTED = (
    ("SGLang with Mooncake: continues, loses what the dead rank held", "6 to 7 s"),
    ("a paper's prototype: pause; until the rank is back", "11 s; 8 s"),
    ("vLLM's design: aborts requests in flight", "about 25 s"),
)


class Clients:
    """Keep requests running, and note when their tokens come."""

    def __init__(self, llm: LLM) -> None:
        self._llm, self._random = llm, np.random.default_rng(0)
        self.arrivals_s: dict[str, list[float]] = {}
        self._num_added = 0

    def step(self) -> None:
        """One step of the engine, after which as many requests run as before."""
        while len(self.arrivals_s) < NUM_REQUESTS:
            prompt = self._random.integers(self._llm.model.vocab_size, size=PROMPT_LEN).tolist()
            params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
            self._llm.engine.add(str(self._num_added), prompt, params)
            self.arrivals_s[str(self._num_added)] = []
            self._num_added += 1
        for chunk in self._llm.engine.step():
            self.arrivals_s[chunk.request_id].append(time.perf_counter())
            if chunk.finish_reason is not None:
                del self.arrivals_s[chunk.request_id]

    def places(self) -> dict[str, tuple[int, int]]:
        """(replica, data-parallel rank) of each running request."""
        tables = self._llm.engine.scheduler.tables
        return {
            request.request_id: (replica, dp_rank)
            for replica, of_replica in enumerate(tables)
            for dp_rank, table in enumerate(of_replica)
            for request in table.requests
            if request is not None
        }


def one_run(llm: LLM, clients: Clients, layout: Layout, rank: int, number: int) -> dict[str, float]:
    """Do harm to a rank; the longest gaps of lost and of unaffected requests."""
    recovery = llm.engine.recovery
    assert recovery is not None, "it was asked for"
    at = layout.coordinates(rank)
    places = clients.places()
    num_before = recovery.num_recoveries
    pid = llm._pool.pid(rank)
    assert pid is not None, "a rank of this machine"
    os.kill(pid, number)
    harmed_s = time.perf_counter()
    before = {key: list(arrivals[-1:]) for key, arrivals in clients.arrivals_s.items()}
    seen: dict[str, list[float]] = defaultdict(list)
    num_after = 0
    while num_after < STEPS_BETWEEN or recovery.state is not State.SERVING:
        clients.step()
        for key, arrivals in clients.arrivals_s.items():
            seen[key] = before.get(key, []) + [t for t in arrivals if t > harmed_s]
        num_after += recovery.num_recoveries > num_before
    gaps: dict[str, list[float]] = {"lost": [], "unaffected": [], "growing": []}
    grew_s = [r.moments[0].time_s for r in recovery.records if r.kind is RecoveryKind.GROWTH][-1:]
    for key, arrivals in seen.items():
        place = places.get(key)
        whose = "lost" if place == (at.replica, at.dp_rank) else "unaffected"
        for begin, end in pairwise(arrivals):
            if any(begin <= moment <= end for moment in grew_s):
                gaps["growing"].append(end - begin)
            elif place is not None:
                gaps[whose].append(end - begin)
    return {name: max(each) for name, each in gaps.items() if each}


def measure(
    layout: str, harm: str, runs: int, bound_s: float, on_failure: OnFailure, redundant: int
) -> dict[str, Any]:
    """All runs of a layout."""
    random, chosen = np.random.default_rng(1), Layout.parse(layout)
    number = signal.SIGKILL if harm == "kill" else signal.SIGSTOP
    with LLM(
        MODEL,
        layout=layout,
        timeout_s=bound_s,
        oversubscribe=True,
        on_failure=on_failure,
        options=Options(num_redundant_experts=redundant),
        num_blocks=1024,
    ) as llm:
        clients, found = Clients(llm), []
        for _ in range(STEPS_BETWEEN):
            clients.step()
        own = psutil.Process()
        num_fds, num_processes = own.num_fds(), len(own.children(recursive=True))
        began_bytes = own.memory_info().rss
        for _ in range(runs):
            rank = int(random.integers(chosen.world_size))
            found.append(one_run(llm, clients, chosen, rank, number))
        left = {
            "descriptors": own.num_fds() - num_fds,
            "processes": len(own.children(recursive=True)) - num_processes,
            "rss_bytes": own.memory_info().rss - began_bytes,
        }
        assert llm.engine.recovery is not None, "it was asked for"
        records = list(llm.engine.recovery.records)
    seconds: dict[str, list[float]] = {state.value: [] for state in State}
    for record in records:
        for state, each in record.seconds().items():
            seconds[state.value].append(each)
    return {
        "layout": layout,
        "harm": harm,
        "bound_s": bound_s,
        "on_failure": on_failure,
        "redundant": redundant,
        "gaps_s": {
            name: [run[name] for run in found if name in run]
            for name in ("lost", "unaffected", "growing")
        },
        "state_s": {state: statistics.median(each) for state, each in seconds.items() if each},
        "left": left,
        "timeline": [
            (m.state.value, m.time_s - records[0].moments[0].time_s) for m in records[0].moments
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("layouts", nargs="*", default=["dp=2,ep=2", "dp=4,ep=4", "tp=4"])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--harm", choices=["kill", "stop"], default="kill")
    parser.add_argument("--bound-s", type=float, default=2.0, help="of a hang")
    parser.add_argument("--on-failure", choices=["replace", "shrink"], default="replace")
    parser.add_argument("--redundant", type=int, default=0, help="experts in each MoE layer")
    given = parser.parse_args()
    how = given.harm, given.runs, given.bound_s, given.on_failure, given.redundant
    results = [measure(layout, *how) for layout in given.layouts]
    shown = Table("layout", "runs", "unaffected", "lost", "growing", "median s by state")
    for each in results:
        gaps = [
            f"{statistics.median(g):.2f}, {max(g):.2f}" if g else "–"
            for g in (each["gaps_s"][name] for name in ("unaffected", "lost", "growing"))
        ]
        states = ", ".join(f"{state} {seconds:.2f}" for state, seconds in each["state_s"].items())
        shown.add_row(each["layout"], str(given.runs), *gaps, states)
    console = Console()
    console.print(shown)
    console.print("Others, as reported: " + "; ".join(f"{who}: {what}" for who, what in REPORTED))
    print(json.dumps({"benchmark": "recovery", "version": __version__, "results": results}))


if __name__ == "__main__":
    main()
