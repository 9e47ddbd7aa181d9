"""Requests served while ranks die, stop, fail or dawdle: none is lost, no token changes.

As a command, `python -m faults.runs FILE --to 300`: adds a line to FILE for each case, goes on
where FILE ends, then prints a table.
"""

import contextlib
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from distributed.running import Inline
from engine.elastic.shadow import found as shadow_lines
from engine.ranks.processes import session_is_gone, wait_until
from expertlane.engine import model_runner
from expertlane.engine.elastic.rebalancing import Rebalancer
from expertlane.engine.llm import LLM
from expertlane.engine.ranks import local_ranks
from expertlane.errors import ExpertlaneError, UserError
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from faults.drained import serve_and_end
from faults.draws import NUM_CASES, Draw, draw
from faults.numbered import (
    ForkedServer,
    arguments_of,
    files_and_names,
    in_workers,
    read,
    remaining,
)
from faults.planted import Happened, install
from faults.served import Served, requests

MODEL = "paper-tiny"
BOUND_S = 2.0  # without progress; a hang
NUM_AT_FIRST, STEPS_APART = 5, 4
IDLE_S = 0.05
NUM_AT_LAST = 4  # requests that wait for a change of the layout, so that steps follow it
NUM_STEPS = 1000  # more than any run has
CHANGE_STEP, STEPS_CHANGED = 6, 8  # when the layout changes, and for how long at least
NEAR = 1e-4  # of two likeliest log-probabilities: a tie


class _Changes:
    """Another layout in the midst of a run, and the first one again once all faults happened.

    Attributes:
        is_ready: whether it changes within a few steps.
    """

    def __init__(self, llm: LLM, case: Draw, happened: Happened) -> None:
        self._llm, self._happened = llm, happened
        self._target, self._prepares = case.target, case.prepares
        self._next_step = CHANGE_STEP
        self._is_preparing = self._has_changed = False
        self.is_ready = case.target is None

    def before(self, step: int) -> None:
        """Change the layout if it is time, and all ranks are there."""
        if self._target is None or step < self._next_step or not _is_whole(self._llm):
            return
        if not self.is_ready:
            self.is_ready = self._is_prepared(self._target)
            self._next_step = step + self.is_ready * STEPS_APART
        elif not self._has_changed:
            first = self._llm.layout
            if self._has_scaled(self._target):
                self._has_changed = True
                self._happened.begin()
                self._target, self._next_step = first, step + STEPS_CHANGED
        elif self._happened.all() and self._has_scaled(self._target):
            self._target = None

    def _has_scaled(self, target: Layout) -> bool:
        """Change the layout, unless ranks are lost at that time and fewer serve."""
        try:
            self._llm.scale(target)
        except UserError as error:
            if "try again later" not in str(error):
                raise
            return False
        return True

    def _is_prepared(self, target: Layout) -> bool:
        if self._prepares and not self._is_preparing:
            self._is_preparing = True
            self._llm.scaling.prepare(target)
        return not self._prepares or self._llm.scaling.advance()


def _is_whole(llm: LLM) -> bool:
    """Whether no rank is missing; those that are may come back now."""
    llm.check_ranks()
    recovery = llm.engine.recovery
    return recovery is not None and recovery.members == recovery.whole


