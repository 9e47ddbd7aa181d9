"""What `LLM` and experiments refuse before ranks are started, and `LLM` of its prompts."""

import re
import subprocess
import sys

import pytest

import expertlane
from expertlane.engine import llm as llm_module
from expertlane.engine.llm import LLM
from expertlane.engine.llm_prompts import as_list
from expertlane.errors import UserError
from expertlane.spec.deployment import Options
from expertlane.spec.model import PRESETS
from expertlane.spec.sampling import SamplingParams


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; valid: float32, bfloat16, float16"),
        ({"block_size": 16.5}, "block_size is 16.5; it must be a whole number, 1 to 65,536"),
        ({"block_size": "x"}, "block_size is 'x'; it must be a whole number"),
        ({"num_blocks": 0}, "num_blocks is 0; it must be a whole number, 1 to 33,554,432"),
        ({"timeout_s": 0}, "timeout_s is 0; it must be a number above 0, at most 1,000,000"),
        ({"timeout_s": 1e300}, "timeout_s is 1e+300; it must be a number above 0, at most"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"ranks_per_node": -1}, "ranks_per_node is -1; it must be a whole number, 0"),
        ({"ranks_per_node": 1.5}, "ranks_per_node is 1.5; it must be a whole number, 0"),
        ({"options": Options(num_redundant_experts=1)}, "17 physical experts on 1 rank: "),
        ({"options": Options(placement_file="no/file")}, "cannot read no/file: No such file"),
        (
            {
                "layout": "dp=4,ep=4",
                "ranks_per_node": 3,
                "options": Options(dispatch="hierarchical"),
            },
            "needs equally many of the ep=4 ranks on each node, but nodes of 3 hold 3, 1",
        ),
        (
            {"layout": "tp=2", "options": Options(rebalance_steps=4)},
            "rebalance_steps is 4, but layout tp=2 has ep=1, where no expert can move; valid: 0, "
            "or a layout with ep=2 or more",
        ),
        ({"options": Options(placement_file="a\0b")}, "cannot read 'a\\x00b': embedded null byte"),
        ({"seed": -1}, "seed is -1; it must be a whole number"),
        ({"layout": None}, "layout"),
        ({"layout": "tp=3"}, "tp=3"),
        ({"max_model_len": 10**9}, "max_model_len is 1000000000; it must be a whole number, 1"),
        ({"max_model_len": 65}, "max_model_len is 65; valid for paper-tiny: 1 to 64"),
    ],
)
def test_settings_are_checked_before_anything_starts(monkeypatch, settings, message):
    def start_pool(*args, **kwargs):
        raise AssertionError("ranks were started")

    monkeypatch.setattr(llm_module, "start_pool", start_pool)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        LLM("paper-tiny", **settings)

    assert "\n" not in str(caught.value)


def test_routing_of_a_dense_model_is_refused_before_anything_starts(monkeypatch):
    dense = PRESETS["paper-tiny"].with_overrides(dense_layers=(0, 1, 2, 3), intermediate_size=24)
    monkeypatch.setitem(PRESETS, "dense", dense)
    monkeypatch.setattr(llm_module, "start_pool", None)
    with pytest.raises(UserError, match="has no routing to record: all its 4 layers are dense"):
        LLM("dense", record_routing=True)


@pytest.mark.parametrize("prompts", [5, None, {"a": 1}, (i for i in range(2))])
def test_prompts_of_a_wrong_kind(prompts):
    with pytest.raises(UserError, match="give a text, a list of token ids, or a list"):
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
