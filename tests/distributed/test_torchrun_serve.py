"""`serve` on two nodes that torchrun started: the first one answers, and all end together."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import psutil
import pytest

from cli.screen import tells
from engine.ranks.processes import wait_until
from expertlane.engine.llm import LLM
from expertlane.spec.sampling import SamplingParams

WAIT_S = 100.0
PROMPT = [1, 2, 3]
COMMAND = ["serve", "paper-tiny", "--layout", "dp=2,ep=2", "--dtype", "float32", "--port", "0"]
COMMAND += ["--max-num-seqs", "1", "--json", "--rejoin-s", "0"]


class Nodes:
    """A server on two nodes.

    Attributes:
        agents: torchrun's own processes, one a node.
        url: of the first node's front.
    """

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        run += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
        self.errors = [(folder / f"err{node}").open("w+") for node in range(2)]
        self.agents = [
            subprocess.Popen(
                [*run, "--node-rank", str(node), "-m", "expertlane", *COMMAND],
                stdout=subprocess.PIPE,
                stderr=self.errors[node],
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for node in range(2)
        ]
        self._processes = []
        line = self.agents[0].stdout.readline()
        assert line, self.said()
        self.url = json.loads(line)["url"]
        for agent in self.agents:
            self._processes += psutil.Process(agent.pid).children(recursive=True)

    def said(self):
        """Our lines on standard error, of both nodes."""
        for each in self.errors:
            each.flush()
            each.seek(0)
        lines = [line.rstrip("\n") for each in self.errors for line in each]
        return [line for line in lines if "expertlane: error:" in line]

    def end(self, within_s):
        """Exit codes; nothing may be left."""
        codes = [agent.wait(within_s) for agent in self.agents]
        assert not psutil.wait_procs(self._processes, timeout=10)[1]
        return codes

    def close(self):
        for each in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        for agent in self.agents:
            agent.kill()
            agent.communicate()
        for each in self.errors:
            each.close()


@pytest.fixture
def nodes(tmp_path):
    made = Nodes(tmp_path)
    yield made
    made.close()


class Long(threading.Thread):
    """Twenty streams of sixty tokens, one at a time on each rank: seconds."""

    def __init__(self, url):
        super().__init__()
        self.url, self.lines, self.has_begun = url, [], threading.Event()

    def run(self):
        body = {"prompt": PROMPT, "max_tokens": 60, "n": 20, "stream": True, "ignore_eos": True}
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", f"{self.url}/completions", json=body, timeout=WAIT_S) as answer,
        ):
            for line in answer.iter_lines():
                self.lines.append(line)
                self.has_begun.set()

    def reasons(self):
        """Why streams ended; None in all lines but their last."""
        events = [json.loads(line[6:]) for line in self.lines if line.startswith("data: {")]
        return [choice["finish_reason"] for each in events for choice in each["choices"]]


@pytest.mark.full
def test_it_serves_and_drains_when_all_nodes_are_told_to_end(nodes):
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{nodes.url}/completions", json=body, timeout=WAIT_S).json()
    long = Long(nodes.url)
    long.start()
    assert long.has_begun.wait(WAIT_S)
    # The other node first: it must not end what the first one still runs.
    for agent in reversed(nodes.agents):
        agent.send_signal(signal.SIGTERM)

    def is_draining():
        with contextlib.suppress(httpx.HTTPError):
            return httpx.post(f"{nodes.url}/completions", json=body).status_code == 503

    assert wait_until(is_draining)
    long.join(WAIT_S)
    nodes.end(WAIT_S)
    assert long.reasons().count("length") == 20
    assert long.lines[-2] == "data: [DONE]"
    assert nodes.said() == []

    with LLM("paper-tiny", layout="dp=2,ep=2", dtype="float32") as llm:
        (offline,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=8))
    assert answer["choices"][0]["token_ids"] == offline.token_ids


@pytest.mark.full
def test_a_node_that_dies_ends_all_with_one_line(nodes):
    long = Long(nodes.url)
    long.start()
    assert long.has_begun.wait(WAIT_S)
    nodes.agents[1].kill()
    assert nodes.end(within_s=30)[0] != 0
    long.join(WAIT_S)
    assert len(nodes.said()) == 1, nodes.said()
    assert tells(nodes.said()[0], "expertlane: error: node 1 127.0.0.1 gone ranks")


@pytest.mark.full
def test_a_launcher_that_is_killed_ends_all(nodes):
    (launcher,) = psutil.Process(nodes.agents[0].pid).children()
    launcher.kill()
    assert nodes.end(within_s=30)[0] != 0


@pytest.mark.full
def test_a_rank_of_another_node_is_replaced(nodes):
    long = Long(nodes.url)
    long.start()
    assert long.has_begun.wait(WAIT_S)
    (supervisor,) = psutil.Process(nodes.agents[1].pid).children()
    (rank,) = supervisor.children()
    rank.kill()
    long.join(WAIT_S)
    assert long.reasons().count("length") == 20
    assert long.lines[-2] == "data: [DONE]"
    for agent in nodes.agents:
        agent.send_signal(signal.SIGTERM)
    nodes.end(WAIT_S)
    assert nodes.said() == []
