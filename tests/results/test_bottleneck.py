from cli.screen import in_order
from expertlane.results.estimate import Estimate
from expertlane.results.metrics import find_bottleneck
from expertlane.results.record import StepsRecord
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Phase

BREAKDOWN = {Cause.EXPERTS.value: 0.5, Cause.WAITING.value: 0.25, Cause.ENGINE.value: 0.25}


def find(layout: Layout, waiting_s: list[float]):
    steps = StepsRecord(
        phase=Phase.DECODE,
        num_steps=10,
        num_tokens=10,
        num_seqs=10,
        wall_s=Estimate(10.0),
        tps=Estimate(1.0),
        breakdown_s=BREAKDOWN,
        waiting_s=tuple(waiting_s),
    )
    return find_bottleneck(layout, steps)


def test_largest_cause_and_no_straggler() -> None:
    found = find(Layout(dp=4), [3.0, 3.0, 3.0, 3.0])
    assert (found.phase, found.cause, found.straggler) == (Phase.DECODE, Cause.EXPERTS, None)
    assert found.share == 0.5
    assert found.sentence == "experts, 50% of decode"


def test_the_rank_that_waits_least_is_the_straggler() -> None:
    found = find(Layout(dp=4), [3.0, 3.0, 0.0, 3.0])
    assert found.straggler == 2
    assert in_order(found.sentence, "experts 50% decode rank 2 30%")


def test_a_wait_of_5_percent_is_no_straggler() -> None:
    assert find(Layout(dp=2), [1.0, 1.5]).straggler is None
    assert find(Layout(dp=2), [1.0, 1.51]).straggler == 0


def test_the_straggler_is_sought_inside_each_pipeline_stage() -> None:
    assert find(Layout(pp=2, dp=2), [0.0, 0.1, 9.0, 4.0]).straggler == 3
    assert find(Layout(pp=2), [0.0, 9.0]).straggler is None


def test_one_rank() -> None:
    assert find(Layout(), [0.0]).straggler is None
