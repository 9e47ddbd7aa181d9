"""The command lines of other systems: their parsers take them, and what they say differs."""

import importlib.util
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.screen import tells
from expertlane.cost.number_types import NumberTypes
from expertlane.plan.candidates import Candidate
from expertlane.plan.commands import CHECKED, ServedPool, ServeTarget, serve_commands
from expertlane.spec.deployment import Options
from expertlane.spec.dispatch import DISPATCH_FORMS
from expertlane.spec.hf_config import Quantization
from expertlane.spec.layout import Layout
from plan.serving_options import Parser, of_vllm, recorded

FP8, MXFP4 = Quantization("fp8", "float8"), Quantization("mxfp4", "mxfp4")
TARGET, TYPES = ServeTarget("/there/mine"), NumberTypes.asked("bfloat16")
SYSTEMS = ("vLLM", "SGLang", "TensorRT-LLM")
PARSERS = {"vLLM": Parser("vllm"), "SGLang": Parser("sglang")}
FORMS = tuple(DISPATCH_FORMS)


def commands(layout, options=None, *, drafts=0, role="both", nodes=1, types=TYPES, served=TARGET):
    candidate = Candidate(Layout.parse(layout), options or Options(), drafts)
    made = serve_commands([ServedPool(candidate, nodes, role)], served, types, 100)
    assert tuple(each.system for each in made) == SYSTEMS
    return {each.system: each for each in made}


def words_of(each):
    words = shlex.split(each.command)
    begin = {"vLLM": ["vllm", "serve"], "SGLang": ["python", "-m", "sglang.launch_server"]}
    assert words[: len(begin[each.system])] == begin[each.system]
    return words[3:]  # after the model; or after the module


def parsed(each):
    """As the recorded parser takes it: the options that were given."""
    taken = vars(PARSERS[each.system].parse_args(words_of(each)))
    return {name: value for name, value in taken.items() if value not in (None, False)}


@pytest.mark.parametrize(
    ("weights", "stored", "words", "note"),
    [
        ("bfloat16", None, "--dtype bfloat16", ""),
        ("float8", None, "--quantization fp8", ""),
        ("float8", FP8, "", ""),
        ("bfloat16", FP8, "--dtype bfloat16", "stored fp8 not bfloat16"),
        ("bfloat16", MXFP4, "--dtype bfloat16", "stored mxfp4 not bfloat16"),
        ("float8", MXFP4, "", "stored mxfp4 not float8"),
        ("mxfp4", MXFP4, "", ""),
        ("nvfp4", None, "", "checkpoint nvfp4"),
    ],
)
def test_types_of_weights(weights, stored, words, note):
    served = ServeTarget("/there/mine", stored)
    made = commands("tp=4", types=NumberTypes.asked(weights), served=served)
    for each in (made["vLLM"], made["SGLang"]):
        assert "/there/mine" in each.command
        assert words in each.command
        assert ("--dtype" in each.command) == ("--dtype" in words)
        assert ("--quantization" in each.command) == ("--quantization" in words)
        assert bool(each.note) == bool(note)
        assert tells(each.note, note)


PREFILL_APART = Options(dispatch="all_to_all", prefill_dispatch="hierarchical")


@pytest.mark.parametrize(
    ("options", "role", "vllm", "sglang"),
    [
        (Options(), "both", "deepep_low_latency", "auto"),
        (PREFILL_APART, "both", "deepep_low_latency", "auto"),
        (Options(dispatch="hierarchical"), "both", "deepep_high_throughput", "normal"),
        (Options(), "prefill", "deepep_high_throughput", "normal"),
        (Options(dispatch="hierarchical"), "prefill", "deepep_high_throughput", "normal"),
        (PREFILL_APART, "prefill", "deepep_high_throughput", "normal"),
        (Options(), "decode", "deepep_low_latency", "low_latency"),
        (PREFILL_APART, "decode", "deepep_low_latency", "low_latency"),
        (Options(dispatch="all_gather"), "decode", "allgather_reducescatter", None),
    ],
)
def test_kernels_of_each_phase(options, role, vllm, sglang):
    made = commands("dp=16,ep=16", options, role=role, nodes=2)
    assert parsed(made["vLLM"])["all2all_backend"] == vllm
    given = parsed(made["SGLang"])
    assert given.get("deepep_mode") == sglang
    assert given.get("disaggregation_mode") == (None if role == "both" else role)
    assert ("kv_transfer_config" in parsed(made["vLLM"])) == (role != "both")


