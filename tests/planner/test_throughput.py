"""A workload by hand: 2 data-parallel ranks, prompts of 100 tokens, 10 output tokens."""

from math import exp, factorial

import numpy as np
import pytest

from expertlane.cost.throughput import Goals, PromptArrivals, Prompts, Steps, one_pool, two_pools
from expertlane.spec.layout import Layout
from expertlane.spec.workload import Workload

WORKLOAD = Workload(num_sequences=8, prompt_len=100, output_len=10)
BOUNDS = np.array([0.5, 1.0, 2.0])


def steps(
    decode_ms=(10.0, 20.0), num_seqs=(4, 8), prefill_ms=10.0, most_seqs=8, alone_ms=6.0
) -> Steps:
    return Steps(
        Layout(dp=2, ep=2),
        np.array(num_seqs),
        BOUNDS[:, None] * np.array(decode_ms) / 1e3,
        BOUNDS * prefill_ms / 1e3,
        Prompts(num_seqs=1, num_new=100, num_cached=0, num_steps=1, length=100),
        most_seqs,
        BOUNDS * alone_ms / 1e3,
    )


def most_of_two(mean):
    """The mean of the larger of two independent Poisson variables, term by term."""
    chance = [exp(-mean) * mean**k / factorial(k) for k in range(40)]
    return sum(max(i, j) * a * b for i, a in enumerate(chance) for j, b in enumerate(chance))


def test_a_step_waits_for_the_rank_with_most_prompts():
    served = one_pool(steps(), WORKLOAD)
    # 4 sequences of 10 tokens on 2 ranks: a fifth of a prompt for each rank and step. One in five
    # shares its step with one of the other rank (10 ms), the others do not (6 ms).
    waits = [most_of_two(each) * (each * 10 + (1 - each) * 6) for each in (0.2, 0.4)]
    assert served.tpot_s[1] == pytest.approx([(10 + waits[0]) / 1e3, (20 + waits[1]) / 1e3])
    assert served.tps[1] == pytest.approx([4e3 / (10 + waits[0]), 8e3 / (20 + waits[1])])
    np.testing.assert_allclose(served.tps[0], served.tps[1] / 2)
    np.testing.assert_allclose(served.tps[2], served.tps[1] * 2)


def test_a_prompt_waits_in_a_queue():
    served = one_pool(steps(), WORKLOAD)
    step_s, prompt_s = served.tpot_s[1, 0], 0.0068
    busy = 0.2 * prompt_s / step_s
    wait = prompt_s * busy / (2 * (1 - busy))
    assert served.ttft_s[1, 0] == pytest.approx(step_s + prompt_s + wait)


@pytest.mark.parametrize(
    ("num_ranks", "mean"), [(1, 0.3), (2, 11.9), (2, 12.1), (8, 40.0), (64, 3)]
)
def test_the_most_prompts_of_many_ranks(num_ranks, mean):
    rng = np.random.default_rng(0)
    drawn = rng.poisson(mean, size=(20_000, num_ranks)).max(axis=1).mean()
    workload = Workload(num_sequences=2**20, prompt_len=100, output_len=10)
    num_seqs = np.array([round(mean * num_ranks * 10)])
    found = PromptArrivals.of(num_seqs, 1, num_ranks, np.ones(3), workload)
    assert found.of_rank == pytest.approx(np.array([[mean]]))
    assert found.most == pytest.approx(np.array([[drawn]]), rel=0.03)


def test_limits_choose_the_number_of_sequences():
    served = one_pool(steps(decode_ms=(10.0, 12.0)), WORKLOAD)
    assert served.best(Goals()) == 1
    assert served.best(Goals(max_tpot_s=0.013)) == 0
    assert served.best(Goals(max_tpot_s=0.001)) is None
    assert served.breach(Goals(max_tpot_s=0.001))[0] == pytest.approx(1e3 * served.tpot_s[1, 0])
    assert served.best(Goals(max_ttft_s=1e-4)) is None


