"""The few best, simulated: which those are, and what a whole load of the same comes to."""

from dataclasses import replace

import numpy as np
import pytest

from expertlane.cost.throughput import Goals, ThroughputCurve
from expertlane.planner.candidates import family_of
from expertlane.planner.screen import fitting
from expertlane.planner.search import Trials
from expertlane.planner.simulated import Race, simulate, simulate_pools
from expertlane.simulator.watch import ROUGH
from expertlane.spec.layout import Layout
from expertlane.spec.workload import Workload
from planner.requests import search_of

GOALS = Goals()


@pytest.fixture(scope="module")
def options():
    return fitting(search_of(num_devices=8).screen())


def times(factor_of, done):
    """A simulation that has so many times the tokens that were screened."""

    def run(option, precision):
        done.append(option)
        factor, at = factor_of(option.candidate.layout), slice(option.place, option.place + 1)
        served = option.served
        return ThroughputCurve(
            served.num_seqs[at],
            served.tps[:, at] * factor,
            served.tpot_s[:, at] / factor,
            served.ttft_s[:, at] / factor,
        )

    return run


def race(options, factor_of, goals=GOALS, **budget):
    done = []
    request = search_of(num_devices=8, goals=goals).request
    run = times(factor_of, done)
    return Race(options, request, run, lambda _: None, **budget).result(), done


@pytest.mark.parametrize(
    "factor_of",
    [
        lambda layout: 1.0,
        lambda layout: 1 / layout.dp,  # data-parallel attention is worse than screened
        lambda layout: 1.3 if layout.dp * layout.pp == 1 else 0.7,
        lambda layout: 0.5 if layout.ep > 1 else 1.0,
    ],
)
def test_nothing_that_was_only_screened_may_be_better(options, factor_of):
    found, done = race(options, factor_of, most=10**6)
    assert found.num_open == 0
    assert [each.tps for each in found.able] == sorted((e.tps for e in found.able), reverse=True)
    assert len(done) == len(found.able) < len(options) / 2
    first = found.able[0]
    true = max(factor_of(each.candidate.layout) * each.tps for each in options)
    assert first.tps == pytest.approx(true)


def test_the_best_of_kinds_come_first_and_the_budget_holds(options):
    found, done = race(options, lambda _: 1.0, most=3)
    assert len(done) == 3
    families = [family_of(each.candidate.layout) for each in done]
    assert len(set(families)) == 3
    assert len(found.able) == 3


def test_the_best_of_a_group_is_found_though_others_are_better(options):
    """Of those that a group holds, none that was only screened may be better than its best."""
    groups = [lambda each: each.layout.pp == 2, lambda each: each.layout.tp == 8]
    found, _ = race(options, lambda _: 1.0, most=10**6, groups=groups)
    for group in groups:
        best = max(each.tps for each in options if group(each.candidate))
        told = max(each.tps for each in found.able if group(each.option.candidate))
        assert told == pytest.approx(best)


@pytest.mark.parametrize("factor", [0.8, 0.95, 1.0, 1.2])
def test_as_many_sequences_as_keep_a_limit_are_found(options, factor):
    """Between those that were priced; the formula is off by a factor."""
    option = max(options, key=lambda each: each.tps)
    request = search_of(num_devices=8).request
    tpot_s = option.served.tpot_s[1]
    limit = float(tpot_s[-2] * 0.4 + tpot_s[-1] * 0.6)
    request = replace(request, goals=Goals(max_tpot_s=limit))
    done = []
    found = Trials(option, request, times(lambda _: factor, done), ROUGH).settle(0.005)
    assert len(done) <= 6
    assert found.breach(request.goals) <= 1
    at_limit = option.within(request.goals, 1 / factor)[0]
    assert found.num_seqs >= 0.95 * at_limit


@pytest.mark.parametrize("slope", [0.0, 0.05, 0.3, 1.0])
def test_more_users_never_get_fewer_tokens(options, slope):
    """TPOT that hardly grows with sequences, or grows as they do, whatever the formula says."""
    option = max(options, key=lambda each: each.most_seqs)
    request = search_of(num_devices=8).request
    most, longest_s = option.most_seqs, float(option.served.tpot_s[1, -1])

    def run(at, precision):
        tpot_s = longest_s * (at.num_seqs / most) ** slope
        times_s = np.full((3, 1), tpot_s)
        tps = np.full((3, 1), at.num_seqs / tpot_s)
        return ThroughputCurve(np.array([at.num_seqs]), tps, times_s, times_s)

    for share in (0.97, 0.8, 0.5):
        goals = Goals(max_tpot_s=longest_s * share**slope)
        true = most * share if slope else most
        asked = replace(request, goals=goals)
        found = Trials(option, asked, run, ROUGH).settle(0.005, boldly=True)
        assert found.keeps(goals)
        reached = found.num_seqs / found.served.tpot_s[1, 0]
        assert reached >= 0.98 * true / goals.max_tpot_s


def test_no_number_of_sequences_keeps_an_impossible_limit(options):
    request = search_of(num_devices=8, goals=Goals(max_tpot_s=1e-6)).request
    found = Trials(options[0], request, times(lambda _: 1.0, []), ROUGH).settle(0.005)
    assert found.breach(request.goals) > 1
    assert found.num_seqs == 1


def test_prompts_hold_up_data_parallel_ranks():
    """The same workload with equal and with drawn lengths, and what screening makes of both."""
    workload = Workload(64, 512, 64)
    search = search_of(num_devices=8, workload=workload)
    of_layout = {str(each.candidate): each for each in fitting(search.screen())}
    ratios = {}
    for name in ("dp=8; plain", "replicas=2,tp=4; plain", "pp=2,tp=4; plain"):
        option = replace(of_layout[name], place=len(of_layout[name].steps.num_seqs) - 1)
        served = simulate(option, request=search.request)
        assert served.num_seqs[0] == option.num_seqs == 64
        assert (np.diff(served.tps[:, 0]) >= 0).all()
        ratios[name] = served.tps[1, 0] / option.tps
    assert all(0.7 < ratio < 1.4 for ratio in ratios.values()), ratios


def test_pools_with_replicas_that_divide_alike_are_simulated_in_part():
    search = search_of(num_devices=4, workload=Workload(32, 512, 64))
    of_layout = {str(each.candidate): each for each in fitting(search.screen())}
    option = of_layout["replicas=2,tp=2; plain"]
    whole = replace(option, place=len(option.steps.num_seqs) - 1)
    served = simulate_pools(whole, whole, search.request, 32)
    half = replace(search.request, workload=Workload(16, 512, 64))
    one = replace(whole, candidate=whole.candidate._replace(layout=Layout(tp=2)))
    of_half = replace(one, steps=replace(one.steps, num_seqs=one.steps.num_seqs // 2))
    alone = simulate_pools(one, of_half, half, 16)
    assert served.tps == pytest.approx(2 * alone.tps)
    many = replace(whole, candidate=whole.candidate._replace(layout=Layout(replicas=17, tp=2)))
    assert simulate_pools(many, one, search.request, 32) is None