def test_one_backend_for_both_phases_is_said():
    note = "prompts are dispatched as decodes"
    made = commands("dp=8,ep=8", Options(dispatch="all_gather", prefill_dispatch="all_to_all"))
    assert note in made["vLLM"].note
    assert note in made["SGLang"].note
    made = commands("dp=8,ep=8", Options())
    assert note in made["vLLM"].note  # low-latency kernels for prompts
    assert note not in made["SGLang"].note


def test_attention_data_parallelism_and_drafts():
    made = commands("dp=4,tp=2,ep=8", drafts=3)
    vllm, sglang = parsed(made["vLLM"]), parsed(made["SGLang"])
    assert (vllm["tensor_parallel_size"], vllm["data_parallel_size"]) == ("2", "4")
    assert vllm["speculative_config"] == '{"method": "mtp", "num_speculative_tokens": 3}'
    assert (sglang["tp_size"], sglang["attn_dp_size"], sglang["ep_size"]) == ("8", "4", "8")
    assert (sglang["speculative_num_steps"], sglang["speculative_num_draft_tokens"]) == ("3", "4")


def test_context_parallelism():
    made = commands("tp=8,dcp=8")
    assert parsed(made["vLLM"])["decode_context_parallel_size"] == "8"
    assert parsed(made["SGLang"])["dcp_size"] == "8"
    assert made["TensorRT-LLM"].command is None


def test_what_was_checked_is_said():
    made = commands("dp=8,ep=8", role="decode")
    assert made["vLLM"].label == f"vLLM decode pool (options of {CHECKED['vLLM']})"
    assert made["TensorRT-LLM"].label == "TensorRT-LLM decode pool (unverified)"
    assert "enable_attention_dp" in made["TensorRT-LLM"].command
    assert {name: recorded(name.lower())["version"] for name in CHECKED} == CHECKED


def test_what_cannot_be_expressed():
    made = commands("dp=2,tp=4,ep=2")
    assert tells(made["vLLM"].note, "cannot expressed")
    assert tells(made["SGLang"].note, "cannot expressed")
    assert tells(made["TensorRT-LLM"].note, "cannot expressed")
    assert all(each.command is None for each in made.values())


@st.composite
def pools(draw):
    """Any pool that a plan may have."""
    dp, tp = draw(st.sampled_from((1, 2, 8))), draw(st.sampled_from((1, 2, 4)))
    ep = draw(st.sampled_from([n for n in (1, 2, dp * tp) if dp * tp % n == 0]))
    dcp = draw(st.sampled_from([n for n in (1, 2, 4) if tp % n == 0]))
    options = Options(
        overlap=draw(st.booleans()),
        dispatch=draw(st.sampled_from(FORMS)),
        prefill_dispatch=draw(st.sampled_from((None, *FORMS))),
        num_redundant_experts=draw(st.sampled_from((0, ep))),
    )
    layout = Layout(1, draw(st.sampled_from((1, 2))), dp, tp, ep, dcp)
    candidate = Candidate(layout, options, draw(st.sampled_from((0, 1, 3))))
    role = draw(st.sampled_from(("both", "prefill", "decode")))
    return ServedPool(candidate, draw(st.sampled_from((1, 3))), role)


@given(
    st.lists(pools(), min_size=1, max_size=3),
    st.sampled_from((None, FP8, MXFP4)),
    st.sampled_from(("bfloat16", "float8", "mxfp4")),
)
def test_parsers_take_whatever_is_written(some, stored, weights):
    types, target = NumberTypes.asked(weights), ServeTarget("org/model", stored)
    made = serve_commands(some, target, types, 4096)
    assert len(made) == 3 * len(some)
    for each in made:
        assert each.command is not None or each.note
        if each.command is not None and each.system in PARSERS:
            assert parsed(each)


def test_the_record_is_the_installed_parser():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; its parser is as recorded in serving_options.json")
    now, then = of_vllm(), recorded("vllm")
    if now["version"] != then["version"]:
        pytest.skip(f"vLLM is {now['version']}; recorded was {then['version']}")
    assert now == then
