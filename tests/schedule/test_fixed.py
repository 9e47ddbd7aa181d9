import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertlane.schedule.drive import drive
from expertlane.schedule.fixed import FixedScheduler
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase
from expertlane.spec.workload import Workload
from schedule.fakes import FakeRunner, next_token, seqs_of


def make_scheduler(
    layout: str,
    num_sequences: int,
    *,
    prompt_len: int = 3,
    output_len: int = 4,
    num_micro_batches: int = 1,
    rotating: bool = False,
    **kwargs,
) -> FixedScheduler:
    workload = Workload(num_sequences, prompt_len, output_len)
    options = Options(
        num_micro_batches=num_micro_batches,
        micro_batch_schedule="rotating" if rotating else "drained",
    )
    prompts = np.arange(num_sequences * prompt_len).reshape(num_sequences, prompt_len)
    return FixedScheduler(
        workload, Deployment("a", Layout.parse(layout), options), prompts, **kwargs
    )


def run_all(scheduler: FixedScheduler, runner: FakeRunner) -> FakeRunner:
    for _ in drive(scheduler, runner):
        pass
    if scheduler.start_decode():
        for _ in drive(scheduler, runner):
            pass
    return runner


def seq_ids(plan) -> list[list[list[int]]]:
    """[num_micro_batches][dp] lists of sequence ids."""
    return [[batch.seq_ids.tolist() for batch in batches] for batches in plan.micro_batches]


def continuation(seq: int, prompt: list[int], output_len: int) -> list[int]:
    tokens = list(prompt)
    for position in range(len(prompt) - 1, len(prompt) - 1 + output_len):
        tokens.append(next_token(seq, position, tokens[position]))
    return tokens[len(prompt) :]


def test_a_drained_run_by_hand():
    scheduler = make_scheduler("dp=2", 3, prompt_len=2, output_len=3, num_micro_batches=2)
    prefill = scheduler.next_plan()
    assert (prefill.step, prefill.replica, prefill.phase) == (0, 0, Phase.PREFILL)
    # Ranks get sequences 0, 1 and 2; each rank's share is cut into two micro-batches.
    assert seq_ids(prefill) == [[[0], [2]], [[1], []]]
    first = prefill.micro_batches[0][0]
    assert first.token_ids.tolist() == [0, 1]
    assert first.num_scheduled_tokens.tolist() == [2]
    assert first.num_computed_tokens.tolist() == [0]
    assert [batches[0].slots.tolist() for batches in prefill.micro_batches] == [[0], [1]]
    assert prefill.micro_batches[0][1].slots.tolist() == [0]
    assert scheduler.next_plan() is None  # one step in flight

    runner = FakeRunner()
    runner.submit(prefill)
    scheduler.finish(prefill, runner.collect(0))
    assert scheduler.next_plan() is None  # the prefill is over
    tokens = {seq: next_token(seq, 1, 2 * seq + 1) for seq in range(3)}
    assert scheduler.outputs == {seq: [token] for seq, token in tokens.items()}

    assert scheduler.start_decode() is True
    decode = scheduler.next_plan()
    assert (decode.step, decode.phase) == (1, Phase.DECODE)
    assert seq_ids(decode) == seq_ids(prefill)
    second = decode.micro_batches[1][0]
    assert second.token_ids.tolist() == [tokens[1]]
    assert second.num_scheduled_tokens.tolist() == [1]
    assert second.num_computed_tokens.tolist() == [2]


def test_a_rotating_run_by_hand():
    scheduler = make_scheduler("pp=2", 3, output_len=3, num_micro_batches=3, rotating=True)
    runner = run_all(scheduler, FakeRunner())
    # Two in flight; the one that finishes is followed by the micro-batch that waited longest.
    assert runner.events[:5] == [
        ("submit", 0),
        ("submit", 1),
        ("collect", 0),
        ("submit", 2),
        ("collect", 1),
    ]
    assert [seq_ids(plan) for plan in runner.plans] == [[[[0]]], [[[1]]], [[[2]]]] * 3
    assert [plan.phase for plan in runner.plans] == [Phase.PREFILL] * 3 + [Phase.DECODE] * 6
    assert [plan.step for plan in runner.plans] == list(range(9))


def test_replicas_share_the_sequences_and_step_by_themselves():
    runner = run_all(make_scheduler("replicas=2,dp=2", 5, output_len=2), FakeRunner())
    assert [(plan.replica, seq_ids(plan)) for plan in runner.plans] == [
        (0, [[[0, 1], [2]]]),
        (1, [[[3], [4]]]),
    ] * 2
    assert runner.events[:2] == [("submit", 0), ("submit", 1)]


