"""Profile a rank with torch's profiler: its trace, with steps, stages and waits as annotations."""

import gzip
import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
from torch.profiler import ProfilerActivity, profile

from expertlane.schedule.plan import RankStep
from expertlane.spec.names import Stage

MOST_STEPS = 500  # in a trace, since the profiler keeps it in memory
_NS_PER_US = 1000
_GZIP_LEVEL = 1

ResultT = TypeVar("ResultT")


class Profiles(Protocol):
    """A recorder that reports to a `RankProfile` while it runs a step."""

    profile: "RankProfile | None"


class CommOp(NamedTuple):
    """A transfer in which ranks wait for each other.

    Attributes:
        ranks: the ranks of the transfer.
        begun_ns: when this rank began it: from then on no other rank waits for it.
    """

    ranks: Sequence[int]
    begun_ns: int


class RankProfile:
    """torch's profiler in the thread of a rank's steps; it runs until `write`.

    A recorder calls these methods at its own marks. Annotations are added when the trace is
    written: a `record_function` for each would take microseconds that belong to no stage.

    Args:
        on_gpu: True to trace kernels too.
        now_ns: the profiler's clock, in nanoseconds since 1970.

    Attributes:
        num_steps: steps traced so far, at most `MOST_STEPS`.

    Raises:
        RuntimeError: another profiler runs in this thread.
    """

    def __init__(self, *, on_gpu: bool, now_ns: Callable[[], int] = time.time_ns) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profiler: Any = profile(activities=activities)
        self._now_ns = now_ns
        # Name, begin and end in nanoseconds.
        self._found: list[tuple[str, int, int, CommOp | None]] = []
        self._marks: list[tuple[Stage, int]] = []  # where each stage of the step begins
        self._wait_ns = self._begun_ns = 0
        self._is_on = True
        self.num_steps = 0
        self._profiler.start()

    def run_step(self, recorder: Profiles, step: RankStep, run: Callable[[], ResultT]) -> ResultT:
        """Run a step, with an annotation of its batch; after `MOST_STEPS`, without."""
        if self.num_steps == MOST_STEPS:
            self._end()
        if not self._is_on:
            return run()
        num_before = len(self._found)
        begin_ns = self._now_ns()
        recorder.profile = self
        try:
            result = run()
        except BaseException:
            del self._found[num_before:]  # the step failed
            raise
        finally:
            recorder.profile = None
            marks, self._marks = self._marks, []
        for (stage, start_ns), (_, end_ns) in pairwise(marks):
            if stage is not Stage.IDLE:
                self._found.append((f"expertlane: {stage.label}", start_ns, end_ns, None))
        num_seqs = sum(batch.own.num_seqs for batch in step.micro_batches)
        num_tokens = sum(batch.own.num_tokens for batch in step.micro_batches)
        name = f"expertlane: {step.phase.value} {num_seqs} seqs {num_tokens} tokens"
        self._found.append((name, begin_ns, self._now_ns(), None))
        self.num_steps += 1
        return result

    def enter(self, stage: Stage) -> None:
        """End the current stage and begin another; `IDLE` stands for no stage."""
        # Nothing else is done here: if the thread loses its core between this mark and the
        # recorder's, they differ by milliseconds.
        self._marks.append((stage, self._now_ns()))

    def begin_wait(self) -> None:
        """Begin a wait for other ranks, or a send, in the current stage."""
        self._wait_ns = self._now_ns()

    def end_wait(self, comm_op: CommOp | None) -> None:
        """End the wait; one without a transfer between ranks counts to its stage only."""
        if comm_op is not None:
            self._found.append(("expertlane: wait", self._wait_ns, self._now_ns(), comm_op))

    def begin_transfer(self) -> None:
        """Note the begin of the transfer that the next call of `comm_op` returns."""
        self._begun_ns = self._now_ns()

    def send(self, ranks: Sequence[int]) -> None:
        """Annotate the begin of a send, which its receiver may wait for.

        Args:
            ranks: sender and receiver.
        """
        now_ns = self._now_ns()
        self._found.append(("expertlane: send", now_ns, now_ns + 1, CommOp(ranks, now_ns)))

    def comm_op(self, ranks: Sequence[int]) -> CommOp | None:
        """The transfer that was begun last, or a receive; None without other ranks."""
        begun_ns, self._begun_ns = self._begun_ns or self._now_ns(), 0
        return CommOp(ranks, begun_ns) if ranks else None

    def _end(self) -> None:
        if self._is_on:
            self._is_on = False
            self._profiler.stop()

    def write(self, path: Path) -> None:
        """Stop the profiler, and write the trace, gzipped and atomically.

        Raises:
            OSError: the file cannot be written.
        """
        self._end()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".rank-{os.getpid()}.part")
        try:
            self._profiler.export_chrome_trace(str(part))
            data = self._with_annotations(part.read_bytes())
            part.write_bytes(gzip.compress(data, _GZIP_LEVEL))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _with_annotations(self, data: bytes) -> bytes:
        """The profiler's trace with the annotations added, on the thread of the operators."""
        trace = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        base_ns = msgspec.json.decode(trace.get("baseTimeNanoseconds", b"0"), type=int)
        place = {"ph": "X", "cat": "user_annotation", "pid": os.getpid()}
        place["tid"] = threading.get_native_id()
        events: list[Any] = msgspec.json.decode(trace["traceEvents"], type=list[msgspec.Raw])
        for name, begin_ns, end_ns, comm_op in self._found:
            event = {"name": name, **place}
            event["ts"] = (begin_ns - base_ns) / _NS_PER_US
            event["dur"] = (end_ns - begin_ns) / _NS_PER_US
            if comm_op is not None:
                begun_us = (comm_op.begun_ns - base_ns) / _NS_PER_US
                event["args"] = {
                    "Process Group Ranks": str([*comm_op.ranks]),
                    "expertlane begun": begun_us,
                }
            events.append(event)
        return msgspec.json.encode({**trace, "traceEvents": events})
