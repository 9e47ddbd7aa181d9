"""The program that torchrun starts in every node: ping-pong, or decode steps of some cases.

Only the launcher measures; the other processes start ranks. Its one argument is a file of
`Session`; it adds a row for each thing that it has measured.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cases import CASES, LINKS, NUM_SKIPPED, Case
from dilation import Dilation
from network import set_links
from rows import add

from expertlane.cost.memory import workload_limits
from expertlane.cost.step.operation import TransferKind
from expertlane.engine.launch import start_pool
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ranks.commands import MeasureRates, MeasureTransfers, TransferPoint
from expertlane.engine.ranks.pool import RankPool
from expertlane.schedule.drive import FinishedStep, drive
from expertlane.schedule.request import Request
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.names import Phase, Stage

TIMEOUT_S = 120.0  # without progress; dilated steps are long
PING_PONG_S = (0.05, 0.2)  # how long the two messages that give the bandwidth take on the link
SMALL_BYTES = 64
INSIDE_BYTES_PER_S = 200e6  # about, of gloo over loopback
POINT_S = 1.0


@dataclass(frozen=True)
class Session:
    """One start of torchrun.

    Attributes:
        cases: names; only the links of them are measured if `ping_pong`.
        out: the file of `Rows`.
    """

    num_nodes: int
    num_ranks: int
    cases: list[str]
    ping_pong: bool
    latency_file: str
    out: str


def use_link(session: Session, link: str, share: float) -> None:
    speed = LINKS[link].slowed(share)
    set_links(session.num_nodes, speed.bytes_per_s, speed.latency_s, Path(session.latency_file))


def transfers(pool: RankPool, kind: TransferKind, num_ranks: int, sizes: list[int]) -> list[float]:
    """Seconds of each size: of a send one way, of an all-to-all the slowest rank's."""
    points = tuple(TransferPoint(kind, num_ranks, size) for size in sizes)
    return np.max(pool.call(MeasureTransfers(points, POINT_S)), axis=0).tolist()


def ping_pong(pool: RankPool, bytes_per_s: float) -> dict[str, Any]:
    """Between ranks 0 and 1: the time of a small message, and what more bytes add to it."""
    sizes = [SMALL_BYTES, *(round(bytes_per_s * seconds) // 64 * 64 for seconds in PING_PONG_S)]
    seconds = transfers(pool, TransferKind.SEND, 2, sizes)
    rate = (sizes[2] - sizes[1]) / (seconds[2] - seconds[1])
    return {
        "latency_s": seconds[0],
        "bytes_per_s": rate,
        "points": [*zip(sizes, seconds, strict=True)],
    }


def decode(pool: RankPool, case: Case, dilation: Dilation) -> list[FinishedStep]:
    """Prefill at full speed, then decode dilated; the decode steps."""
    experiment = case.experiment
    (deployment,), model, workload = experiment.deployments, experiment.model, experiment.workload
    limits = workload_limits(workload, model, deployment.layout)
    per_node = case.ranks_per_node
    runner = ModelRunner(pool, model, deployment, limits, seed=0, ranks_per_node=per_node)
    scheduler = ContinuousScheduler(deployment.layout, deployment.options, limits)
    for number, prompt in enumerate(workload.prompt_token_ids(model.vocab_size)):
        scheduler.add(Request(str(number), prompt, max_tokens=workload.output_len))
    steps, num_waiting = [], workload.num_sequences
    for step in drive(scheduler, runner):
        if step.plan.phase is Phase.DECODE:
            steps.append(step)
            continue
        num_waiting -= len(step.outcome.token_ids)
        if num_waiting == 0:
            dilation.begin(case.share)
    dilation.end()
    return steps


def measured(case: Case, steps: list[FinishedStep]) -> dict[str, Any]:
    """The times of steps, and what ranks computed in them."""
    of_group: dict[int, list[FinishedStep]] = defaultdict(list)
    for step in steps:
        of_group[min(step.outcome.token_ids)].append(step)
    token_s, step_s, kept = [], [], []
    for group in of_group.values():
        for before, step in zip(group[NUM_SKIPPED - 1 :], group[NUM_SKIPPED:], strict=False):
            token_s.append(step.outcome.finished_s - before.outcome.finished_s)
            step_s.append(step.outcome.finished_s - step.outcome.submitted_s)
            kept.append(step)
    cpu_s: dict[str, list[list[float]]] = defaultdict(list)
    for step in kept:
        for number, stage in enumerate(Stage):
            of_ranks = [float(r.cpu_s[:, :, number].sum()) for r in step.outcome.records]
            cpu_s[stage.name.lower()].append(of_ranks)
    num_groups = len(of_group)
    return {
        "token_s": token_s,
        "step_s": step_s,
        "token_median_s": statistics.median(token_s),
        "token_spread_s": statistics.stdev(token_s),
        "num_groups": num_groups,
        # [num_ranks] of one step of each group
        "cpu_s": {
            name: (np.mean(of_steps, axis=0) * num_groups).round(6).tolist()
            for name, of_steps in cpu_s.items()
            if np.any(of_steps)
        },
        "process_cpu_s": (
            np.mean([[r.process_cpu_s for r in step.outcome.records] for step in kept], axis=0)
            * num_groups
        ).tolist(),
    }


def measure_case(
    pool: RankPool, session: Session, case: Case, dilation: Dilation
) -> dict[str, Any]:
    use_link(session, case.link, case.share)
    began = time.perf_counter()
    steps = decode(pool, case, dilation)
    took_s = time.perf_counter() - began
    model = case.experiment.model
    tokens_a_peer = case.batch * model.num_experts_per_tok / case.num_ranks**2
    sizes = [SMALL_BYTES, round(tokens_a_peer * model.hidden_size * 4) // 64 * 64]
    dilation.begin(case.share)
    seconds = transfers(pool, TransferKind.ALL_TO_ALL, case.num_ranks, sizes)
    inside = ping_pong(pool, INSIDE_BYTES_PER_S) if case.ranks_per_node > 1 else None
    dilation.end()
    return {
        "case": case.described,
        **measured(case, steps),
        "all_to_all": [*zip(sizes, seconds, strict=True)],
        "ping_pong_inside": inside,
        "took_s": took_s,
    }


def main() -> None:
    session = Session(**json.loads(Path(sys.argv[1]).read_text()))
    pool = start_pool(session.num_ranks, timeout_s=TIMEOUT_S, dtype="float32", oversubscribe=True)
    if pool is None:
        return
    cases = [case for case in CASES if case.name in session.cases]
    dilation, out = Dilation(session.num_ranks), Path(session.out)
    with pool:
        dilation.place_ranks()
        if not session.ping_pong:
            for case in cases:
                row = measure_case(pool, session, case, dilation)
                dilation.check_links(case.num_ranks)
                add(out, "case", row)
            return
        dilation.begin(1)
        (rates,) = pool.call(MeasureRates(), ranks=[0])
        dilation.end()
        add(out, "rates", asdict(rates))
        for link, share in dict.fromkeys((case.link, case.share) for case in cases):
            use_link(session, link, share)
            dilation.begin(share)
            found = ping_pong(pool, LINKS[link].slowed(share).bytes_per_s)
            dilation.end()
            dilation.check_links(session.num_ranks)
            add(out, "link", {"link": link, "share": share, "ping_pong": found})


if __name__ == "__main__":
    main()
