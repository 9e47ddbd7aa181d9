"""Our own ranks, recorded and profiled in the same steps: both tell the same time by stage."""

import pytest

from comparison.profiled_rank import Profile, profiled_ranks
from distributed.running import deployment, run_deployment
from expertlane.comparison.torch_trace import read_step_causes, steps_record
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
CLOSE = 0.1  # of a cause, or of 2 % of the step where it takes less than that


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
    paths = pool.call(Profile(str(folder)))
    return of.layout, list(step_records(steps)), read_step_causes(map(type(folder), paths))


@pytest.mark.full
@pytest.mark.parametrize("layout", ["tp=2", "dp=2,ep=2", "pp=2"])
def test_the_recorder_and_the_profiler_agree(pool, layout, tmp_path):
    layout, steps, causes = traced(pool, layout, tmp_path)
    assert causes.ranks == (0, 1)
    assert not causes.unaligned
    for phase in Phase:
        recorded = [step for step in steps if step.phase is phase]
        record = steps_record(causes, phase)
        assert record.num_steps == len(recorded)
        assert record.num_tokens == sum(step.num_tokens for step in recorded)
        time = stage_time(layout, recorded)
        by_recorder = time.breakdown_s(wall_s=0.0, num_rounds=len(recorded))
        whole_s = sum(by_recorder.values())
        of_trace = dict(record.breakdown_s)
        print(
            phase,
            {
                c: (round(1e3 * by_recorder.get(c, 0), 3), round(1e3 * s, 3))
                for c, s in of_trace.items()
            },
        )
        assert of_trace.pop(Cause.HOST_GAPS) < 0.02 * whole_s
        del of_trace[Cause.ENGINE]
        for cause, seconds in of_trace.items():
            expected = by_recorder.get(cause, 0.0)
            least = 0.02 * whole_s
            assert abs(seconds - expected) <= CLOSE * max(expected, least), (
                cause,
                seconds,
                expected,
            )