def serve(llm: LLM, case: Draw, happened: Happened) -> Served:
    """Serve the requests, some of which come later, to their ends."""
    engine, changes = llm.engine, _Changes(llm, case, happened)
    served, outputs, num_steps = Served(), [], 0
    to_come = requests(llm.model.vocab_size)
    while len(outputs) < len(to_come) or engine.has_unfinished:
        changes.before(num_steps)
        most = len(to_come) - NUM_AT_LAST * (not changes.is_ready)
        while len(outputs) < min(most, NUM_AT_FIRST + num_steps // STEPS_APART):
            number = len(outputs)
            outputs.append(engine.add(str(number), *to_come[number]))
            served.arrivals_s.append([])
            served.places.append([])
        tables = engine.scheduler.tables
        where = {
            request.request_id: (replica, dp_rank)
            for replica, of_replica in enumerate(tables)
            for dp_rank, table in enumerate(of_replica)
            for request in table.requests
            if request is not None
        }
        for chunk in engine.step():
            number = int(chunk.request_id)
            served.arrivals_s[number].append(time.monotonic())
            served.places[number].append(where.get(chunk.request_id, (-1, -1)))
        if not engine.has_unfinished:  # ranks make weights of another layout
            time.sleep(IDLE_S)
        num_steps += 1
        if num_steps > NUM_STEPS:
            raise RuntimeError("it does not end")
    for output in outputs:
        served.tokens.append(list(output.token_ids))
        served.reasons.append(str(output.finish_reason))
        served.gaps.append([_gap(each) for each in output.logprobs])
    return served


def _gap(logprobs: Any) -> float:
    """Between the chosen token and the likeliest other one."""
    others = [v for token, v in logprobs.top if token != logprobs.token_id]
    return abs(logprobs.logprob - max(others)) if others else np.inf


@contextlib.contextmanager
def started(case: Draw, prepare: Any) -> Iterator[tuple[LLM, Any]]:
    """An engine on ranks that `prepare` has changed, and the process that forked them."""
    servers: list[ForkedServer] = []

    def popen(command: Sequence[str], **settings: Any) -> ForkedServer:
        servers.append(ForkedServer(prepare, command, **settings))
        return servers[-1]

    process = SimpleNamespace(
        Popen=popen, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )
    moving = partial(Rebalancer, worth=lambda decision: decision.num_bytes, executor=Inline())
    with (
        mock.patch.object(local_ranks, "subprocess", process),
        mock.patch.object(model_runner, "Rebalancer", moving),
    ):
        llm = LLM(
            MODEL,
            layout=case.layout,
            options=case.options,
            dtype=case.dtype,  # type: ignore[arg-type]
            max_model_len=64,
            num_blocks=64,
            block_size=8,
            max_num_batched_tokens=32,
            timeout_s=BOUND_S,
            oversubscribe=True,
            on_failure=case.on_failure,
        )
    with llm:
        yield llm, servers[0]


@cache
def undisturbed(layout: Layout, options: Options, dtype: str) -> Served:
    """What the requests bring when nothing happens."""
    case, nothing = Draw(0, "", layout, options, "shared_memory", (), dtype), Happened(0)
    with started(case, partial(install, (), nothing, case.transport, Path(os.devnull))) as (llm, _):
        return serve(llm, case, nothing)


def compare(case: Draw, served: Served, wanted: Served) -> tuple[list[str], int]:
    """What is wrong, and how many tokens are left out since they follow a near tie."""
    wrong, num_left_out = [], 0
    for number, (tokens, expected) in enumerate(zip(served.tokens, wanted.tokens, strict=True)):
        if len(tokens) != len(expected):
            wrong.append(f"request {number} has {len(tokens)} tokens, not {len(expected)}")
        if served.reasons[number] != wanted.reasons[number]:
            wrong.append(f"request {number} ended by {served.reasons[number]}")
        if len(served.arrivals_s[number]) != len(tokens):
            wrong.append(f"request {number} was told {len(served.arrivals_s[number])} tokens")
        pairs = enumerate(zip(tokens, expected, strict=False))
        differs = next((i for i, (a, b) in pairs if a != b), None)
        if differs is None or case.dtype != "float32":
            continue
        gaps = wanted.gaps[number]
        if gaps and gaps[differs] < NEAR:
            num_left_out += len(tokens) - differs
        else:
            wrong.append(f"request {number} differs at token {differs}")
    return wrong, num_left_out


def pauses(case: Draw, served: Served, happened: Happened) -> dict[str, float | None]:
    """The longest gap between tokens from the first fault on, of requests with and without caches.

    A request that was on the rank at the fault has lost its keys and values.
    """
    at_s = happened[0] / 1e9
    replica, rank = divmod(case.faults[0].rank, case.layout.world_size // case.layout.replicas)
    place = replica, case.layout.coordinates(rank).dp_rank
    found: dict[str, list[float]] = {"lost": [], "unaffected": []}
    for arrivals, places in zip(served.arrivals_s, served.places, strict=True):
        if not arrivals or arrivals[0] > at_s or arrivals[-1] < at_s:
            continue  # it was not under way
        then = next(i for i, arrival in enumerate(arrivals) if arrival > at_s)
        gaps = [b - a for a, b in itertools.pairwise(arrivals[max(0, then - 1) :])]
        if gaps:
            found["lost" if places[then - 1] == place else "unaffected"].append(max(gaps))
    return {name: round(max(each), 3) if each else None for name, each in found.items()}


def _serve_case(case: Draw, happened: Happened, shadow: Path) -> tuple[Served, dict[str, Any], int]:
    """What the requests of a case bring, how it recovered, and the process that forked ranks."""
    prepare = partial(install, case.faults, happened, case.transport, shadow)
    with started(case, prepare) as (llm, server):
        wrong: list[str] = []
        if case.moment == "drain":
            served, wrong = serve_and_end(llm, requests(llm.model.vocab_size), happened)
        else:
            served = serve(llm, case, happened)
            if not wait_until(lambda: _is_whole(llm)):
                wrong.append("it stays smaller")
        recovery = llm.engine.recovery
        assert recovery is not None, "it was asked for"
        seconds = [
            {state: round(seconds, 3) for state, seconds in record.seconds().items()}
            for record in recovery.records
        ]
        facts = {"num_recoveries": recovery.num_recoveries, "seconds": seconds, "wrong": wrong}
        if case.target is not None:
            facts["num_changes"] = recovery.num_scalings
            if not recovery.num_scalings:
                wrong.append("its layout has not changed")
    return served, facts, server.pid


def run(case: Draw) -> dict[str, Any]:
    """Run a case; what was wrong, and what it took."""
    wanted = undisturbed(case.layout, case.options, case.dtype)
    before, happened = files_and_names(), Happened(len(case.faults))
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        shadow = Path(folder) / "shadow.jsonl"
        try:
            served, found, server_pid = _serve_case(case, happened, shadow)
        except ExpertlaneError as error:
            return {"wrong": [f"{type(error).__name__}: {error}"]}
        differences, found["parts"] = shadow_lines(shadow)
    wrong, found["left_out"] = compare(case, served, wanted)
    wrong += found.pop("wrong") + differences
    found["num_tokens"] = sum(map(len, served.tokens))
    if case.target is None and case.moment != "drain":
        found["pauses"] = pauses(case, served, happened)
    found["took_s"] = round(time.monotonic() - began_s, 2)
    found["happened"] = [bool(happened[number]) for number in range(len(case.faults))]
    if not happened.all():
        wrong.append("a fault did not happen")
    if not session_is_gone(server_pid, seconds=2):
        wrong.append("a process is left")
    gc.collect()

    def left() -> set[str]:
        more = files_and_names() - before
        # FastAPI's caches keep a server, and so its files, as long as the process.
        return {each for each in more if case.moment != "drain" or not each.startswith("fd ")}

    if not wait_until(lambda: not left(), seconds=1):
        wrong.append(f"left: {sorted(left())}")
    return {"wrong": wrong, **found}


def run_each(numbers: Sequence[int], file: Path) -> None:
    """Run cases, and add a line to the file after each."""
    for number in numbers:
        case = draw(number)
        line = {"number": number, "what": str(case), "kind": case.faults[-1].kind}
        line["moment"] = case.moment
        try:
            line |= run(case)
        except Exception:
            line["wrong"] = [traceback.format_exc()]
        with file.open("a") as lines:
            lines.write(json.dumps(line, default=str) + "\n")


def table(lines: Sequence[dict[str, Any]], by: str) -> str:
    """Counts by kind of fault, or by moment, as Markdown."""
    rows = [f"| {by} | cases | wrong | recoveries | tokens | left out |", "|" + " --- |" * 6]
    for value, num_cases in Counter(line[by] for line in lines).items():
        own = [line for line in lines if line[by] == value]
        sums = [
            sum(line.get(n, 0) for line in own)
            for n in ("num_recoveries", "num_tokens", "left_out")
        ]
        num_wrong = sum(bool(line["wrong"]) for line in own)
        rows.append("| " + " | ".join(map(str, (value, num_cases, num_wrong, *sums))) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = arguments_of(__doc__, NUM_CASES)
    parser.add_argument("--moment", help="only cases whose moment begins so")
    arguments = parser.parse_args()
    numbers = remaining(arguments.file, arguments.first, arguments.end)
    if arguments.moment is not None:
        numbers = [each for each in numbers if draw(each).moment.startswith(arguments.moment)]
    has_run = in_workers(numbers, arguments.at_once, partial(run_each, file=arguments.file))
    lines = read(arguments.file)
    failed = [line for line in lines if line["wrong"]]
    print(table(lines, "kind"), table(lines, "moment"), sep="\n\n")
    for line in failed:
        print(f"{line['number']}: {line['what']}: {'; '.join(line['wrong'])}")
    sys.exit(1 if failed or not has_run else 0)


if __name__ == "__main__":
    main()
