"""Ranks that do not compute alike are refused; what a start waits for."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cli.stub_llm import MACHINE
from expertlane.engine import pool as pool_module
from expertlane.engine.launch import (
    describe_ranks,
    fit_to_machine,
    start_pool,
)
from expertlane.engine.option_checks import check_options
from expertlane.engine.rank_environment import check_cpu_isa
from expertlane.errors import UserError
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS

TINY = PRESETS["paper-tiny"]


def pool_of(*kernels, transports=()):
    machines = [
        SimpleNamespace(host=f"node{i}", kernels=each, backend="gloo")
        for i, each in enumerate(kernels)
    ]
    for machine, transport in zip(machines, transports, strict=False):
        machine.backend = transport
    return SimpleNamespace(call=lambda command: machines)


def test_ranks_that_compute_alike():
    pool = pool_of("torch", "torch (there is no compiler)")
    assert [each.host for each in describe_ranks(pool)] == ["node0", "node1"]


def test_nodes_with_other_kernels_are_refused():
    """Weights of experts that move would be taken for others: silently wrong numbers."""
    with pytest.raises(UserError) as refused:
        describe_ranks(pool_of("expertlane", "expertlane", "torch (this CPU lacks avx512_bf16)"))
    assert str(refused.value) == (
        "rank 0 on node0 computes with expertlane, but rank 2 on node2 with torch (this CPU lacks "
        "avx512_bf16); set EXPERTLANE_BACKEND=torch on all nodes, or make them alike"
    )


def test_ranks_with_other_transports_are_refused():
    """They would wait for each other in vain."""
    transports = "shared_memory", "shared_memory (without compiled code)"
    with pytest.raises(UserError) as refused:
        describe_ranks(pool_of("torch", "torch", transports=transports))
    assert str(refused.value) == (
        "rank 0 exchanges messages by shared_memory, but rank 1 by shared_memory (without compiled "
        "code); set EXPERTLANE_TRANSPORT=gloo on all nodes"
    )


@pytest.mark.full
def test_a_start_that_waits_for_a_compiler_is_no_hang(monkeypatch, tmp_path):
    """It takes longer than a start may without progress, then fails: torch computes."""
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nsleep 20\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("EXPERTLANE_CPU_ISA", "")
    monkeypatch.setattr(pool_module, "_START_TIMEOUT_S", 12.0)  # imports take some seconds
    began_s = time.monotonic()
    with start_pool(2, timeout_s=12.0) as pool:
        assert time.monotonic() - began_s > 20
        for machine in describe_ranks(pool):
            assert "failed: exit code 1" in machine.kernels


CPU_RANK = {"on_gpu": False, "kernels": "expertlane (avx2)", "backend": "gloo"}
GPU_RANK = {"on_gpu": True, "kernels": "torch and expertlane (triton 3.9.0)", "backend": "nccl"}


def test_kernels_are_not_chosen_where_torch_replaces_them(monkeypatch):
    monkeypatch.setenv("EXPERTLANE_BACKEND", "torch")
    with pytest.raises(UserError) as caught:
        start_pool(1, timeout_s=1.0, cpu_isa="amx")
    assert str(caught.value) == (
        "--cpu-isa (or EXPERTLANE_CPU_ISA) amx is for kernels that "
        "EXPERTLANE_BACKEND=torch leaves out; give one of the two"
    )
    check_cpu_isa(None)
    monkeypatch.setenv("EXPERTLANE_BACKEND", "cpu")
    check_cpu_isa("amx")


@pytest.mark.parametrize(
    ("rank", "reason"),
    [
        (CPU_RANK, "need a GPU for every rank"),
        (
            GPU_RANK | {"kernels": "torch (Triton is not installed)"},
            "need our GPU kernels, but a rank computes with torch (Triton is not installed)",
        ),
    ],
)
def test_graphs_that_cannot_be_are_refused_if_asked_for(rank, reason):
    machines = [SimpleNamespace(**GPU_RANK), SimpleNamespace(**rank)]
    with pytest.raises(UserError) as refused:
        check_options(Options(cuda_graphs=True), TINY, Layout(), machines, None)
    assert str(refused.value) == (
        f"CUDA graphs (--cuda-graphs on, cuda_graphs=True) {reason}; valid here: auto or off "
        "(in Python None or False; in a file false, or without cuda_graphs)"
    )
    check_options(Options(), TINY, Layout(), machines, None)
    check_options(Options(cuda_graphs=False), TINY, Layout(), machines, None)
    check_options(
        Options(cuda_graphs=True), TINY, Layout(), [SimpleNamespace(**GPU_RANK)] * 2, None
    )


def test_a_float8_cache_that_a_gpu_cannot_read_is_refused():
    older = replace(MACHINE, device="NVIDIA A100", reads_float8=False)
    limits, layout = Limits(TINY.vocab_size, 64, 64, 16), Layout.parse("dp=2,ep=2")
    with pytest.raises(UserError) as refused:
        fit_to_machine(
            *(TINY, layout, limits, [MACHINE, older]), options=Options(kv_dtype="float8")
        )
    assert str(refused.value) == (
        "a float8 KV cache (--kv-dtype float8, kv_dtype='float8') needs GPUs whose Triton reads "
        "float8, from compute capability 8.9 on; NVIDIA A100 on here does not; valid here: model"
    )
    check_options(Options(), TINY, Layout(), [MACHINE, older], None)
    check_options(Options(kv_dtype="float8"), TINY, Layout(), [MACHINE], None)


def stored_in_float8(folder):
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": method}))
    return folder


def test_float8_activations_that_cannot_be_are_refused(tmp_path):
    options, stored = Options(activations="float8"), stored_in_float8(tmp_path)
    asked = "activations in float8 (--activations float8, activations='float8')"
    older = replace(MACHINE, device="NVIDIA A100", multiplies_float8=False)
    wide = TINY.with_overrides(moe_intermediate_size=384)
    for model, layout, machine, folder, why in (
        (TINY, "tp=1", MACHINE, None, "are for matrices stored in float8; paper-tiny has none;"),
        (
            *(TINY, "tp=1", older, stored),
            "need GPUs whose Triton multiplies float8, from compute capability 8.9 on; NVIDIA A100 "
            f"on {MACHINE.host} does not;",
        ),
        (
            *(wide, "dp=2", MACHINE, stored),
            "have a scale for every 128 inputs, but layout dp=2 cuts experts' inner width of 384 "
            "in 2;",
        ),
    ):
        with pytest.raises(UserError) as refused:
            check_options(options, model, Layout.parse(layout), [machine], folder)
        assert str(refused.value).startswith(f"{asked} {why} valid")
    check_options(options, wide, Layout.parse("dp=3"), [MACHINE], stored)
    with pytest.raises(UserError, match="stored in float8, but weights are 'int8'; give one"):
        Options(activations="float8", weights="int8")
