"""Ranks that torchrun started: the same command, the same tokens."""

import json
import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from engine.processes import wait_until
from expertlane.comm.progress import ProgressBoard

EXPERIMENT = """
name = "four"
[model]
preset = "paper-tiny"
[workload]
num_sequences = 9
prompt_len = 5
output_len = 3
[[deployments]]
name = "TP 2 × PP 2"
layout = "tp=2,pp=2"
num_micro_batches = 2
micro_batch_schedule = "rotating"
[[deployments]]
name = "EP 4 + overlap"
layout = "dp=4,ep=4"
overlap = true
"""
COMMAND = ["-m", "expertlane", "compare", "four.toml", "--json", "--out"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def run(folder, *arguments):
    """Run Python in `folder`; gives exit code, stdout and stderr."""
    (folder / "four.toml").write_text(EXPERIMENT)
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # torchrun warns where it is not set
    )
    return finished.returncode, finished.stdout, finished.stderr


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    return folder, *run(folder, *TORCHRUN, "4", *COMMAND, "out")


def test_it_ends_well_and_one_rank_speaks(under_torchrun):
    folder, code, out, err = under_torchrun
    assert code == 0, err
    assert json.loads(out)["machine"]["num_ranks"] == 4
    assert err.count("written: ") == 1
    written = sorted(path.name for path in (folder / "out").iterdir())
    assert written == ["report.html", "report.md", "results.json"]


def test_tokens_and_counters_are_those_of_local_ranks(under_torchrun, tmp_path):
    _, _, out, _ = under_torchrun
    code, local_out, err = run(tmp_path, *COMMAND, "out")
    assert code == 0, err
    theirs, ours = json.loads(out)["deployments"], json.loads(local_out)["deployments"]
    assert len(theirs) == len(ours) == 2
    for one, other in zip(theirs, ours, strict=True):
        for key in ("name", "tokens_sha256", "num_tokens_per_expert"):
            assert one[key] == other[key]
        assert one["num_tokens_per_expert"], "counted"
        assert [step["phase"] for step in one["steps"]] == ["prefill", "decode"]
        for step, other_step in zip(one["steps"], other["steps"], strict=True):
            for key in ("flops", "weight_bytes", "kv_bytes", "num_collectives"):
                assert step[key] == other_step[key]
                assert step[key], "counted"
            assert step["traffic"]["by_link"] == other_step["traffic"]["by_link"]
    assert theirs[0]["tokens_sha256"] == theirs[1]["tokens_sha256"]


def test_too_few_ranks(tmp_path):
    _, out, err = run(tmp_path, *TORCHRUN, "2", *COMMAND, "out")
    errors = [line for line in err.splitlines() if "expertlane: error:" in line]
    assert errors == [
        "expertlane: error: the experiment needs 4 ranks but torchrun started 2; start it with 4 "
        "processes in all"
    ]
    assert out == ""
    assert not (tmp_path / "out").exists()


class LongRun:
    """A run of minutes under torchrun.

    Attributes:
        pids: of the processes that torchrun started, by rank; that of rank 0 is the launcher.
    """

    def __init__(self, folder, num_ranks):
        (folder / "long.toml").write_text(
            EXPERIMENT.replace("output_len = 3", "output_len = 4000").replace(
                'preset = "paper-tiny"', 'preset = "paper-tiny"\nmax_position_embeddings = 5000'
            )
        )
        command = ["-m", "expertlane", "compare", "long.toml", "--out", "out", "--timeout-s", "3"]
        self.process = subprocess.Popen(
            [sys.executable, *TORCHRUN, str(num_ranks), *command],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        agent = psutil.Process(self.process.pid)
        assert wait_until(lambda: len(agent.children()) == num_ranks)
        self.pids = sorted(child.pid for child in agent.children())
        launcher = psutil.Process(self.pids[0])
        assert wait_until(launcher.children)
        self._children = launcher.children()
        # Between fork and exec a child still has its parent's environment.
        assert wait_until(lambda: "EXPERTLANE_FIRST_RANK" in self._children[0].environ())
        told = json.loads(self._children[0].environ()["EXPERTLANE_FIRST_RANK"])["launcher"]
        board = os.open(f"/proc/{told['pid']}/fd/{told['board_fd']}", os.O_RDWR)
        self.board = ProgressBoard(num_ranks, board)
        os.close(board)
        assert wait_until(lambda: self.board.position(0).step >= 3)

    def end(self, within_s):
        """Wait for its end: exit code and our error lines; nothing may be left."""
        _, err = self.process.communicate(timeout=within_s)
        pids = [*self.pids, *(child.pid for child in self._children)]
        assert wait_until(lambda: not any(map(psutil.pid_exists, pids)), seconds=2)
        assert "EOFError" not in err
        errors = [line for line in err.splitlines() if "expertlane: error:" in line]
        return self.process.returncode, errors


@pytest.fixture
def long_run(tmp_path):
    run = LongRun(tmp_path, 4)
    yield run
    if run.process.poll() is None:
        for pid in [*run.pids, run.process.pid]:
            os.kill(pid, signal.SIGKILL)
    run.process.communicate()


def test_a_killed_rank(long_run, tmp_path):
    os.kill(long_run.pids[3], signal.SIGKILL)
    code, errors = long_run.end(within_s=10)
    assert code != 0
    assert len(errors) == 1, errors
    assert re.match(r"expertlane: error: rank 3 is gone in .*stage [a-z-]+; all ranks", errors[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_a_stopped_rank(long_run, tmp_path):
    os.kill(long_run.pids[3], signal.SIGSTOP)
    # torchrun gives its processes 30 s to end before it kills the stopped one.
    code, errors = long_run.end(within_s=3 + 10 + 30)
    assert code != 0
    assert len(errors) == 1, errors
    assert re.match(
        r"expertlane: error: rank 3 hung in .*stage [a-z-]+ \(its process is", errors[0]
    )
    assert not (tmp_path / "out").exists()
