"""Prompts with shared prefixes in the steady state, by the scheduler's own prefix cache."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from expertlane.cost.laws.profile import LIKELY
from expertlane.simulator.simulator import Simulator
from expertlane.simulator.steady import steady_state
from expertlane.simulator.watch import Prompts
from expertlane.spec.workload import LengthRange, Load, SharedPrefixes
from simulator.setups import simulator_of

PROMPT, OUTPUT = (1100, 1140), (30, 50)
CALM = 0.01  # what chance may do to tokens a second


def sharing(layouts, batch, prefix_len, num_prefixes=1, num_requests=None, **sizes):
    """A deployment whose load shares prefixes; `memory` bytes of a device, if it is given."""
    memory = sizes.pop("memory", None)
    found = simulator_of(layouts, batch, num_requests or batch or 100, PROMPT, OUTPUT, **sizes)
    load = replace(found.load, prefix_len=prefix_len, num_prefixes=num_prefixes)
    cluster = found.cluster
    if memory is not None:
        device = replace(cluster.profile.device, memory_bytes=memory)
        cluster = replace(cluster, profile=replace(cluster.profile, device=device))
    return Simulator(found.model, cluster, found.setup, load)


def tps_of(*asked, **more):
    return float(steady_state(sharing(*asked, **more), 0).rates.output_tps[LIKELY])


def found_share(served):
    """Of prompt tokens, those found in the cache."""
    return sum(e.num_cached_tokens for e in served) / sum(e.prompt_len for e in served)


@pytest.mark.full
@pytest.mark.parametrize(
    ("layouts", "num_prefixes"),
    [
        (("tp=2",), 1),
        (("dp=2,ep=2",), 3),
        (("dp=2,ep=2",), 1),
        (("tp=1", "tp=2"), 2),
    ],
)
def test_as_the_middle_of_the_whole_load(layouts, num_prefixes):
    batch, num_requests = 16, 480
    whole = sharing(layouts, batch, 1024, num_prefixes, num_requests).run(0).served
    first_s = np.array([each.token_times_s[0][LIKELY] for each in whole])
    begin_s, end_s = np.sort(first_s)[[num_requests // 4, 3 * num_requests // 4]]
    times_s = np.concatenate([[each[LIKELY] for each in e.token_times_s] for e in whole])
    tps = ((begin_s < times_s) & (times_s <= end_s)).sum() / (end_s - begin_s)
    middle = [e for e, at in zip(whole, first_s, strict=True) if begin_s < at <= end_s]

    found = steady_state(sharing(layouts, batch, 1024, num_prefixes), 0)
    assert found.rates.output_tps[LIKELY] == pytest.approx(tps, rel=0.03)
    tpot_s = np.mean([each.tpot_s[LIKELY] for each in middle])
    assert found.rates.tpot_s[LIKELY] == pytest.approx(tpot_s, rel=0.03)
    ttft_s = np.mean([each.ttft_s[LIKELY] for each in middle])
    assert found.rates.ttft_s[LIKELY] == pytest.approx(ttft_s, rel=0.1)
    assert found_share(found.served) == pytest.approx(found_share(middle), rel=0.01)
    assert found_share(found.served) > 0.9


@pytest.mark.smoke(1)
@pytest.mark.parametrize("rate", [None, 400.0])
@pytest.mark.parametrize("prefix_len", [0, 15])
def test_a_prefix_that_fills_no_block_changes_nothing(prefix_len, rate):
    batch = None if rate else 8
    asked = (("dp=2,ep=2",), batch)
    none, some = (
        steady_state(sharing(*asked, length, 7, rate=rate), 0) for length in (0, prefix_len)
    )
    for name in ("requests_per_s", "output_tps", "ttft_s", "tpot_s", "num_waiting"):
        assert np.array_equal(getattr(none.rates, name), getattr(some.rates, name))
    assert none.pools[0].ranks.memory == some.pools[0].ranks.memory
    assert found_share(some.served) == 0


def test_what_is_over_a_block_is_not_shared():
    one, other = (steady_state(sharing(("tp=2",), 8, each), 0) for each in (1024, 1039))
    assert np.array_equal(one.rates.output_tps, other.rates.output_tps)
    assert {each.num_cached_tokens for each in other.served} == {1024}


def memory_for(layouts, num_seqs):
    """Bytes of a device with room for so many sequences beside weights and activations."""
    ranks = sharing(layouts, 64, 0).start()[0][-1].ranks
    memory, limits = ranks.memory, ranks.limits
    of_seq = memory.kv_bytes / limits.num_blocks * (-(-limits.max_model_len // 16))
    return (memory.weight_bytes + memory.activation_bytes + num_seqs * of_seq) / 0.9


@pytest.mark.parametrize("layout", ["tp=2", "dp=2,ep=2"])
def test_memory_that_blocks_save_is_for_more_sequences(layout):
    memory = memory_for((layout,), 6)
    none, one = (
        steady_state(sharing((layout,), 64, prefix_len, memory=memory), 0)
        for prefix_len in (0, 1024)
    )
    num_ranks = none.pools[0].ranks.layout.dp
    assert none.rates.num_decoding <= 8 * num_ranks
    assert one.rates.num_decoding > 4 * none.rates.num_decoding
    assert one.pools[0].ranks.num_resident > 4 * none.pools[0].ranks.num_resident
    assert one.rates.output_tps[LIKELY] > 1.5 * none.rates.output_tps[LIKELY]
    for table in one.pools[0].pool.scheduler.tables[0]:
        assert table.blocks.ref_count(table.blocks_of(table_row(table))[0]) > 20


def table_row(table):
    """Of a request that runs."""
    return next(row for row, each in enumerate(table.requests) if each is not None)


@pytest.mark.parametrize("layouts", [("tp=2",), ("dp=2,ep=2",), ("tp=1", "tp=2")])
def test_more_prefixes_than_fit_are_hardly_ever_found(layouts):
    memory = memory_for(layouts, 24)
    none = tps_of(layouts, 16, 0, memory=memory)
    found = steady_state(sharing(layouts, 16, 1024, 100_000, memory=memory), 0)
    assert found_share(found.served) < 0.05
    assert found.rates.output_tps[LIKELY] >= (1 - CALM) * none


@pytest.mark.full
@pytest.mark.parametrize("num_prefixes", [20, 60, 200])
def test_as_many_are_found_as_the_formula_says(num_prefixes):
    """A cache for 60 sequences without prefixes, 12 of which run."""
    layouts = ("tp=2",)
    memory = memory_for(layouts, 60)
    simulator = sharing(layouts, 12, 1024, num_prefixes, memory=memory)
    shares = [found_share(steady_state(simulator, seed).served) for seed in range(4)]
    ranks = simulator.start()[0][0].ranks
    own = (1120 + 40 - 1) / 16 - 64
    wanted = ranks.prefixes.found_share(ranks.limits.num_blocks, own) * 1024 / 1120
    assert np.mean(shares) == pytest.approx(wanted, abs=0.08)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("layouts", [("tp=2",), ("dp=2,ep=2",), ("tp=1", "tp=2")])
@pytest.mark.parametrize(("num_prefixes", "num_resident"), [(1, None), (4, None), (30, 20)])
def test_a_longer_prefix_is_no_slower(layouts, num_prefixes, num_resident):
    lengths = (0, 128, 512, 1024, 1088)
    memory = None if num_resident is None else memory_for(layouts, num_resident)
    tps = [tps_of(layouts, 16, each, num_prefixes, memory=memory) for each in lengths]
    for before, after in pairwise(tps):
        assert after >= (1 - CALM) * before


def test_in_an_open_loop_prompts_are_fewer_tokens():
    none, one = (
        steady_state(sharing(("tp=2",), None, prefix_len, rate=400.0), 0)
        for prefix_len in (0, 1024)
    )
    assert found_share(one.served) == pytest.approx(1024 / 1120, rel=0.01)
    assert one.rates.ttft_s[LIKELY] < none.rates.ttft_s[LIKELY]


def test_prompts_share_their_prefix_alone():
    prompts = Prompts(SharedPrefixes(2, 2, 4), 9, 0)
    drawn = [prompts.draw(17).tolist() for _ in range(40)]
    beginnings = [tuple(each[:8]) for each in drawn]
    assert len(set(beginnings)) == 2
    assert 10 <= beginnings.count(beginnings[0]) <= 30
    assert len({tuple(each[8:12]) for each in drawn}) > 35
    assert np.array(drawn).min() >= 0
    assert np.array(drawn).max() < 9


def test_a_cache_is_left_with_the_latest_prefixes():
    """Of the latest request its own blocks before its prefix, whose first block goes last."""
    prompts = Prompts(SharedPrefixes(3, 2, 4), 9, 0)
    left = prompts.cache_contents(1000, 4.0)
    known = [each for each in left if each is not None]
    assert len(known) == len(set(known)) == 6
    assert left[-6:] == [None] * 4 + known[-2:]
    assert [known[-1], known[-2]] in [prompts._digests_of(number) for number in range(3)]
    assert len(left) < 1000
    few = prompts.cache_contents(7, 4.0)  # of the request before the latest, one block
    assert [each is None for each in few[1:]] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("num", [1, 7, 1000])
def test_sequences_that_a_cache_holds_share_prefixes(num):
    shared = SharedPrefixes(num, 10, 16)
    held = shared.num_sharing(500, 4)
    assert held * 4 + shared.num_distinct(held) * 10 == pytest.approx(500)
    assert 500 / 14 <= held <= 500 / 4
    assert shared.found_share(500, 4) == pytest.approx(1 - np.exp(-held / num))
    load = Load(1, LengthRange(170, 170), LengthRange(2, 2), 1, prefix_len=165, num_prefixes=num)
    assert load.shared(16) == shared


def test_known_rates_of_a_prefill_pool_change_no_draw():
    shares, known = sharing(("tp=1", "tp=2"), 16, 1024, 400, memory=2.5e8), {}
    first, again = (steady_state(shares, 0, known=known) for _ in range(2))
    assert known
    assert found_share(first.served) < 1024 / PROMPT[0]  # so hits depend on what was drawn
    assert [e.num_cached_tokens for e in again.served] == [
        e.num_cached_tokens for e in first.served
    ]
