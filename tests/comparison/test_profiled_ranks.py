"""Our own ranks, recorded and profiled in the same steps: both tell the same time by stage."""

from pathlib import Path

import pytest

from comparison.profiled_rank import Profile, profiled_ranks
from distributed.running import deployment, run_deployment
from expertlane.comparison.traces.torch_trace import read_step_causes, steps_record
from expertlane.engine.ranks.pool import RankPool
from expertlane.results.metrics import stage_time
from expertlane.schedule.scheduler import step_records
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Cause, Phase
from expertlane.spec.workload import Workload

# Large enough that the marks of either way take little of a stage.
MODEL = PRESETS["paper-tiny"].with_overrides(
    hidden_size=512, head_dim=32, moe_intermediate_size=512, max_position_embeddings=256
)
WORKLOAD = Workload(num_sequences=8, prompt_len=64, output_len=8, seed=1)
TIMEOUT_S = 60.0
# Of a cause, or of the step: a core that is lost between the marks of both ways is a few ms.
CLOSE, LEAST = 0.1, 0.02


@pytest.fixture(scope="module")
def pool():
    with RankPool(profiled_ranks(2), TIMEOUT_S) as pool:
        yield pool


def traced(pool, layout, folder):
    """Records of steps, and the traces of the ranks that ran them."""
    of = deployment(layout)
    run_deployment(pool, MODEL, of, WORKLOAD)  # once to warm up
    pool.call(Profile())
    steps = run_deployment(pool, MODEL, of, WORKLOAD).steps
    paths = []
    for rank, path in enumerate(pool.call(Profile(str(folder)))):
        at = of.layout.coordinates(rank)
        name = f"dp{at.dp_rank}_pp{at.pp_rank}_tp{at.tp_rank}_rank{rank}.json"
        paths.append(Path(path).rename(folder / name))
    return of.layout, list(step_records(steps)), read_step_causes(paths)


COMPUTING = (Cause.ATTENTION, Cause.ROUTER, Cause.EXPERTS, Cause.HEAD)
MEETING = (Cause.DISPATCH_COMBINE, Cause.TP_COLLECTIVES, Cause.WAITING)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["tp=2", "dp=2,ep=2"])
def test_the_recorder_and_the_profiler_agree(pool, layout, tmp_path):
    """By stage, waits for others taken together with the transfers that they are waits in.

    Of those the recorder calls waiting what a rank is blocked longer than the other, the trace what
    passes until the other enters; on a busy machine, where a rank may lose its core inside a
    transfer, these are not the same.
    """
    layout, steps, causes = traced(pool, layout, tmp_path)
    assert causes.ranks == (0, 1)
    assert not causes.unaligned
    for phase in Phase:
        recorded = [step for step in steps if step.phase is phase]
        record = steps_record(causes, phase)
        assert record.num_steps == len(recorded)
        assert record.num_tokens == sum(step.num_tokens for step in recorded)
        by_recorder = stage_time(layout, recorded).breakdown_s(0.0, len(recorded))
        of_trace = record.breakdown_s
        whole_s = sum(by_recorder.values())
        least_s = LEAST * whole_s
        groups = [*((cause,) for cause in COMPUTING), MEETING]
        for group in groups:
            seconds = sum(of_trace[cause] for cause in group)
            expected = sum(by_recorder[cause] for cause in group)
            assert abs(seconds - expected) <= max(CLOSE * expected, least_s), (phase, group)
        assert of_trace[Cause.HOST_GAPS] < least_s
        assert of_trace[Cause.UNKNOWN] == 0
