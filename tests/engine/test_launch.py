"""Ranks that do not compute alike are refused; what a start waits for."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cli.screen import telling, tells
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
    assert tells(
        str(refused.value),
        "rank 0 node0 expertlane 2 node2 torch CPU avx512_bf16 EXPERTLANE_BACKEND=torch",
    )


def test_ranks_with_other_transports_are_refused():
    """They would wait for each other in vain."""
    transports = "shared_memory", "shared_memory (without compiled code)"
    with pytest.raises(UserError) as refused:
        describe_ranks(pool_of("torch", "torch", transports=transports))
    assert tells(str(refused.value), "rank 0 1 shared_memory EXPERTLANE_TRANSPORT=gloo")


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
            assert tells(machine.kernels, "failed exit code 1")


CPU_RANK = {"on_gpu": False, "kernels": "expertlane (avx2)", "backend": "gloo"}
GPU_RANK = {"on_gpu": True, "kernels": "torch and expertlane (triton 3.9.0)", "backend": "nccl"}


def test_kernels_are_not_chosen_where_torch_replaces_them(monkeypatch):
    monkeypatch.setenv("EXPERTLANE_BACKEND", "torch")
    with pytest.raises(UserError) as caught:
        start_pool(1, timeout_s=1.0, cpu_isa="amx")
    assert tells(str(caught.value), "--cpu-isa EXPERTLANE_CPU_ISA amx EXPERTLANE_BACKEND=torch")
    check_cpu_isa(None)
    monkeypatch.setenv("EXPERTLANE_BACKEND", "cpu")
    check_cpu_isa("amx")


@pytest.mark.parametrize(
    ("rank", "reason"),
    [
        (CPU_RANK, "GPU rank"),
        (
            GPU_RANK | {"kernels": "torch (Triton is not installed)"},
            "GPU torch Triton",
        ),
    ],
)
def test_graphs_that_cannot_be_are_refused_if_asked_for(rank, reason):
    machines = [SimpleNamespace(**GPU_RANK), SimpleNamespace(**rank)]
    with pytest.raises(UserError) as refused:
        check_options(Options(cuda_graphs=True), TINY, Layout(), machines, None)
    assert tells(str(refused.value), f"--cuda-graphs cuda_graphs=True {reason} auto off None False")
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
    assert tells(str(refused.value), "float8 KV --kv-dtype kv_dtype 8.9 NVIDIA A100 model")
    check_options(Options(), TINY, Layout(), [MACHINE, older], None)
    check_options(Options(kv_dtype="float8"), TINY, Layout(), [MACHINE], None)


def stored_in_float8(folder):
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": method}))
    return folder


def test_float8_activations_that_cannot_be_are_refused(tmp_path):
    options, stored = Options(activations="float8"), stored_in_float8(tmp_path)
    asked = "--activations activations='float8'"
    older = replace(MACHINE, device="NVIDIA A100", multiplies_float8=False)
    wide = TINY.with_overrides(moe_intermediate_size=384)
    for model, layout, machine, folder, why in (
        (TINY, "tp=1", MACHINE, None, "paper-tiny"),
        (
            *(TINY, "tp=1", older, stored),
            f"GPUs Triton 8.9 NVIDIA A100 {MACHINE.host}",
        ),
        (
            *(wide, "dp=2", MACHINE, stored),
            "128 dp=2 384",
        ),
    ):
        with pytest.raises(UserError) as refused:
            check_options(options, model, Layout.parse(layout), [machine], folder)
        assert tells(str(refused.value), f"{asked} {why}")
    check_options(options, wide, Layout.parse("dp=3"), [MACHINE], stored)
    with pytest.raises(UserError, match=telling("float8 weights int8")):
        Options(activations="float8", weights="int8")
