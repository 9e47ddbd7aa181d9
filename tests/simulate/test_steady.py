"""A short stretch of a closed load says what the whole load comes to."""

import numpy as np
import pytest

from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.profile_file import parse_cluster
from expertlane.cost.multi_token import MultiToken
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import PowerLawRouting
from expertlane.results.metrics import serving_record
from expertlane.simulate.setup import ServingSetup
from expertlane.simulate.simulator import Simulator
from expertlane.simulate.steady import steady_rates
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import LengthRange, Load

MODEL = PRESETS["paper-tiny"]
NO_DRAFTS = MultiToken()


def simulator_of(layouts, batch, num_requests, prompt, output, multi_token=NO_DRAFTS, **sizes):
    *prefill, decode = map(Layout.parse, layouts)
    setup = ServingSetup(
        layout=decode,
        prefill_layout=prefill[0] if prefill else None,
        options=Options(),
        types=NumberTypes(),
        execution=Execution.GRAPH,
        routing=PowerLawRouting(MODEL.num_experts, MODEL.num_experts_per_tok),
        multi_token=multi_token,
        **sizes,
    )
    load = Load(num_requests, LengthRange(*prompt), LengthRange(*output), batch)
    return Simulator(MODEL, parse_cluster("h100x8"), setup, load)


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
    whole = simulator_of(layouts, batch, 8 * batch, prompt, output, multi_token)
    served = serving_record(whole.run(0).served, ())
    found = steady_rates(
        simulator_of(layouts, batch, batch, prompt, output, multi_token), 0, least_steps=200
    )
    assert found.tpot_s[1] == pytest.approx(served.tpot_s.mean.value, rel=0.05)
    assert found.ttft_s[1] == pytest.approx(served.ttft_s.mean.value, rel=0.35)
    assert found.output_tps[1] == pytest.approx(served.output_tps.value, rel=0.1)
    assert found.num_decoding + found.num_waiting == pytest.approx(batch)
    assert (np.diff(found.tpot_s) >= 0).all()


def test_a_short_stretch_is_cheap():
    whole = simulator_of(("tp=2",), 64, 640, (40, 50), (900, 1000))
    found = steady_rates(whole, 0)
    assert found.num_steps < 200


def test_few_that_prefill_let_others_wait():
    """A pool of one rank for prompts, four for few tokens: most requests wait for the first."""
    found = steady_rates(
        simulator_of(("tp=1", "tp=4"), 64, 64, (900, 1000), (8, 12), max_num_batched_tokens=1024), 0
    )
    assert found.num_waiting > 32
    rate = found.output_tps[1] / 10
    assert found.ttft_s[1] == pytest.approx(found.num_waiting / rate, rel=0.25)


def test_what_arrives_late_waits_as_long(monkeypatch):
    simulator = simulator_of(("tp=2",), 4, 4, (40, 50), (90, 110))
    before = steady_rates(simulator, 0)
    terms = simulator._terms
    object.__setattr__(terms, "arrival_s", np.array([0.1, 0.2, 0.3]))
    after = steady_rates(simulator, 0)
    assert after.ttft_s - before.ttft_s == pytest.approx([0.1, 0.2, 0.3], abs=0.02)
