"""Ranks of the engine under torch's profiler: their steps, stages and waits as annotations."""

import json
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile

from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.ranks import fork_server
from expertlane.engine.ranks.commands import Command, RankOutcome, RunStep
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.stage.context import RankContext
from expertlane.engine.stage.worker import HANDLERS, Handlers, run_step
from expertlane.spec.names import Stage


class Profile(Command[str | None]):
    """Begin to profile a rank's steps; with a folder, end it and write the trace there."""

    folder: str = ""


class _Profiled:
    """One rank's profiler, with annotations of its own.

    Not by `record_function`: on a busy machine a rank loses its core at system calls, so that marks
    which differ by one lie milliseconds apart.
    """

    def __init__(self) -> None:
        self.profiler: profile | None = None
        self._annotations: list[tuple[str, int, int]] = []  # begin and end in nanoseconds
        self._stage: tuple[str, int] | None = None
        self._wait_ns = 0
        self._patches = ExitStack()

    def profile(self, context: RankContext, command: Profile) -> str | None:
        """Begin, or end and give the path of the trace."""
        if not command.folder:
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self._annotations.clear()
            self._annotate()
            self.profiler.start()
            return None
        assert self.profiler is not None, "it has begun"
        self.profiler.stop()
        self._patches.close()
        path = Path(command.folder, f"rank{context.rank}.pt.trace.json")
        self.profiler.export_chrome_trace(str(path))
        self.profiler = None
        self._add_annotations(path)
        return str(path)

    def run_step(self, context: RankContext, command: RunStep) -> RankOutcome:
        """Execute a step within an annotation of its batch."""
        if self.profiler is None:
            return run_step(context, command)
        step, begin_ns = command.step, time.time_ns()
        num_seqs = sum(batch.own.num_seqs for batch in step.micro_batches)
        num_tokens = sum(batch.own.num_tokens for batch in step.micro_batches)
        outcome = run_step(context, command)
        name = f"expertlane: {step.phase.value} {num_seqs} seqs {num_tokens} tokens"
        self._annotations.append((name, begin_ns, time.time_ns()))
        return outcome

    def _annotate(self) -> None:
        """Have the recorder of the rank annotate what it records."""
        enter, make_record = Recorder.enter, Recorder._record
        begin_wait, end_wait = Recorder.begin_wait, Recorder.end_wait

        def entered(recorder: Recorder, stage: Stage, *layer: int) -> None:
            now_ns = time.time_ns()  # before the recorder's system call, at which a rank may yield
            enter(recorder, stage, *layer)
            if self._stage is not None:
                self._annotations.append((*self._stage, now_ns))
            self._stage = None
            if stage is not Stage.IDLE:
                self._stage = f"expertlane: {stage.label}", now_ns

        def begun(recorder: Recorder) -> Any:
            begin = begin_wait(recorder)
            self._wait_ns = time.time_ns()
            return begin

        def ended(recorder: Recorder, *given: Any) -> None:
            end_wait(recorder, *given)
            self._annotations.append(("expertlane: wait", self._wait_ns, time.time_ns()))

        def recorded(recorder: Recorder) -> Any:
            if self._stage is not None:  # making the record is no part of it
                self._annotations.append((*self._stage, time.time_ns()))
            self._stage = None
            return make_record(recorder)

        patches = {
            "enter": entered,
            "begin_wait": begun,
            "end_wait": ended,
            "_record": recorded,
        }
        for name, function in patches.items():
            self._patches.enter_context(mock.patch.object(Recorder, name, function))

    def _add_annotations(self, path: Path) -> None:
        """Write them into the trace, on the thread whose operators it has."""
        trace = json.loads(path.read_text())
        thread = {"pid": os.getpid(), "tid": threading.get_native_id()}
        for name, begin_ns, end_ns in self._annotations:
            event = {"ph": "X", "cat": "user_annotation", "name": name, **thread}
            event["ts"] = (begin_ns - trace["baseTimeNanoseconds"]) / 1000
            event["dur"] = (end_ns - begin_ns) / 1000
            trace["traceEvents"].append(event)
        path.write_text(json.dumps(trace))


def profiled_ranks(num_ranks: int) -> LocalRanks:
    """Ranks that know `Profile`."""
    return LocalRanks(num_ranks, 60.0, "float32", "comparison.profiled_rank")


def handlers() -> Handlers:
    """The handlers of ranks, with steps that may be profiled."""
    profiled = _Profiled()
    return {**HANDLERS, RunStep: profiled.run_step, Profile: profiled.profile}


def main() -> None:
    """Be the fork server of such ranks."""
    fork_server.main(handlers())
