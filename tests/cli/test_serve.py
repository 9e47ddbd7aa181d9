"""`expertlane serve` as a process: what it prints, how it ends, what it refuses."""

import json
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from cli.screen import one_line, tells
from engine.ranks.processes import RunningRanks

WAIT_S = 60.0


class Command:
    """A server of random weights on two ranks."""

    def __init__(self, *options):
        arguments = ["serve", "paper-tiny", "--layout", "dp=2,ep=2", "--port", "0", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "expertlane", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.first = self.process.stdout.readline()

    def end(self):
        out, err = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, out, err


@pytest.fixture
def command():
    made = []

    def make(*options):
        made.append(Command(*options))
        return made[-1]

    yield make
    for each in made:
        if each.process.poll() is None:
            each.process.kill()
        each.process.communicate()


def complete(url, **more):
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "return_token_ids": True} | more
    return httpx.post(f"{url}/completions", json=body, timeout=WAIT_S)


def test_it_says_where_it_is_serves_and_drains(command):
    server = command("--json", "--served-model-name", "mine")
    facts = json.loads(server.first)
    assert facts["model"] == "mine"
    assert facts["layout"] == "dp=2,ep=2"
    assert facts["url"] == f"http://127.0.0.1:{facts['port']}/v1"
    answer = complete(facts["url"], model="mine")
    assert len(answer.json()["choices"][0]["token_ids"]) == 4
    server.process.send_signal(signal.SIGTERM)
    code, out, err = server.end()
    assert (code, out) == (0, "")
    assert "error" not in err


def test_lines_for_people_and_a_rank_that_dies_while_idle(command):
    server = command("--on-failure", "stop")
    assert server.first.startswith("paper-tiny at http://127.0.0.1:")
    lines = [server.process.stdout.readline() for _ in range(3)]
    assert lines[0].startswith("dp=2,ep=2 on 2 ranks; KV cache of ")
    assert re.search(r"http://127.0.0.1:\d+/live\n", lines[1])
    assert lines[2].startswith("Ctrl-C ")
    running = RunningRanks(server.process.pid, 2)
    running.kill(1)
    code, _, err = server.end()
    assert code == 1
    assert tells(err.splitlines()[-1], "rank 1 killed SIGKILL")
    assert running.are_gone(seconds=60)


def test_a_rank_that_dies_is_replaced(command):
    server = command("--json")
    url = json.loads(server.first)["url"]
    before = complete(url, temperature=0).json()["choices"][0]["token_ids"]
    RunningRanks(server.process.pid, 2).kill(1)
    assert complete(url, temperature=0).json()["choices"][0]["token_ids"] == before
    server.process.send_signal(signal.SIGTERM)
    code, _, err = server.end()
    assert code == 0
    assert tells(err, "rank 1 killed SIGKILL")
    assert "\nrecovered in " in err


def test_a_port_that_is_taken_is_noticed_before_anything_is_loaded(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("serve", "paper-tiny", "--port", str(port))
    assert (code, out) == (2, "")
    assert one_line(err, f"127.0.0.1 {port} Address already in use")
