"""One deployment on a modelled cluster, without the command around it."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from expertlane.cost.runner import StepSharing
from expertlane.cost.throughput import MultiToken
from expertlane.results.metrics import serving_record
from expertlane.simulator.pools import PhaseTotals
from expertlane.spec.deployment import Options
from expertlane.spec.names import Stage, Traffic
from simulator import setups
from simulator.setups import ROUTING


def simulator_of(*layouts, rate=None, num_requests=8, **more):
    batch = None if rate else 8
    return setups.simulator_of(layouts, batch, num_requests, (4, 16), (2, 6), rate=rate, **more)


@pytest.mark.parametrize("pools", [("pp=2,tp=2",), ("pp=2,tp=2", "tp=2"), ("dp=4,ep=4",)], ids=str)
def test_a_trace_s_steps_follow_one_another(pools):
    simulator = simulator_of(*pools)
    steps = simulator.trace(simulator.run(0))
    assert len(steps) == 2
    assert steps[0].submitted_s == 0 < steps[0].finished_s == steps[1].submitted_s
    stretches = {}
    for step in steps:
        for record in step.records:
            events = record.events
            for track in set(events.track.tolist()):
                of_track = events.track == track
                begin_s = events.start_s + float(events.begin_s[of_track].min())
                end_s = events.start_s + float(events.end_s[of_track].max())
                assert step.submitted_s <= begin_s < end_s <= step.finished_s + 1e-12
                stretches.setdefault((record.rank, track), []).append((begin_s, end_s))
    for of_row in stretches.values():
        for (_, end_s), (begin_s, _) in pairwise(of_row):
            assert begin_s > end_s


def test_median_steps_each_begin_at_their_own_zero():
    simulator = simulator_of("dp=4,ep=4")
    (of_phase,) = simulator.median_steps(simulator.run(0))
    assert [step.submitted_s for step in of_phase.values()] == [0.0, 0.0]


@pytest.mark.parametrize(("num_steps", "median", "apart"), [(1, 0, 0), (5, 2, 0), (5000, 2500, 16)])
def test_the_median_step_of_however_many(num_steps, median, apart):
    """The step of place p takes p seconds, the fifth of five far the longest."""
    totals = PhaseTotals(facts=None)
    for place in range(num_steps):
        plan = SimpleNamespace(batches=(), place=place)
        totals.add(plan, np.full(3, place if place != 4 else 900.0), num_drafts=0)
    assert abs(totals.median.place - median) <= apart
    assert len(totals.sample) <= 257


@pytest.mark.smoke(1)
@pytest.mark.parametrize("rate", [None, 50.0])
def test_an_assumed_skew_widens_bounds_alone(rate):
    asked, assumed = (replace(ROUTING, alpha=0.8, bounds=each) for each in (None, (0.0, 2.0)))
    known, wide = (simulator_of("dp=4,ep=4", rate=rate, routing=each) for each in (asked, assumed))
    assert (known.num_runs, wide.num_runs) == (1 if rate is None else 3, 3)
    one, other = (serving_record(each.run(0).served).tpot_s.mean for each in (known, wide))
    assert other.value == one.value
    assert other.low < one.low
    assert other.high > one.high


def test_skew_is_no_matter_without_expert_parallelism():
    assumed = replace(ROUTING, bounds=(0.0, 2.0))
    assert simulator_of("tp=4", routing=assumed).num_runs == 1
    assert simulator_of("tp=4", "dp=4,ep=4", routing=assumed).num_runs == 3


@pytest.mark.full
def test_an_open_loop_shares_steps_that_are_alike(monkeypatch):
    sharing, apart = (simulator_of("tp=2", rate=50.0, num_requests=64) for _ in range(2))
    shared = sharing.run(0)
    with monkeypatch.context() as patch:
        patch.setattr(StepSharing, "find", lambda self, plan, make: make())
        every = apart.run(0)
    of_runs = [serving_record(each.served) for each in (every, shared)]
    assert of_runs[1].output_tps.value == pytest.approx(of_runs[0].output_tps.value, rel=0.01)
    tpot_s = [each.tpot_s.mean.value for each in of_runs]
    assert tpot_s[1] == pytest.approx(tpot_s[0], rel=0.01)
    num_steps = sum(len(each.step_s) for each in shared.pools[0].totals.phases.values())
    assert every.pools[0].pool.runner.num_priced == num_steps > 200
    assert shared.pools[0].pool.runner.num_priced < num_steps / 5


def to_peers(records):
    """Bytes of hidden states to each other rank in dispatch; of each rank."""
    sent = [record.sent_bytes[Stage.DISPATCH, Traffic.PAYLOAD] for record in records]
    return [set(each[each > 0].tolist()) for each in sent]


@pytest.mark.parametrize("form", ["all_to_all", "all_gather"])
def test_each_phase_has_its_dispatch_form(form):
    """Only an all-gather sends the same to all."""
    other = {"all_to_all": "all_gather", "all_gather": "all_to_all"}[form]
    options = Options(dispatch=form, prefill_dispatch=other)
    simulator = simulator_of("dp=4,ep=4", options=options)
    (steps,) = simulator.median_steps(simulator.run(0))
    is_even = {
        phase: all(len(each) == 1 for each in to_peers(step.records))
        for phase, step in steps.items()
    }
    assert is_even == {"decode": form == "all_gather", "prefill": other == "all_gather"}


def test_pools_apart_take_the_form_of_their_phase():
    options = Options(dispatch="all_to_all", prefill_dispatch="all_gather")
    simulator = simulator_of("dp=4,ep=4", "dp=2,ep=2", options=options)
    assert simulator.setup.options_of("prefill") == Options(dispatch="all_gather")
    assert simulator.setup.options_of("decode") == Options()
    assert len(simulator.run(0).served) == 8


def test_acceptance_has_bounds(monkeypatch):
    assert simulator_of("tp=2").num_runs == 1
    spread = []
    for unsure in (0.1, 0.0):
        monkeypatch.setattr("expertlane.cost.throughput.ACCEPTANCE_UNSURE", unsure)
        simulator = simulator_of("tp=2", multi_token=MultiToken(2, 0.6))
        assert simulator.num_runs == 3
        tpot_s = serving_record(simulator.run(0).served).tpot_s.mean
        assert tpot_s.low < tpot_s.value < tpot_s.high
        spread.append(tpot_s.high / tpot_s.low)
    assert spread[0] > 1.05 * spread[1]