def test_in_two_pools_the_slower_sets_the_pace():
    slow, fast = steps(prefill_ms=1000.0), steps(prefill_ms=1.0)
    fed = two_pools(fast, steps(), np.full(3, 0.001), WORKLOAD)
    # 4 in 10 ms; 8 in 20 ms and a tenth of the 2 ms before a sequence's first decode step
    assert fed.tps[1] == pytest.approx([400, 8 / 0.0202])
    assert fed.tpot_s[1] == pytest.approx([0.010, 0.020])
    starved = two_pools(slow, steps(), np.zeros(3), WORKLOAD)
    assert starved.tps[1] == pytest.approx([20, 20])  # 200 prompt tokens a second
    assert starved.ttft_s[1, 0] > 10 * fed.ttft_s[1, 0]


def test_the_first_token_of_two_pools_comes_with_a_decode_step():
    """After prompt and transfer, and half a step until one begins; others wait for a place."""
    near, far = (two_pools(steps(), steps(), np.full(3, s), WORKLOAD) for s in (0.0, 0.001))
    np.testing.assert_array_equal(far.tpot_s, near.tpot_s)
    assert far.tpot_s[1] == pytest.approx([0.010, 0.020])
    for found, transfer_s in ((near, 0.0), (far, 0.001)):
        busy = found.tps[1] / 2000  # tokens a second, of those that prefill could feed
        own_s = 0.010 + 0.010 * busy / (2 * (1 - busy))
        expected = own_s + transfer_s + np.array([0.010, 0.020]) / 2
        assert found.ttft_s[1] == pytest.approx(expected)


def test_fewer_sequences_than_ranks_leave_some_idle():
    alone = steps(decode_ms=(10.0,), num_seqs=(1,), most_seqs=1)
    served = one_pool(alone, Workload(num_sequences=1, prompt_len=100, output_len=10))
    assert alone.num_prompts == 1
    assert alone.prefill_tps[1] == pytest.approx(10_000)  # one rank's
    # its own prompt, a tenth of it for each token, nearly always in a step of its own
    assert served.tps[1] == pytest.approx([1 / (0.010 + 0.1 * (0.1 * 0.010 + 0.9 * 0.006))])


def test_a_sequence_alone_is_in_one_pool_at_a_time():
    workload = Workload(num_sequences=1, prompt_len=100, output_len=10)
    alone = steps(decode_ms=(10.0,), num_seqs=(1,), most_seqs=1)
    served = two_pools(alone, alone, np.full(3, 0.002), workload)
    assert served.tps[1] == pytest.approx([1 / (0.010 + 0.0012)])


def test_prompts_that_are_held_back_come_one_to_a_rank():
    workload = Workload(num_sequences=2**20, prompt_len=100, output_len=10)
    num_seqs = np.array([8, 40, 800])  # 0.1, 0.5 and 10 prompts of a rank in a step
    at_once = PromptArrivals.of(num_seqs, 1, 8, np.ones(3), workload)
    held = PromptArrivals.of(num_seqs, 1, 8, np.ones(3), workload, prompt_wait_steps=5)
    # In 5 steps 0.5 prompts come to a rank, so every fifth step has prompts on half of the ranks.
    assert held.share.tolist() == [[0.5, 1.0, 1.0]]
    assert held.most.tolist() == [[0.2, 0.5, at_once.most[0, 2]]]
    assert held.held_steps.tolist() == [[2.5, 1.0, 0.0]]
    assert at_once.held_steps.tolist() == [[0.0, 0.0, 0.0]]
    assert (held.most <= at_once.most).all()
    alone = PromptArrivals.of(num_seqs, 8, 1, np.ones(3), workload, prompt_wait_steps=5)
    assert alone.held_steps.tolist() == [[0.0, 0.0, 0.0]]  # no other rank to wait for