def test_more_dp_ranks_than_sequences_give_empty_batches():
    runner = run_all(make_scheduler("dp=4,ep=4", 2), FakeRunner())
    assert [seq_ids(plan) for plan in runner.plans] == [[[[0], [1], [], []]]] * 4
    empty = runner.plans[0].micro_batches[0][3]
    for array in (
        empty.seq_ids,
        empty.slots,
        empty.num_scheduled_tokens,
        empty.num_computed_tokens,
        empty.token_ids,
    ):
        assert array.shape == (0,)
        assert array.dtype == np.int64


def test_empty_micro_batches_are_left_out():
    runner = run_all(make_scheduler("pp=2", 1, num_micro_batches=2), FakeRunner())
    assert [seq_ids(plan) for plan in runner.plans] == [[[[0]]]] * 4


@pytest.mark.parametrize("rotating", [False, True])
def test_no_step_is_without_a_sequence(rotating):
    scheduler = make_scheduler("replicas=3,pp=2", 2, num_micro_batches=4, rotating=rotating)
    runner = run_all(scheduler, FakeRunner())
    assert all(seqs_of(plan) for plan in runner.plans)
    assert {plan.replica for plan in runner.plans} == {0, 1}
    assert len(runner.plans) == 2 * 4


def test_one_output_token_needs_no_decoding():
    scheduler = make_scheduler("tp=1", 2, output_len=1)
    runner = run_all(scheduler, FakeRunner())
    assert [plan.phase for plan in runner.plans] == [Phase.PREFILL]
    assert {seq: len(tokens) for seq, tokens in scheduler.outputs.items()} == {0: 1, 1: 1}


@pytest.mark.parametrize("rotating", [False, True])
def test_forced_tokens_are_fed_and_sampled_ones_kept(rotating):
    forced = np.array([[100, 101, 102, 103], [200, 201, 202, 203]])
    scheduler = make_scheduler("pp=2", 2, num_micro_batches=2, rotating=rotating, forced=forced)
    runner = run_all(scheduler, FakeRunner())
    # The last token of each row is never fed.
    assert runner.fed == {0: [0, 1, 2, 100, 101, 102], 1: [3, 4, 5, 200, 201, 202]}
    assert scheduler.outputs[1] == [
        next_token(1, 2, 5),
        next_token(1, 3, 200),
        next_token(1, 4, 201),
        next_token(1, 5, 202),
    ]


def test_flags_reach_every_plan():
    for flags in ({"return_logits": True, "record": False}, {}):
        runner = run_all(make_scheduler("tp=1", 1, **flags), FakeRunner())
        assert len(runner.plans) == 4
        for plan in runner.plans:
            assert plan.return_logits is flags.get("return_logits", False)
            assert plan.record is flags.get("record", True)


@given(
    data=st.data(),
    replicas=st.integers(1, 3),
    pp=st.integers(1, 3),
    dp=st.integers(1, 4),
    num_sequences=st.integers(1, 12),
    output_len=st.integers(1, 4),
    num_micro_batches=st.integers(1, 4),
    rotating=st.booleans(),
)
def test_any_layout_in_any_order_of_finishing(
    data, replicas, pp, dp, num_sequences, output_len, num_micro_batches, rotating
):
    scheduler = make_scheduler(
        f"replicas={replicas},pp={pp},dp={dp}",
        num_sequences,
        output_len=output_len,
        num_micro_batches=num_micro_batches,
        rotating=rotating,
    )
    runner = FakeRunner(choose=lambda handles: data.draw(st.sampled_from(list(handles))))
    run_all(scheduler, runner)
    assert scheduler.outputs == {
        seq: continuation(seq, [3 * seq, 3 * seq + 1, 3 * seq + 2], output_len)
        for seq in range(num_sequences)
    }
    assert not runner.in_flight
    num_busy = min(replicas, num_sequences)
    for replica in range(num_busy):
        mine = [plan for plan in runner.plans if plan.replica == replica]
        num_groups = sum(plan.phase is Phase.PREFILL for plan in mine)
        assert runner.most_in_flight[replica] == (min(pp, num_groups) if rotating else 1)
        assert num_groups == 1 or rotating
        assert len(mine) == num_groups * output_len
        for plan in mine:
            assert 1 <= len(plan.micro_batches) <= (1 if rotating else num_micro_batches)
            assert all(any(batch.num_seqs for batch in mb) for mb in plan.micro_batches)
            assert all(len(batches) == dp for batches in plan.micro_batches)
    assert set(runner.most_in_flight) == set(range(num_busy))
    sizes = [
        sum(len(seqs_of(plan)) for plan in runner.plans if plan.replica == replica) // output_len
        for replica in range(replicas)
    ]
    assert max(sizes) - min(sizes) <= 1
