"""A short window of a closed load says what the whole load comes to."""

import numpy as np
import pytest

import expertlane
from expertlane.cost.throughput import MultiToken
from expertlane.results.metrics import serving_record
from expertlane.results.serving_record import best_load
from expertlane.simulator.results import serving_of
from expertlane.simulator.steady import steady_state
from expertlane.simulator.watch import USUAL, Lengths, poisson_quantiles
from expertlane.spec.workload import LengthRange, Load, parse_slos
from simulator.setups import simulator_of

NO_DRAFTS = MultiToken()


@pytest.mark.full
@pytest.mark.parametrize(
    ("layouts", "batch", "prompt", "output", "multi_token"),
    [
        (("tp=2",), 4, (40, 50), (90, 110), NO_DRAFTS),
        (("dp=2,ep=2",), 6, (40, 50), (90, 110), NO_DRAFTS),
        (("tp=2",), 4, (40, 50), (90, 110), MultiToken(2, 0.5)),
        (("tp=2", "replicas=2,tp=2"), 8, (40, 50), (90, 110), NO_DRAFTS),
    ],
)
def test_as_the_whole_load(layouts, batch, prompt, output, multi_token):
    whole = simulator_of(layouts, batch, 40 * batch, prompt, output, multi_token=multi_token)
    served = serving_record(whole.run(0).served, ())
    found = steady_state(
        simulator_of(layouts, batch, batch, prompt, output, multi_token=multi_token), 0
    )
    rates = found.rates
    assert rates.tpot_s[1] == pytest.approx(served.tpot_s.mean.value, rel=0.05)
    assert rates.ttft_s[1] == pytest.approx(served.ttft_s.mean.value, rel=0.35)
    assert rates.output_tps[1] == pytest.approx(served.output_tps.value, rel=0.05)
    assert rates.num_decoding + rates.num_waiting == pytest.approx(batch)
    assert (np.diff(rates.tpot_s) >= 0).all()


def test_two_pools_have_the_pace_of_their_requests():
    """The first token is no token of the pool that decodes."""
    asked = {"cluster": "h100x4", "batch": 24, "prompt_len": 160, "output_len": 12, "skew": 0}
    layouts = {"layout": "tp=2", "prefill_layout": "tp=2"}
    found = expertlane.simulate("paper-small", **layouts, **asked).deployments[0].serving[0]
    assert found.tpot_s.mean.value == pytest.approx(found.tpot_s.median.value, rel=0.005)
    assert found.tpot_s.p95.value >= 0.995 * found.tpot_s.mean.value


def test_a_short_stretch_is_cheap():
    whole = simulator_of(("tp=2",), 64, 640, (40, 50), (900, 1000))
    found = steady_state(whole, 0)
    num_steps = sum(len(each.pool.runner.bounds) for each in found.pools)
    assert num_steps <= 1.25 * USUAL.most_steps


@pytest.mark.parametrize("output", [(1, 1), (2, 2), (300, 300)])
@pytest.mark.parametrize("batch", [1, 5])
def test_few_requests_and_few_tokens(output, batch):
    found = steady_state(simulator_of(("dp=2,ep=2",), batch, batch, (1, 9), output), 0)
    rates = found.rates
    assert len(found.served) > 0
    assert rates.output_tps[1] == pytest.approx(rates.requests_per_s[1] * output[0])
    in_time = batch / (rates.ttft_s[1] + (output[0] - 1) * rates.tpot_s[1])
    assert rates.requests_per_s[1] == pytest.approx(in_time, rel=0.15)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("layouts", [("tp=2",), ("tp=4", "tp=1")])
def test_few_requests_take_the_time_of_their_tokens(layouts, batch):
    """By Little's law, though more of them begin in the window than usually do."""
    prompt, output = (9000, 9000), (300, 300)
    rates = steady_state(simulator_of(layouts, batch, batch, prompt, output), 0).rates
    in_time = batch / (rates.ttft_s + (output[0] - 1) * rates.tpot_s)
    assert rates.requests_per_s == pytest.approx(in_time, rel=0.01)


def test_a_pool_without_requests_is_not_in_its_steps():
    """Between two prompts the pool for them has nothing to do for as long as all tokens take."""
    asked = {"cluster": "h100x4", "batch": 1, "prompt_len": 160, "output_len": 200, "skew": 0}
    layouts = {"layout": "tp=2", "prefill_layout": "tp=2"}
    found = expertlane.simulate("paper-small", **layouts, **asked).deployments[0]
    (prefill,) = (each for each in found.steps if each.phase == "prefill")
    assert prefill.shares["scheduler overhead"] < 0.25


def test_few_that_prefill_let_others_wait():
    """A pool of one rank for prompts, four for few tokens: most requests wait for the first."""
    found = steady_state(
        simulator_of(("tp=1", "tp=4"), 64, 64, (900, 1000), (8, 12), max_num_batched_tokens=1024), 0
    )
    rates = found.rates
    assert rates.num_waiting > 32
    assert rates.ttft_s[1] == pytest.approx(rates.num_waiting / rates.requests_per_s[1], rel=0.1)


