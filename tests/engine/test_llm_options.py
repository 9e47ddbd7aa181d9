"""How `LLM` hands options on, on a runner without a model."""

import pytest

from engine.conftest import StubPool, stub_runner
from expertlane.engine import llm as llm_module
from expertlane.engine.launch import LoadPlan
from expertlane.engine.llm import LLM
from expertlane.errors import UserError
from expertlane.spec.deployment import Options
from expertlane.spec.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=5)


@pytest.fixture
def stub(monkeypatch):
    """No ranks are started."""
    monkeypatch.setattr(llm_module, "start_pool", lambda config: StubPool())
    monkeypatch.setattr(llm_module, "ModelRunner", stub_runner)


def test_they_reach_the_memory_plan_the_ranks_and_the_scheduler(monkeypatch, stub):
    plans, fit = [], LoadPlan.fit
    monkeypatch.setattr(
        LoadPlan, "fit", lambda plan, *given: plans.append(plan) or fit(plan, *given)
    )
    options = Options(num_redundant_experts=2, num_micro_batches=2)
    settings = {"num_blocks": 8, "layout": "dp=2,ep=2", "options": options}
    with LLM("paper-tiny", ranks_per_node=3, **settings) as llm:
        assert [placed.num_slots for placed in plans[0].placements] == [18] * 4
        assert (llm._runner.config.options, llm._runner.config.ranks_per_node) == (options, 3)
        assert llm.engine.scheduler._num_micro_batches == 2
    with LLM("paper-tiny", **settings) as llm:
        assert llm._runner.config.ranks_per_node == 1  # as the rank saw it


def test_fewer_blocks_fit_beside_more_experts(stub):
    num_blocks = [
        LLM(
            "paper-small",
            layout="dp=2,ep=2",
            options=Options(num_redundant_experts=num_redundant),
            max_num_seqs=10**6,
        ).limits.num_blocks
        for num_redundant in (0, 16)
    ]
    assert num_blocks[1] < num_blocks[0]


def test_it_shows_what_it_runs_and_whether_it_is_closed(stub):
    with LLM("paper-tiny", layout="dp=2,ep=2", max_model_len=64) as llm:
        assert repr(llm) == "<LLM paper-tiny, dp=2,ep=2, float32, 64 positions>"
    assert repr(llm) == "<LLM paper-tiny, dp=2,ep=2, float32, 64 positions, closed>"
    assert repr(LLM.__new__(LLM)) == "<LLM, not loaded>"


def test_routing_is_there_if_asked_for(stub):
    with (
        LLM("paper-tiny") as llm,
        pytest.raises(UserError, match="make the LLM with record_routing=True"),
    ):
        llm.routing_trace()
    with LLM("paper-tiny", record_routing=True) as llm:
        assert llm.engine.scheduler._flags["record_routing"]
        assert len(llm.generate([1], GREEDY)[0].token_ids) == 5
        trace = llm.routing_trace()  # the stub's ranks tell nothing
    assert (trace.layers, trace.num_tokens) == ((0, 1, 2, 3), 0)
