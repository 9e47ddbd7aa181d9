"""A workload by hand: 2 data-parallel ranks, prompts of 100 tokens, 10 output tokens."""

import numpy as np
import pytest

from expertlane.plan.candidates import Goals
from expertlane.plan.throughput import Prompts, Steps, one_pool, two_pools
from expertlane.spec.layout import Layout
from expertlane.spec.workload import Workload

WORKLOAD = Workload(num_sequences=8, prompt_len=100, output_len=10)
BOUNDS = np.array([0.5, 1.0, 2.0])


def steps(decode_ms=(10.0, 20.0), num_seqs=(4, 8), prefill_ms=10.0, most_seqs=8) -> Steps:
    return Steps(
        Layout(dp=2, ep=2),
        np.array(num_seqs),
        BOUNDS[:, None] * np.array(decode_ms) / 1e3,
        BOUNDS * prefill_ms / 1e3,
        Prompts(num_seqs=1, num_new=100, num_cached=0, num_steps=1),
        most_seqs,
    )


def test_a_token_costs_its_step_and_the_prefills_of_others():
    served = one_pool(steps(), WORKLOAD)
    # 2 ranks × 100 tokens in 10 ms: 20,000 tokens/s; 10 prompt tokens for each output token.
    assert served.tpot_s[1] == pytest.approx([0.010 + 4 * 10 / 20_000, 0.020 + 8 * 10 / 20_000])
    assert served.tps[1] == pytest.approx([4 / 0.012, 8 / 0.024])
    np.testing.assert_allclose(served.tps[0], served.tps[1] / 2)
    np.testing.assert_allclose(served.tps[2], served.tps[1] * 2)


def test_a_prompt_waits_in_a_queue():
    served = one_pool(steps(), WORKLOAD)
    busy = (4 * 10 / 20_000) / 0.012
    wait = 0.010 * busy / (2 * (1 - busy))  # a prompt takes its rank 10 ms
    assert served.ttft_s[1, 0] == pytest.approx(0.010 + wait + 0.010)


def test_limits_choose_the_number_of_sequences():
    served = one_pool(steps(decode_ms=(10.0, 12.0)), WORKLOAD)
    assert served.best(Goals()) == 1
    assert served.best(Goals(max_tpot_s=0.013)) == 0
    assert served.best(Goals(max_tpot_s=0.001)) is None
    assert served.breach(Goals(max_tpot_s=0.001))[0] == pytest.approx(12)
    assert served.best(Goals(max_ttft_s=1e-4)) is None


def test_in_two_pools_the_slower_sets_the_pace():
    slow, fast = steps(prefill_ms=1000.0), steps(prefill_ms=1.0)
    fed = two_pools(fast, steps(), np.full(3, 0.001), WORKLOAD)
    # 4 in 10 ms; 8 in 20 ms and a tenth of the 2 ms before a sequence's first decode step
    assert fed.tps[1] == pytest.approx([400, 8 / 0.0202])
    assert fed.tpot_s[1] == pytest.approx([0.010 + 0.001 / 9, 0.020 + 0.001 / 9])
    starved = two_pools(slow, steps(), np.zeros(3), WORKLOAD)
    assert starved.tps[1] == pytest.approx([20, 20])  # 200 prompt tokens a second
    assert starved.ttft_s[1, 0] > 10 * fed.ttft_s[1, 0]


def test_the_transfer_between_two_pools_delays_the_second_token():
    """The first is there when the prompt is: 9 of 10 tokens share the transfer's millisecond."""
    near, far = (two_pools(steps(), steps(), np.full(3, s), WORKLOAD) for s in (0.0, 0.001))
    np.testing.assert_array_equal(far.ttft_s[:, 0], near.ttft_s[:, 0])
    assert near.tpot_s[1] == pytest.approx([0.010, 0.020])
    assert far.tpot_s[1] == pytest.approx([0.010 + 0.001 / 9, 0.020 + 0.001 / 9])
    busy = 400 / 2000  # tokens a second, of those that prefill could feed
    own = 0.010 + 0.010 * busy / (2 * (1 - busy))
    assert far.ttft_s[1, 0] == pytest.approx(own)


def test_fewer_sequences_than_ranks_leave_some_idle():
    alone = steps(decode_ms=(10.0,), num_seqs=(1,), most_seqs=1)
    served = one_pool(alone, Workload(num_sequences=1, prompt_len=100, output_len=10))
    assert alone.num_prompts == 1
    assert alone.prefill_tps[1] == pytest.approx(10_000)  # one rank's
    assert served.tps[1] == pytest.approx([1 / (0.010 + 0.001)])


def test_a_sequence_alone_is_in_one_pool_at_a_time():
    workload = Workload(num_sequences=1, prompt_len=100, output_len=10)
    alone = steps(decode_ms=(10.0,), num_seqs=(1,), most_seqs=1)
    served = two_pools(alone, alone, np.full(3, 0.002), workload)
    assert served.tps[1] == pytest.approx([1 / (0.010 + 0.0012)])
