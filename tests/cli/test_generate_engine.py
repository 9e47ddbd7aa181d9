"""`generate`: options of the engine, and `--record-routing`."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from cli.screen import refused, tells
from cli.stub_llm import MACHINE, StubLLM
from expertlane.balance.trace import read_trace
from expertlane.cli import local_model, model
from expertlane.spec.deployment import Options
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.hf_config import Quantization
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS

ONE_TOKEN = ["generate", "paper-tiny", "--token-ids", "1"]


@pytest.fixture
def stub(monkeypatch):
    """Stands in place of what would be loaded."""
    llm = StubLLM(PRESETS["paper-tiny"])

    def load(found, layout, options, *, record_routing):
        llm.layout, llm.options, llm.records_routing = layout, options, record_routing
        return llm

    monkeypatch.setattr("expertlane.cli.generate.load_model", load)
    return llm


OPTIONS = """
--dtype bfloat16 --max-model-len 9 --num-blocks 8 --block-size 4 --max-num-seqs 3
--max-num-batched-tokens 7 --oversubscribe --cpu-isa avx2 --ignore-unused-tensors
--no-prefix-caching --overlap on --num-micro-batches 2 --micro-batch-schedule rotating
--timeout-s 5 --layout dp=2,ep=2 --dispatch all_gather --placement round_robin
--num-redundant-experts 4 --ranks-per-node 1
"""


def test_engine_options_are_handed_over(run, stub):
    assert run("generate", "paper-tiny", "--token-ids", "7", *OPTIONS.split())[0] == 0
    assert str(stub.layout) == "dp=2,ep=2"
    assert stub.options.config(stub.layout) == EngineConfig(
        layout=stub.layout,
        dtype="bfloat16",
        max_model_len=9,
        num_blocks=8,
        block_size=4,
        check="off",
        max_num_seqs=3,
        max_num_batched_tokens=7,
        prefix_caching=False,
        options=Options(
            overlap=True,
            num_micro_batches=2,
            micro_batch_schedule="rotating",
            dispatch="all_gather",
            placement="round_robin",
            num_redundant_experts=4,
        ),
        ranks_per_node=1,
        on_failure="stop",
        rejoin_s=300.0,
        timeout_s=5.0,
        oversubscribe=True,
        cpu_isa="avx2",
        ignore_unused_tensors=True,
    )
    assert not stub.records_routing


@pytest.mark.parametrize(("given", "overlap"), [("off", False), ("on", True), ("auto", "auto")])
def test_overlap(run, stub, given, overlap):
    assert run(*ONE_TOKEN, "--overlap", given)[0] == 0
    assert stub.options.options == Options(overlap=overlap)


def test_a_placement_file_is_handed_over(run, stub, tmp_path):
    (tmp_path / "placed").touch()
    assert run(*ONE_TOKEN, "--placement", str(tmp_path / "placed"))[0] == 0
    assert stub.options.options == Options(placement_file=str(tmp_path / "placed"))


def test_routing_is_written_at_the_end(run, stub, tmp_path):
    path = tmp_path / "new" / "routing.npz"
    options = ["--max-tokens", "3", "--record-routing", str(path)]
    code, out, err = run("generate", "paper-tiny", "--token-ids", "7,8", *options)
    assert (code, out) == (0, "9,10,11\n")
    assert err.splitlines()[0] == f"written: {path}"
    trace = read_trace(path)
    assert (trace.model, trace.num_tokens) == ("paper-tiny", 4)
    assert trace.topk_ids[0, 0].tolist() == [3, 1]


def test_routing_so_far_is_written_when_interrupted(run, stub, tmp_path):
    path = tmp_path / "routing.npz"

    def interrupt_third_step():
        if stub.num_tokens == 2:
            raise KeyboardInterrupt

    stub.before_step = interrupt_third_step
    code, _, err = run(*ONE_TOKEN, "--record-routing", str(path))
    assert code == 130
    assert err == f"written: {path}\nexpertlane: error: interrupted\n"
    assert read_trace(path).num_tokens == 2
    assert not stub.is_open


def test_nothing_is_written_of_no_tokens(run, stub, tmp_path):
    asked = ("--token-ids", "999", "--record-routing", str(tmp_path / "routing.npz"))
    code, _, _ = run(*ONE_TOKEN, *asked)
    assert code == 2
    assert list(tmp_path.iterdir()) == []


def test_where_routing_cannot_be_written_nothing_is_loaded(run, monkeypatch, tmp_path):
    monkeypatch.setattr("expertlane.cli.generate.load_model", None)
    taken = tmp_path / "taken"
    taken.touch()
    assert refused(run(*ONE_TOKEN, "--record-routing", str(taken / "a.npz")), f"{taken} folder")
    assert refused(run(*ONE_TOKEN, "--record-routing", str(tmp_path)), f"{tmp_path} folder")
    assert refused(run(*ONE_TOKEN, "--record-routing", "/dev/null"), "/dev/null regular file")
    assert not (tmp_path / "routing.npz").exists()


def test_the_file_of_routing_is_no_prompt_and_no_option(run, stub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(*ONE_TOKEN, "--record-routing", "mine.npz", "--max-tokens", "1")[0] == 0
    assert len(stub.prompts) == 1
    assert read_trace(tmp_path / "mine.npz").num_tokens == 1
    answer = run(*ONE_TOKEN, "--record-routing", "--max-tokens", "1")
    assert refused(answer, "--record-routing --max-tokens option")
    assert [each.name for each in tmp_path.iterdir()] == ["mine.npz"]


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        ("expertlane (avx2)", "expertlane avx2"),
        ("torch", ""),
        ("torch (no compiler)", "torch no compiler faster"),
    ],
)
def test_what_computes_is_said_once(monkeypatch, capsys, kernels, said):
    llm = StubLLM(PRESETS["paper-tiny"])
    llm.machine = (replace(MACHINE, kernels=kernels),)
    monkeypatch.setattr("expertlane.engine.llm.LLM", lambda *_, **__: llm)
    found = model.find_model("paper-tiny")
    engine = SimpleNamespace(config=lambda *_, **__: None, weights="model")
    assert local_model.load_model(found, Layout(), engine) is llm
    told = capsys.readouterr().err.partition(" s\n")[2]
    assert told.count("\n") == bool(said)
    assert tells(told, said)


@pytest.mark.parametrize("keeps_narrow", [True, False])
@pytest.mark.parametrize(
    ("weights", "method"), [("int8", None), ("model", "fp8"), ("model", "compressed-tensors")]
)
def test_widened_weights_are_said(monkeypatch, capsys, weights, method, keeps_narrow):
    llm = StubLLM(PRESETS["paper-tiny"])
    llm.machine = (replace(MACHINE, kernels="torch", keeps_narrow=keeps_narrow),)
    monkeypatch.setattr("expertlane.engine.llm.LLM", lambda *_, **__: llm)
    found = model.find_model("paper-tiny")
    if method is not None:
        found = replace(
            found, quantization=Quantization(method, "float8" if method == "fp8" else None)
        )
    local_model.load_model(
        found, Layout(), SimpleNamespace(config=lambda *_, **__: None, weights=weights)
    )
    told = capsys.readouterr().err.partition(" s\n")[2]
    assert told == "" if keeps_narrow else tells(told, f"weights widened {MACHINE.dtype}")
