"""Arrivals on the virtual clock, served by one pool or by two."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cost.projected import DRIVER_S, MODEL, PROFILE, TYPES, make_runner, make_scheduler
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import LIKELY
from expertlane.cost.memory import KVTransfers
from expertlane.results.metrics import serving_record
from expertlane.simulator.pools import Pool, run_load
from expertlane.spec.layout import Layout
from expertlane.spec.workload import LengthRange, Load, TimedRequest, draw_requests

LENGTHS = LengthRange(3, 9)


def pool(layout="tp=1", **sizes):
    return Pool(make_scheduler(layout, **sizes), make_runner(layout))


def requests(*due_s, prompt_len=5, output_len=3):
    return [
        TimedRequest([1 + number] * prompt_len, output_len, each)
        for number, each in enumerate(due_s)
    ]


class FixedTransfers:
    """Keys and values that take as many seconds as asked for."""

    def __init__(self, seconds):
        self.asked_for = []
        self._seconds = np.array([seconds / 2, seconds, seconds * 2])

    def seconds(self, num_tokens):
        self.asked_for.append(num_tokens)
        return self._seconds


def likely(times):
    return [each[LIKELY] for each in times]


def test_requests_far_apart_do_not_meet():
    alone = run_load(pool(), requests(0.0))[0]
    served = run_load(pool(), requests(0.0, 100.0, 200.0))
    for number, each in enumerate(served):
        assert each.due_s.tolist() == [100.0 * number] * 3
        # Their tokens choose other experts, so not quite the same.
        assert each.ttft_s == pytest.approx(alone.ttft_s, rel=0.05)
        assert each.tpot_s == pytest.approx(alone.tpot_s, rel=0.05)
    assert alone.ttft_s[LIKELY] > DRIVER_S


def test_a_request_that_comes_within_a_step_waits_for_its_end():
    first = run_load(pool(), requests(0.0))[0]
    ends = likely(first.token_times_s)
    due_s = (ends[0] + ends[1]) / 2
    both = run_load(pool(), requests(0.0, due_s))
    assert likely(both[0].token_times_s)[:2] == ends[:2]
    step_s = likely(both[1].token_times_s)[0] - ends[1]
    assert both[1].ttft_s[LIKELY] == pytest.approx(ends[1] - due_s + step_s)
    assert step_s > DRIVER_S


def test_a_closed_loop_keeps_so_many_unfinished():
    served = run_load(pool(), requests(0.0, 0.0, 0.0), max_unfinished=1)
    for before, after in pairwise(served):
        assert after.due_s.tolist() == before.token_times_s[-1].tolist()
    assert all(len(each.token_times_s) == 3 for each in served)


def test_a_front_end_admits_one_request_after_the_other():
    def served(admission_s):
        one = pool()
        terms = replace(one.runner.terms, admission_s=np.full(3, admission_s))
        one.runner.terms = terms
        return run_load(one, requests(0.0, 0.0, 0.0), max_unfinished=3)

    together, apart = served(0.0), served(100.0)
    assert len({each.token_times_s[0][LIKELY] for each in together}) == 1
    for number, each in enumerate(apart):
        assert each.due_s.tolist() == [0.0] * 3  # when it was sent
        own_s = each.ttft_s[LIKELY] - 100.0 * (number + 1)
        assert own_s == pytest.approx(together[0].ttft_s[LIKELY], rel=0.5)


def test_random_arrivals_are_all_served_whole():
    load = Load(40, LENGTHS, LENGTHS, rate=1 / (3 * DRIVER_S))
    drawn = draw_requests(load, 97, [1])
    served = run_load(pool("dp=2,ep=2", num_blocks=16, max_num_seqs=4), drawn)
    assert [len(each.token_times_s) for each in served] == [each.output_len for each in drawn]
    for each in served:
        assert (np.diff(likely(each.token_times_s)) > 0).all()
        assert each.ttft_s[LIKELY] > 0
    found = serving_record(served)
    low, likely_tps, high = found.output_tps.bounds
    assert low < likely_tps < high
    num_output = sum(each.output_len for each in drawn)
    end_s = max(likely(each.token_times_s)[-1] for each in served)
    assert likely_tps == pytest.approx(num_output / end_s)
    num_prompt = sum(len(each.prompt_token_ids) for each in drawn)
    assert found.total_tps.value == pytest.approx((num_output + num_prompt) / end_s)
    assert found.num_requests == 40
    tpot_s = [each.tpot_s[LIKELY] for each in served]
    assert found.tpot_s.mean.value == pytest.approx(np.mean(tpot_s))


def test_two_pools_and_the_transfer_between_them():
    together = run_load(pool(), requests(0.0))[0]
    transfers = FixedTransfers(10.0)
    (apart,) = run_load(pool(), requests(0.0), apart=(pool(), transfers))
    assert transfers.asked_for == [5]
    # The client gets the first token where the others come from.
    assert apart.ttft_s == pytest.approx(together.ttft_s + np.array([5.0, 10.0, 20.0]))
    first, second, third = likely(apart.token_times_s)
    # A decode step on one sequence with the whole prompt in its cache, after the transfer.
    step_s = likely(together.token_times_s)[1] - likely(together.token_times_s)[0]
    assert second - first == pytest.approx(step_s)
    assert third - second == pytest.approx(step_s, rel=0.01)
    assert apart.tpot_s[LIKELY] == pytest.approx(step_s, rel=0.01)


def test_a_request_without_a_place_in_the_second_pool_waits_for_its_first_token():
    alone, decode = run_load(pool(), requests(0.0))[0], pool(max_num_seqs=1)
    served = run_load(pool(), requests(0.0, 0.0), apart=(decode, FixedTransfers(1e-9)))
    first, second = (likely(each.token_times_s) for each in served)
    assert second[0] == pytest.approx(first[-1])
    assert np.diff(second) == pytest.approx(np.diff(likely(alone.token_times_s)), rel=0.05)


def test_transfers_follow_one_another():
    served = run_load(pool(), requests(0.0, 0.0), apart=(pool(), FixedTransfers(10.0)))
    first, second = (likely(each.token_times_s) for each in served)  # of one step of prompts
    assert second[0] - first[0] == pytest.approx(10.0, rel=0.01)


def test_each_data_parallel_rank_sends_by_itself():
    prefill = pool("dp=2,ep=2")
    served = run_load(prefill, requests(0.0, 0.0, 0.0, 0.0), apart=(pool(), FixedTransfers(10.0)))
    firsts = sorted(likely(each.token_times_s)[0] for each in served)
    assert firsts[1] == pytest.approx(firsts[0], rel=0.01)
    assert firsts[2:] == pytest.approx([firsts[0] + 10.0] * 2, rel=0.01)


def test_prompts_do_not_hold_up_decodes_in_another_pool():
    many = requests(*np.arange(20) * 2 * DRIVER_S, prompt_len=40, output_len=9)
    sizes = {"max_num_batched_tokens": 40, "num_blocks": 512}
    together = run_load(pool(**sizes), many)
    apart = run_load(pool(**sizes), many, apart=(pool(**sizes), FixedTransfers(1e-6)))
    slowest = [max(each.tpot_s[LIKELY] for each in served) for served in (apart, together)]
    assert slowest[0] < slowest[1]


def test_a_single_token_needs_no_second_pool():
    transfers = FixedTransfers(1.0)
    served = run_load(pool(), requests(0.0, 0.0, output_len=1), apart=(pool(), transfers))
    assert transfers.asked_for == []
    assert all(each.tpot_s is None for each in served)
    assert serving_record(served).tpot_s is None


def test_a_preempted_request_computes_its_prompt_where_it_decodes():
    prefill, decode = pool(), pool(num_blocks=8, block_size=4, prefix_caching=False)
    many = requests(0.0, 0.0, 0.0, prompt_len=7, output_len=16)
    served = run_load(prefill, many, apart=(decode, FixedTransfers(1e-6)))
    assert [len(each.token_times_s) for each in served] == [16] * 3
    assert sum(each.num_preemptions for each in served) == decode.scheduler.num_preemptions > 0


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        # Of the sender, its share of each stage's keys and values; of the receiver, all it holds.
        ("tp=1", "dp=2,ep=2", 1.0),
        ("tp=2", "tp=1", 1.0),
        ("tp=2", "tp=2", 0.5),
        ("pp=2", "pp=2", 0.5),
    ],
)
def test_the_busiest_rank_decides_how_long_a_transfer_takes(prefill, decode, expected):
    links = LinkModel(PROFILE)
    transfers = KVTransfers(MODEL, TYPES, Layout.parse(prefill), Layout.parse(decode), links)
    num_bytes = expected * TYPES.cached_bytes(1000 * MODEL.num_hidden_layers * 2 * MODEL.kv_size, 0)
    whole = links.kv_transfer(np.array([num_bytes]), np.array([num_bytes]))
    assert transfers.seconds(1000)[LIKELY] == pytest.approx(whole.seconds[0])
