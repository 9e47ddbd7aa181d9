"""What `LLM` and experiments refuse before ranks are started, and `LLM` of its prompts."""

import subprocess
import sys

import pytest

import expertlane
from cli.screen import telling
from expertlane.engine import llm as llm_module
from expertlane.engine.llm import LLM, as_list
from expertlane.errors import UserError
from expertlane.spec.deployment import Options
from expertlane.spec.model import PRESETS
from expertlane.spec.sampling import SamplingParams


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype int8 float32 bfloat16 float16"),
        ({"block_size": 16.5}, "block_size 16.5 1 65,536"),
        ({"block_size": "x"}, "block_size x"),
        ({"num_blocks": 0}, "num_blocks 0 1 33,554,432"),
        ({"timeout_s": 0}, "timeout_s 0 1,000,000"),
        ({"timeout_s": 1e300}, "timeout_s 1e+300 0"),
        ({"timeout_s": float("nan")}, "timeout_s nan"),
        ({"ranks_per_node": -1}, "ranks_per_node -1 0"),
        ({"ranks_per_node": 1.5}, "ranks_per_node 1.5 0"),
        ({"options": Options(num_redundant_experts=1)}, "17 experts 1 rank"),
        ({"options": Options(placement_file="no/file")}, "no/file No such file"),
        (
            {
                "layout": "dp=4,ep=4",
                "ranks_per_node": 3,
                "options": Options(dispatch="hierarchical"),
            },
            "ep=4 ranks node nodes 3 1",
        ),
        (
            {"layout": "tp=2", "options": Options(rebalance_steps=4)},
            "rebalance_steps 4 tp=2 ep=1 expert 0 ep=2",
        ),
        ({"options": Options(placement_file="a\0b")}, "embedded null byte"),
        ({"seed": -1}, "seed -1"),
        ({"layout": None}, "layout"),
        ({"layout": "tp=3"}, "tp=3"),
        ({"max_model_len": 10**9}, "max_model_len 1000000000 1"),
        ({"max_model_len": 65}, "max_model_len 65 1 64"),
    ],
)
def test_settings_are_checked_before_anything_starts(monkeypatch, settings, message):
    def start_pool(*args, **kwargs):
        raise AssertionError("ranks were started")

    monkeypatch.setattr(llm_module, "start_pool", start_pool)
    with pytest.raises(UserError, match=telling(message)) as caught:
        LLM("paper-tiny", **settings)

    assert "\n" not in str(caught.value)


def test_routing_of_a_dense_model_is_refused_before_anything_starts(monkeypatch):
    dense = PRESETS["paper-tiny"].with_overrides(dense_layers=(0, 1, 2, 3), intermediate_size=24)
    monkeypatch.setitem(PRESETS, "dense", dense)
    monkeypatch.setattr(llm_module, "start_pool", None)
    with pytest.raises(UserError, match=telling("4 layers dense")):
        LLM("dense", record_routing=True)


@pytest.mark.parametrize("prompts", [5, None, {"a": 1}, (i for i in range(2))])
def test_prompts_of_a_wrong_kind(prompts):
    with pytest.raises(UserError, match=telling("text list ids")):
        as_list(prompts)


def test_one_prompt_or_several():
    assert as_list("a") == ["a"]
    assert as_list([1, 2]) == [[1, 2]]
    assert as_list(["a", [1]]) == ["a", [1]]
    assert as_list([]) == []


def test_the_package_gives_its_face_without_torch():
    assert expertlane.LLM is LLM
    assert expertlane.SamplingParams is SamplingParams
    with pytest.raises(AttributeError, match="has no attribute 'Nobody'"):
        _ = expertlane.Nobody
    code = "import sys, expertlane; expertlane.LLM; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
