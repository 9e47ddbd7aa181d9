"""Our own ranks, recorded and profiled in the same steps: both ways tell the same time."""

import pytest

from comparison.profiled import Traced, traced
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.pool import RankPool
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Cause, Phase
from expertlane.spec.workload import Workload

MODEL = PRESETS["paper-tiny"].with_overrides(
    hidden_size=512, head_dim=32, moe_intermediate_size=512, max_position_embeddings=256
)
WORKLOAD = Workload(num_sequences=8, prompt_len=64, output_len=8, seed=1)
TIMEOUT_S = 60.0
CLOSE = 0.1  # of a stage or cause
LEAST = 0.01  # of a step: smaller ones are not compared
# A core that is lost just between the marks of both ways, some 0.3 µs apart, costs a few ms.
TRIES = 3


@pytest.fixture(scope="module")
def pool():
    with RankPool(LocalRanks(2, TIMEOUT_S, "float32"), TIMEOUT_S) as pool:
        yield pool


def differences(found: Traced, phase: Phase) -> list[str]:
    """What the two ways tell differently, of stages and of causes."""
    stages = found.stages_by_recorder(phase), found.stages_by_trace(phase)
    by_recorder, by_trace = dict(found.causes_by_recorder(phase)), found.causes_by_trace(phase)
    least_s = LEAST * sum(by_recorder.values())
    for cause, seconds in found.stayed_s(phase).items():
        waited = Cause.PIPELINE_BUBBLE if cause is Cause.HAND_OVER else Cause.WAITING
        by_recorder[cause] += seconds
        by_recorder[waited] -= seconds
    return [
        f"{name}: {1e3 * expected:.3f} ms by the recorder, {1e3 * told[name]:.3f} by the trace"
        for known, told in (stages, (by_recorder, by_trace))
        for name, expected in known.items()
        if max(expected, told[name]) >= least_s and name != Cause.ENGINE
        if abs(told[name] - expected) > CLOSE * expected
    ]


@pytest.mark.full
@pytest.mark.parametrize("layout", ["tp=2", "dp=2,ep=2", "pp=2"])
def test_the_recorder_and_the_profiler_agree(pool, layout, tmp_path):
    """By stage, and by cause once the one difference of definition is taken in.

    That is how long ranks stay in transfers that all have begun; see `Traced.stayed_s`.
    """
    for attempt in range(TRIES):
        found = traced(pool, MODEL, layout, WORKLOAD, tmp_path / str(attempt))
        assert found.causes.ranks == (0, 1)
        assert not found.causes.unaligned
        problems = []
        for phase in Phase:
            assert len(found.causes.of(phase)) == len(found.recorded(phase))
            num_tokens = sum(step.num_tokens for step in found.recorded(phase))
            assert sum(step.num_tokens or 0 for step in found.causes.of(phase)) == num_tokens
            by_trace = found.causes_by_trace(phase)
            assert by_trace[Cause.UNKNOWN] == 0
            assert all(len(step.ranks) == 2 for step in found.causes.of(phase))
            problems += differences(found, phase)
        if not problems:
            return
    assert not problems
