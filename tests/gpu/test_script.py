"""`make gpu` where there is no GPU: what it says, and how its parts are run."""

import json
import os
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu():
    """benchmarks/gpu.py."""
    spec = spec_from_file_location("gpu_script", ROOT / "benchmarks" / "gpu.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    ended = run(OUT=str(tmp_path / "results"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"gpu: torch {torch.__version__} sees no GPU here; nothing was run\n"
    assert not any(tmp_path.iterdir())


def test_an_unknown_part_is_refused():
    ended = run("benchmarks")
    assert ended.returncode == 2
    assert "no part is called 'benchmarks'; valid: operations, kernels" in ended.stderr


def test_four_parts_rehearsed(tmp_path):
    ended = run("--rehearse", "operations", "kernels", "limits", "layer", OUT=str(tmp_path))
    assert ended.returncode == 0, ended.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(each["part"], each["status"]) for each in summary["parts"]] == [
        ("operations", "passed"),
        ("kernels", "passed"),
        ("limits", "passed"),
        ("layer", "passed"),
    ]
    assert (summary["card"], summary["torch"]) == ("CPU", torch.__version__)
    rows = json.loads((tmp_path / "layer.json").read_text())["rows"]
    assert {row["what"].split(",")[0] for row in rows} == {"decode", "prompts", "experts"}
    assert all(row["s"] > 0 and row["read_bytes"] > 0 for row in rows)
    assert "layer: passed" in (tmp_path / "summary.txt").read_text()


def test_every_limit_together_is_under_ten_minutes(gpu):
    assert sum(part.limit_s for part in gpu.PARTS) < 590


def test_a_part_that_fails_or_is_too_slow(gpu, tmp_path):
    failing = gpu.Part("failing", 60, ("-c", "print('{folder}'); raise SystemExit(3)"))
    outcome = gpu.run_part(failing, tmp_path, rehearse=False)
    assert (outcome.status, outcome.last_line) == ("failed", str(tmp_path))

    # It leaves a process behind, which must go too.
    script = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    slow = gpu.run_part(gpu.Part("slow", 2, ("-c", script)), tmp_path, rehearse=False)
    assert (slow.status, time.monotonic() - began < 30) == ("too slow", True)
    child = Path("/proc") / slow.last_line / "stat"
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.05)
