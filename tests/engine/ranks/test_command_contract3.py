"""Contract 3 from the command line: one line, the exit code, and nothing left behind."""

import re
import signal
import subprocess
import sys
import time

import pytest

from cli.screen import tells
from engine.ranks.processes import RunningRanks

EXPERIMENT = """
name = "long"
[model]
preset = "paper-tiny"
max_position_embeddings = 5000
[workload]
num_sequences = 4
prompt_len = 2
output_len = 4000  # minutes
[[deployments]]
name = "TP 2 × PP 2"
layout = "{layout}"
[[deployments]]
name = "EP 2"
layout = "dp=2,ep=2"
"""
NUM_RANKS = 4
TIMEOUT_S = 3


class Command:
    """`expertlane compare` under way."""

    def __init__(self, folder, layout="tp=2,pp=2"):
        self.out = folder / "out"
        (folder / "long.toml").write_text(EXPERIMENT.format(layout=layout))
        arguments = ["compare", "long.toml", "--out", "out", "--timeout-s", str(TIMEOUT_S)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "expertlane", *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, within_s):
        """Wait for its end: exit code, error lines; all other lines must be of progress."""
        out, err = self.process.communicate(timeout=within_s)
        assert out == ""
        lines = err.splitlines()
        errors = [line for line in lines if not re.fullmatch(r".*: done in \d+\.\d s", line)]
        return self.process.returncode, errors

    def wrote_nothing(self):
        """Whether no result was written, not even a half."""
        return not self.out.exists() or not list(self.out.iterdir())


@pytest.fixture
def command(tmp_path):
    command = Command(tmp_path)
    yield command
    if command.process.poll() is None:
        command.process.kill()
    command.process.communicate()


def test_a_killed_rank(command):
    running = RunningRanks(command.process.pid, NUM_RANKS)
    position = running.stop_in_a_layer(2)
    at_s = time.monotonic()
    running.kill(2)
    code, errors = command.end(within_s=10)
    assert time.monotonic() - at_s < 10
    assert code == 1
    (line,) = errors
    assert tells(line, "rank 2 killed SIGKILL")
    assert tells(line, str(position))
    assert running.are_gone(seconds=60)
    assert command.wrote_nothing()


@pytest.mark.full
def test_a_launcher_that_was_stopped_itself_blames_no_rank(command):
    """As by Ctrl-Z and fg: ranks had nothing to do meanwhile. Then SIGTERM ends it."""
    running = RunningRanks(command.process.pid, NUM_RANKS)
    running.wait_for_step(3)
    command.process.send_signal(signal.SIGSTOP)
    time.sleep(TIMEOUT_S + 1)
    command.process.send_signal(signal.SIGCONT)
    step = running.board.position(0).step
    running.wait_for_step(step + 20)
    command.process.send_signal(signal.SIGTERM)
    code, errors = command.end(within_s=10)
    assert (code, errors) == (143, ["expertlane: error: ended by SIGTERM"])
    assert running.are_gone(seconds=60)
    assert command.wrote_nothing()


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_launcher_is_told_to_end(command, number, code):
    running = RunningRanks(command.process.pid, NUM_RANKS)
    running.wait_for_step(3)
    command.process.send_signal(number)
    ended_with, errors = command.end(within_s=10)
    assert ended_with == code
    assert len(errors) == (0 if number == signal.SIGKILL else 1)
    assert all(line.startswith("expertlane: error: ") for line in errors)
    assert running.are_gone(seconds=60)
    assert command.wrote_nothing()
