"""Our own ranks, recorded and profiled in the same steps: what either way tells of their time."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distributed.running import deployment, run_deployment
from expertlane.comparison.traces.rank_trace import RankTrace, read_rank_trace
from expertlane.comparison.traces.torch_trace import StepCauses, read_step_causes, steps_record
from expertlane.engine.ranks.commands import StartProfile, StopProfile
from expertlane.engine.ranks.pool import RankPool
from expertlane.results.metrics import CAUSE_OF_STAGE, stage_time
from expertlane.results.step_record import StepRecord
from expertlane.schedule.scheduler import step_records
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Cause, Phase, Stage
from expertlane.spec.workload import Workload

TOLD = [stage for stage in Stage if stage not in (Stage.IDLE, Stage.SETUP, Stage.GRAPH)]
MEETINGS = (Stage.DISPATCH, Stage.COMBINE, Stage.COLLECTIVES)
IDLE = "between steps"


@dataclass(frozen=True)
class Traced:
    """The same steps as records and as traces."""

    layout: Layout
    steps: Sequence[StepRecord]
    causes: StepCauses
    ranks: Sequence[RankTrace]

    def recorded(self, phase: Phase) -> list[StepRecord]:
        """The records of a phase."""
        return [step for step in self.steps if step.phase is phase]

    def stages_by_recorder(self, phase: Phase) -> dict[str, float]:
        """Seconds of a step in each stage, waits for others within, mean over ranks."""
        steps = self.recorded(phase)
        found = {}
        for stage in TOLD:
            seconds = [r.wall_s[..., stage].sum() for step in steps for r in step.records]
            found[stage.label] = float(np.mean(seconds))
        return found

    def stages_by_trace(self, phase: Phase) -> dict[str, float]:
        """The same by the traces, whatever is taken for waiting in them."""
        seconds: dict[str, float] = defaultdict(float)
        num_steps = 0
        for trace in self.ranks:
            spans = [span for span in trace.spans if span.batch.phase is phase]
            num_steps += len(spans)
            for work in trace.work:
                inside = any(s.start_ns <= work.start_ns < s.end_ns for s in spans)
                if inside and isinstance(work.cause, Stage):
                    seconds[work.cause.label] += (work.end_ns - work.start_ns) / 1e9
        return {stage.label: seconds[stage.label] / num_steps for stage in TOLD}

    def causes_by_recorder(self, phase: Phase) -> Mapping[str, float]:
        """Seconds of a step by cause."""
        steps = self.recorded(phase)
        return stage_time(self.layout, steps).breakdown_s(0.0, len(steps))

    def causes_by_trace(self, phase: Phase) -> Mapping[str, float]:
        """The same by the traces."""
        record = steps_record(self.causes, phase)
        assert record is not None
        return record.breakdown_s

    def stayed_s(self, phase: Phase) -> dict[Cause, float]:
        """Seconds of a step, mean over ranks, in which they stay in transfers that all have begun.

        By cause, beyond what the recorder takes for the transfer, since it does not know when
        others came: in PP send/recv nothing, else as long as who was blocked least.
        """
        groups: dict[tuple[str, Stage], list[list[tuple[int, int, int]]]] = defaultdict(list)
        num_steps = 0
        for trace in self.ranks:
            spans = [span for span in trace.spans if span.batch.phase is phase]
            num_steps += len(spans)
            own: dict[tuple[str, Stage], list[tuple[int, int, int]]] = defaultdict(list)
            for work in trace.work:
                inside = any(s.start_ns <= work.start_ns < s.end_ns for s in spans)
                if inside and work.transfer and isinstance(work.cause, Stage):
                    times = work.entered_ns, work.start_ns, work.end_ns
                    own[work.group, work.cause].append(times)
            for key, found in own.items():
                groups[key].append(found)
        stayed_ns: dict[Cause, float] = defaultdict(float)
        for (_, stage), of_ranks in groups.items():
            entered, start, end = np.moveaxis(np.array(of_ranks), -1, 0)  # [num_ranks, num_waits]
            blocked = end - start
            transfer = np.clip(end - entered.max(axis=0), 0, blocked)
            least = blocked.min(axis=0)
            if stage is Stage.HAND_OVER:
                transfer, least = transfer[-1], 0  # only who receives waits
            stayed_ns[CAUSE_OF_STAGE[stage]] += float((transfer - least).sum())
        return {cause: ns / 1e9 / num_steps for cause, ns in stayed_ns.items()}


def traced(
    pool: RankPool, model: ModelConfig, layout: str, workload: Workload, folder: Path
) -> Traced:
    """Run a workload on ranks that record it and are profiled."""
    of = deployment(layout)
    run_deployment(pool, model, of, workload)  # once to warm up
    numbers = range(of.layout.world_size)
    assert not any(pool.call(StartProfile(), ranks=numbers))
    steps = run_deployment(pool, model, of, workload).steps
    written = pool.call(StopProfile(str(folder)), ranks=numbers)
    assert not any(each.why_not for each in written)
    paths = [folder / each.name for each in written]
    ranks = [read_rank_trace(path, place) for place, path in enumerate(paths)]
    return Traced(of.layout, list(step_records(steps)), read_step_causes(paths), ranks)