def test_those_without_a_place_wait_as_long_as_the_queue_lets_them():
    """Four places for sixteen: by Little's law."""
    found = steady_state(simulator_of(("tp=2",), 16, 16, (40, 50), (90, 110), max_num_seqs=4), 0)
    rates = found.rates
    assert rates.num_decoding == pytest.approx(4, rel=0.05)
    assert rates.ttft_s[1] == pytest.approx(rates.num_waiting / rates.requests_per_s[1], rel=0.1)
    waits = [each.ttft_s[1] for each in found.served]
    assert min(waits) > 0.7 * rates.ttft_s[1]  # none is found as if it had just come


def test_what_arrives_late_waits_as_long():
    simulator = simulator_of(("tp=2",), 4, 4, (40, 50), (90, 110))
    before = steady_state(simulator, 0).rates
    terms = simulator._terms
    object.__setattr__(terms, "arrival_s", np.array([0.1, 0.2, 0.3]))
    after = steady_state(simulator, 0).rates
    assert after.ttft_s - before.ttft_s == pytest.approx([0.1, 0.2, 0.3], abs=0.02)


@pytest.mark.full
def test_an_open_loop_serves_what_arrives_until_it_cannot():
    most = steady_state(simulator_of(("tp=2",), 256, 256, (40, 50), (90, 110)), 0).rates
    capacity = most.requests_per_s[1]
    asked = ("tp=2",), None, 100, (40, 50), (90, 110)
    calm, busy, over = (
        steady_state(simulator_of(*asked, rate=share * capacity), 0).rates
        for share in (0.1, 0.6, 1.5)
    )
    for rates, share in ((calm, 0.1), (busy, 0.6)):
        assert rates.requests_per_s == pytest.approx([share * capacity] * 3)
        in_system = rates.requests_per_s[1] * (rates.ttft_s[1] + 99 * rates.tpot_s[1])
        assert rates.num_decoding + rates.num_waiting == pytest.approx(in_system, rel=0.2)
    assert calm.tpot_s[1] < busy.tpot_s[1]
    assert over.ttft_s is None
    assert over.requests_per_s[1] == pytest.approx(capacity, rel=0.05)


def test_steps_left_are_those_of_requests_met_under_way():
    """Half of the requests have 10 steps, half 30: of 40 under way 10 and 30, all evenly along."""
    lengths = Lengths(Load(2, LengthRange(5, 5), LengthRange(11, 11), 2), NO_DRAFTS)
    lengths._further = np.array([10, 30])
    lengths.most_steps = 30
    chance = lengths.chance_in(np.arange(1, 31))
    assert chance.sum() == pytest.approx(1)
    assert chance[:10] == pytest.approx([2 / 40] * 10)
    assert chance[10:] == pytest.approx([1 / 40] * 20)


@pytest.mark.parametrize("mean", [0.01, 0.7, 5.0, 80.0])
def test_quantiles_of_a_poisson_distribution(mean):
    numbers = poisson_quantiles(mean, (np.arange(4000) + 0.5) / 4000)
    assert numbers.mean() == pytest.approx(mean, rel=0.01)
    assert numbers.var() == pytest.approx(mean, rel=0.03)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("layout", ["tp=4", "dp=4,ep=4", "pp=2,tp=2"])
def test_seeds_agree_within_the_error_that_is_told(layout):
    found = [
        steady_state(simulator_of((layout,), 32, 32, (200, 200), (80, 120)), seed).rates
        for seed in range(3)
    ]
    tps = [each.output_tps[1] for each in found]
    assert max(tps) / min(tps) - 1 <= 2 * max(max(each.error for each in found), 0.005)


def test_a_limit_that_counts_the_wait_is_not_met_where_a_queue_grows():
    """The window is short: in it no request waits for long, but in the load all do."""
    limits = parse_slos(["ttft.p95=100s,e2e.mean=1000s,tpot.mean=10s"])
    calm, grows = (
        serving_of(each, steady_state(each, 0), limits)
        for rate in (20.0, 1e6)
        for each in [simulator_of(("tp=2",), None, 64, (40, 50), (90, 110), rate=rate)]
    )
    assert [each.is_met for each in calm.slos] == [True, True, True]
    assert [each.is_met for each in grows.slos] == [False, False, True]
    assert (grows.goodput.value, grows.good_share.value) == (0, 0)
    assert grows.output_tps.value > calm.output_tps.value
    assert best_load([calm, grows]) is calm
    alone = simulator_of(("tp=2",), None, 64, (40, 50), (90, 110), rate=1e6)
    decoding = serving_of(alone, steady_state(alone, 0), parse_slos(["tpot.mean=10s"]))
    assert decoding.keeps_slos
    assert decoding.good_share.value == 1
