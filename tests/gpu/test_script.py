"""`make gpu` where there is no GPU: what it says, how its parts are run, and what it answers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import gpu_answers
import psutil
import pytest
import torch

from cli.screen import tells
from engine.ranks.processes import wait_until

ROOT = Path(__file__).parents[2]
MUST_SHOW = (2, 3, 4, 5)


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
        timeout=280,
    )


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    ended = run("--folder", str(tmp_path / "results"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert tells(ended.stderr, f"torch {torch.__version__} GPU")
    assert not any(tmp_path.iterdir())


def test_an_unknown_part_is_refused():
    ended = run("benchmarks")
    assert ended.returncode == 2
    assert tells(ended.stderr, "benchmarks parity kernels")


@pytest.mark.full
def test_a_part_rehearsed_and_not_run_again(tmp_path):
    part, folder = "one_rank", tmp_path / "results"
    out = tmp_path / "out"
    ended = run("--rehearse", "--folder", str(folder), part, OUT=str(out))
    assert ended.returncode == 0, ended.stdout
    results = json.loads((folder / "results.json").read_text())
    assert {name: each["status"] for name, each in results["parts"].items()} == {part: "passed"}
    assert (results["card"], results["torch"]) == ("CPU", torch.__version__)
    rows = results["parts"]["one_rank"]["data"]["rows"]
    assert [row["is_counted"] for row in rows] == [True] * 5
    assert all(row["step_s"] > 0 and row["projected"]["h100"][1] > 0 for row in rows)
    summary = (folder / "summary.txt").read_text()
    assert len(summary.splitlines()) <= 50
    assert max(map(len, summary.splitlines())) <= 80
    assert {path.name for path in out.iterdir()} == {"summary.txt", "results.json", "log.txt"}

    again = run("--rehearse", "--folder", str(folder), part)
    assert again.returncode == 0
    assert f"gpu: {part} passed before" in again.stdout


@pytest.mark.full
def test_every_part_rehearsed(tmp_path):
    ended = run("--rehearse", "--folder", str(tmp_path))
    assert ended.returncode == 0, ended.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert {each["status"] for each in results["parts"].values()} <= {
        "passed",
        "not run: vllm is not installed",
    }
    assert (tmp_path / "profile.toml").exists()
    assert "this card" in results["parts"]["one_rank"]["data"]["rows"][0]["projected"]
    assert all(results["parts"][name]["tests"] for name in ("parity", "kernels", "operations"))
    assert 4 <= len(list(tmp_path.iterdir())) <= 8


def test_limits_together_are_under_nine_minutes(gpu):
    assert sum(part.limit_s for part in gpu.PARTS if not part.needs) < gpu.TOTAL_S
    assert gpu.TOTAL_S <= 540


@pytest.mark.full
def test_a_part_that_fails_or_is_too_slow(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "END_S", 0.5)
    failing = gpu.Part("failing", 60, ("-c", "print('{folder}'); raise SystemExit(3)"))
    outcome = gpu.run_part(failing, tmp_path, 60, rehearse=False)
    assert (outcome.status, outcome.last_line) == ("failed", str(tmp_path))

    # It leaves a process behind, which must go too; what it wrote is kept.
    script = (
        "import pathlib, signal, subprocess, sys, time;"
        "signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "pathlib.Path('{data}').write_text('[1]');"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    slow = gpu.run_part(gpu.Part("slow", 5, ("-c", script)), tmp_path, 5, rehearse=False)
    assert (slow.status, slow.data, time.monotonic() - began < 30) == ("too slow", [1], True)
    child = Path("/proc") / slow.last_line / "stat"
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.05)
    log = (tmp_path / "log.txt").read_text()
    assert log.index("== failing: failed") < log.index("== slow: too slow")

    absent = gpu.run_part(gpu.Part("peer", 9, (), needs="no_such"), tmp_path, 9, rehearse=False)
    assert tells(absent.status, "no_such installed")


def test_a_stop_in_a_part_leaves_nothing_behind(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--rehearse"]
    process = subprocess.Popen(
        [*command, "--folder", str(tmp_path), "limits"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("gpu: limits")
    parts: list[psutil.Process] = []

    def computes() -> bool:
        parts[:] = psutil.Process(process.pid).children()
        with suppress(psutil.NoSuchProcess):
            return any(part.cpu_times().user > 0.2 for part in parts)
        return False

    assert wait_until(computes, pause_s=0.05), "the part never began"
    process.terminate()
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 128 + signal.SIGTERM
    assert not any(part.is_running() for part in parts)
    assert list(tmp_path.iterdir()) == []


def test_parts_of_an_earlier_run_stay_when_this_one_is_stopped(gpu, tmp_path, monkeypatch):
    first, second = (gpu.Part(name, 60, ("-c", "")) for name in ("first", "second"))
    monkeypatch.setattr(gpu, "PARTS", (first, second))
    monkeypatch.setattr(gpu, "code_of", lambda root: "before")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--folder", str(tmp_path)])
    assert gpu.main() == 0
    run_part = gpu.run_part

    def stopped_at_second(part, *arguments, **options):
        if part is second:
            raise KeyboardInterrupt
        return run_part(part, *arguments, **options)

    monkeypatch.setattr(gpu, "code_of", lambda root: "now")
    monkeypatch.setattr(gpu, "run_part", stopped_at_second)
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    found = gpu.kept(tmp_path)
    assert {name: each.code for name, each in found.items()} == {"first": "now", "second": "before"}
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.startswith("A rehearsal: CPU, torch")
    assert "second: passed, by other code" in summary


@pytest.mark.full
def test_tests_that_were_over_when_time_ran_out_are_kept(gpu, tmp_path, monkeypatch):
    limit_s, began = 60, tmp_path / "began"

    class UntilSlow(subprocess.Popen):
        """Time runs out when the slow test has begun."""

        def wait(self, timeout=None):
            if timeout == limit_s:
                assert wait_until(began.exists)
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", UntilSlow)
    (tmp_path / "test_slow.py").write_text(
        "import pathlib, time\n"
        "def test_quick(record_property): record_property('error', 1e-6)\n"
        f"def test_slow(): pathlib.Path({str(began)!r}).touch(); time.sleep(100)\n"
    )
    arguments = (*gpu.PYTEST, "-p", "no:xdist", "--noconftest", str(tmp_path / "test_slow.py"))
    part = gpu.Part("tests", limit_s, arguments)
    found = gpu.run_part(part, tmp_path, limit_s, rehearse=False)
    assert found.status == "too slow"
    (quick, *_) = found.tests
    assert quick["name"].endswith("test_quick")
    assert (quick["outcome"], float(quick["error"])) == ("passed", 1e-6)


def test_code_is_told_by_what_parts_run(gpu, tmp_path):
    for name in ("src", "tests", "benchmarks/results"):
        (tmp_path / name).mkdir(parents=True)
    path = tmp_path / "src" / "a.py"
    path.write_text("a = 1\n")
    first = gpu.code_of(tmp_path)
    (tmp_path / "benchmarks" / "results" / "old.json").write_text("{}")
    assert gpu.code_of(tmp_path) == first
    path.write_text("a = 2\n")
    assert gpu.code_of(tmp_path) != first


def case(name, num_bytes, flops, seconds):
    return {"name": name, "num_bytes": num_bytes, "flops": flops, "seconds": seconds}


def row(group, **more):
    of_any = {"step_s": 4e-3, "graph_s": None, "kernels_s": 2e-3, "read_bytes": 6_700_000_000}
    projected = {"h100": [1e-3, 3e-3, 4e-3]}
    return {"group": group, "name": "rank", "projected": projected, **of_any, **more}


def results():
    """Of an H100 that is half as fast as it should be in one case."""
    sheet, peak = 3.35e12, 989e12
    tests = [
        {
            "name": "tests.gpu.test_cuda::test_in_float32[plain]",
            "outcome": "passed",
            "error": "1e-7",
        },
        {"name": "tests.gpu.test_cuda::test_in_float32[overlap]", "outcome": "failed"},
        {"name": "tests.gpu.test_cuda::test_several_ranks_on_one_gpu[gloo]", "outcome": "skipped"},
    ]
    cases = [
        case("experts decode, paper, EP 16, ours", sheet, 0, 1.1),
        case("experts decode, paper, EP 16, torch's", sheet, 0, 2.0),
        case("experts decode, paper, EP 16, order", sheet, 0, 0.1),
        case("experts prompt, DeepSeek, ours", 0, peak, 2.0),
    ]
    rows = [
        row("batch 1, a model", graph_s=2.5e-3),
        row("paper EP 16, context 1"),
        row("paper TP 8 × PP 2, context 1"),
        row("paper TP 8 × PP 2, context 1"),
    ]
    summary = {"decode_s": {"median_error": 0.05, "largest_error": 0.2}}
    return {
        "parity": {"status": "failed", "tests": tests},
        "limits": {
            "status": "passed",
            "data": {"bytes_per_s": 3e12, "flops_per_s": 7e14, "cases": cases},
        },
        "one_rank": {"status": "passed", "data": {"rows": rows}},
        "steps": {"status": "passed", "data": {"summary": summary}},
    }


def test_every_goal_is_answered_in_a_line():
    found = gpu_answers.answers(results(), "NVIDIA H100 80GB HBM3")
    by_name = {each.what: each for each in found}
    assert {each.number for each in found} == set(MUST_SHOW)
    in_float32 = by_name["models in float32 (error)"]
    assert (in_float32.measured, in_float32.is_met) == ("1 of 2, 1.0e-07", False)
    assert by_name["several ranks on one GPU (error)"].is_met is None
    decode = by_name["experts, decode, paper: bandwidth"]
    assert (decode.measured, decode.is_met) == ("91%", True)
    prompts = by_name["experts, prompts, DeepSeek: peak"]
    assert (prompts.measured, prompts.is_met) == ("50%", False)
    assert by_name["experts, prompts, paper: peak"].measured == "not run"
    assert (by_name["batch 1: a model"].measured, by_name["batch 1: a model"].is_met) == (
        "80%",
        True,
    )
    assert by_name["EP 16, context 1, computing, ms"].measured == "2.00, proj. 3.00"
    assert by_name["TP 8 × PP 2, context 1, computing, ms"].measured == "4.00, proj. 6.00"
    steps = by_name["decode: median error, largest"]
    assert (steps.measured, steps.is_met) == ("5.0%, 20.0%", False)
    assert max(len(str(each)) for each in found) <= 80
    assert len(found) <= 40
    verdicts = [str(each).rpartition("  ")[2] for each in found if each.goal]
    assert set(verdicts) == {"met", "MISSED", "-"}


def test_a_rehearsal_judges_no_goal():
    found = gpu_answers.answers(results(), "CPU", is_rehearsal=True)
    judged = [str(each) for each in found if each.is_met is not None]
    assert judged
    assert all(line.endswith("  rehearsed") and len(line) <= 80 for line in judged)
    assert not any(word in str(each) for each in found for word in ("  met", "MISSED"))


def test_without_any_result_nothing_is_met():
    found = gpu_answers.answers({}, "a card without a profile")
    assert {each.is_met for each in found} <= {None, False}
    assert {each.number for each in found} == set(MUST_SHOW)


def test_what_waits_is_run_by_a_part_and_its_tests_are_there(gpu):
    listed = gpu_answers.waiting()
    assert len(listed) >= 15
    parts = {part.name for part in gpu.PARTS}
    assert parts == {part for _, part, _ in listed}
    names = [
        f"{path.stem}::{name}"
        for path in (ROOT / "tests" / "gpu").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    ]
    known = [word for _, _, words in listed for word in words.split(", ") if word]
    for name in names:
        of_benchmarks = name.startswith(("test_script::", "test_one_rank::"))
        assert of_benchmarks or any(word in name for word in known), f"{name} is in no line"
    for what, part, words in listed:
        for word in filter(None, words.split(", ")):
            assert part == "kernels" or any(word in name for name in names), what
