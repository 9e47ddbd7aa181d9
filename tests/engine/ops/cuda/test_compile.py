"""Kernels of engine/ops/cuda compiled ahead of time for GPUs, as launched at models' sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.screen import tells

ROOT = Path(__file__).parents[4]
pytest.importorskip("triton")

needs_tools = pytest.mark.skipif(
    sys.platform != "linux", reason="Triton's wheel, which has ptxas, is for Linux"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(ROOT / "benchmarks" / "compile_cuda.py"), "--json", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1200)


def compiled(*arguments: str) -> list[dict]:
    """What benchmarks/compile_cuda.py found; it fails where a shape or a bound is not kept."""
    ended = run(*arguments)
    assert ended.returncode == 0, ended.stderr[-2000:] + ended.stdout
    return json.loads(ended.stdout)


@pytest.mark.full
@needs_tools
def test_attention_and_experts_of_decode_steps_keep_the_bounds():
    """And all cases give the right shapes on "cuda" (FakeTensorMode)."""
    found = compiled("--only", "decode, Qwen3", "experts, decode")
    attention = [each for each in found if each["kernel"] == "_attention_kernel"]
    assert {each["target"] for each in attention} == {90, 100}
    assert all(each["registers"] > 0 and each["shared_bytes"] >= 0 for each in found)
    multiply = {"_attention_kernel", "_grouped_kernel"}
    assert {each["kernel"] for each in found} >= multiply
    assert {each["kernel"] for each in found if each["product"] == "mma"} == multiply
    assert all((each["kernel"] in multiply) == (each["rows"] > 0) for each in found)


@pytest.mark.full
@needs_tools
def test_float8_inputs_are_multiplied_as_float8():
    """Not widened first, which Triton does where a card's instructions do not suit a tile."""
    found = compiled("--only", "float8 inputs, prompt", "float8 inputs, decode")
    products = [each for each in found if each["kernel"] == "_grouped_kernel"]
    assert {each["target"] for each in products} == {90, 100}
    assert all(each["is_float8"] for each in products)


def test_a_tile_of_many_rows_has_to_be_multiplied_by_a_group_of_warps(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from compile_cuda import Compiled

    def is_within(target, rows, product):
        return Compiled("", "", target, 8, 200, 0, 0, rows, product).is_within

    assert is_within(90, 64, "wgmma")
    assert is_within(100, 128, "tcgen05")
    assert is_within(90, 32, "mma")
    assert is_within(90, 0, "")
    assert not is_within(90, 64, "mma")
    assert not is_within(100, 64, "mma+tcgen05")
    assert not is_within(90, 16, "")
    assert not is_within(90, 0, "mma")


@pytest.mark.full
@needs_tools
def test_words_that_are_in_no_name_compile_nothing_and_fail():
    ended = run("--only", "no such case")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert tells(ended.stderr, "no such case cases")


@needs_tools
@pytest.mark.full
@pytest.mark.timeout(1200)
def test_all_kernels_keep_the_bounds():
    found = compiled()
    assert len(found) > 60
    assert {each["product"] for each in found} == {"", "mma", "wgmma", "tcgen05"}
