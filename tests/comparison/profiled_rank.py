"""Ranks of the engine under torch's profiler: their steps, stages and waits as annotations."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile, record_function

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
    """One rank's profiler, and the annotations that are open."""

    def __init__(self) -> None:
        self.profiler: profile | None = None
        self._stage, self._wait = ExitStack(), ExitStack()
        self._patches = ExitStack()

    def profile(self, context: RankContext, command: Profile) -> str | None:
        """Begin, or end and give the path of the trace."""
        if not command.folder:
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self._annotate()
            self.profiler.start()
            return None
        assert self.profiler is not None, "it has begun"
        self.profiler.stop()
        self._patches.close()
        path = Path(command.folder, f"rank{context.rank}.pt.trace.json.gz")
        self.profiler.export_chrome_trace(str(path))
        self.profiler = None
        return str(path)

    def run_step(self, context: RankContext, command: RunStep) -> RankOutcome:
        """Execute a step within an annotation of its batch."""
        if self.profiler is None:
            return run_step(context, command)
        step = command.step
        num_seqs = sum(batch.own.num_seqs for batch in step.micro_batches)
        num_tokens = sum(batch.own.num_tokens for batch in step.micro_batches)
        name = f"expertlane: {step.phase.value} {num_seqs} seqs {num_tokens} tokens"
        with record_function(name):
            return run_step(context, command)

    def _annotate(self) -> None:
        """Have the recorder of the rank annotate what it records."""
        enter, begin_wait, end_wait = Recorder.enter, Recorder.begin_wait, Recorder.end_wait

        def entered(recorder: Recorder, stage: Stage, *layer: int) -> None:
            self._stage.close()
            enter(recorder, stage, *layer)
            if stage is not Stage.IDLE:
                self._stage.enter_context(record_function(f"expertlane: {stage.label}"))

        def begun(recorder: Recorder) -> Any:
            self._wait.enter_context(record_function("expertlane: wait"))
            return begin_wait(recorder)

        def ended(recorder: Recorder, *given: Any) -> None:
            end_wait(recorder, *given)
            self._wait.close()

        for name, function in (("enter", entered), ("begin_wait", begun), ("end_wait", ended)):
            self._patches.enter_context(mock.patch.object(Recorder, name, function))


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
