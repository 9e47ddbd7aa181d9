"""How `LLM` hands options on, and what it refuses before ranks are started."""

import subprocess
import sys

import pytest

from cli.screen import telling
from engine.conftest import StubPool, stub_runner
from expertlane.engine import llm as llm_module
from expertlane.engine.launch import LoadPlan
from expertlane.engine.llm import LLM, as_list
from expertlane.errors import UserError
from expertlane.spec.deployment import Options
from expertlane.spec.model import PRESETS
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


THREE_A_NODE = {"ranks_per_node": 3}


@pytest.fixture
def no_ranks(monkeypatch):
    """Ranks cannot be started."""
    monkeypatch.setattr(llm_module, "start_pool", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 16.5}, "block_size 16.5 1 65,536"),
        ({"options": Options(num_redundant_experts=1)}, "17 experts 1 rank"),
        ({"options": Options(placement_file="no/file")}, "no/file No such file"),
        ({"options": Options(placement_file="a\0b")}, "embedded null byte"),
        (
            {"layout": "dp=4,ep=4", "options": Options(dispatch="hierarchical")} | THREE_A_NODE,
            "ep=4 ranks node nodes 3 1",
        ),
        (
            {"layout": "tp=2", "options": Options(rebalance_steps=4)},
            "rebalance_steps 4 tp=2 ep=1 expert 0 ep=2",
        ),
        ({"layout": "tp=3"}, "tp=3"),
        ({"max_model_len": 65}, "max_model_len 65 1 64"),
    ],
)
def test_settings_are_checked_before_anything_starts(no_ranks, settings, message):
    with pytest.raises(UserError, match=telling(message)) as caught:
        LLM("paper-tiny", **settings)
    assert "\n" not in str(caught.value)


def test_routing_of_a_dense_model_is_refused_before_anything_starts(monkeypatch, no_ranks):
    dense = PRESETS["paper-tiny"].with_overrides(dense_layers=(0, 1, 2, 3), intermediate_size=24)
    monkeypatch.setitem(PRESETS, "dense", dense)
    with pytest.raises(UserError, match=telling("4 layers dense")):
        LLM("dense", record_routing=True)


@pytest.mark.parametrize("prompts", [5, None, {"a": 1}, (i for i in range(2))])
def test_prompts_of_a_wrong_kind(prompts):
    with pytest.raises(UserError, match=telling("text list ids")):
        as_list(prompts)


def test_the_package_gives_its_face_without_torch():
    code = "import sys, expertlane; expertlane.LLM; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
