"""Nodes on which torchrun started processes: the same command, the same tokens, the same end."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from cli.screen import tells
from engine.ranks.processes import wait_until

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
COMMAND = ["-m", "expertlane", "compare", "four.toml", "--repeat", "2", "--json", "--out", "out"]


def torchrun(num_nodes, num_processes):
    """The commands of torchrun on each node, with logs in the folder where it is started."""
    python = [sys.executable, "-m", "torch.distributed.run", "--log-dir", "torchrun-logs"]
    python += ["--nproc-per-node", str(num_processes)]
    if num_nodes == 1:
        return [[*python, "--standalone"]]
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    nodes = ["--nnodes", str(num_nodes), *place, "--node-rank"]
    return [[*python, *nodes, str(node)] for node in range(num_nodes)]


def start(folder, command):
    """Start a command in `folder`."""
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # torchrun warns where it is not set
    )


def run(folder, *commands, apart_s=0.0):
    """Run commands in `folder` side by side; gives exit code, stdout and stderr of each."""
    (folder / "four.toml").write_text(EXPERIMENT)
    started = []
    for command in commands:
        time.sleep(apart_s if started else 0)
        started.append(start(folder, command))
    try:
        with ThreadPoolExecutor() as pool:  # at once: one that nobody reads from would wait
            outputs = [*pool.map(lambda each: each.communicate(timeout=240), started)]
    finally:
        for each in started:
            each.terminate()  # torchrun ends its processes; no effect on one that has ended
    return [(each.returncode, *output) for each, output in zip(started, outputs, strict=True)]


def sent_bytes(step):
    """By kind; which links they take depends on the nodes."""
    intra, inter = step["traffic"]["by_link"].values()
    return {kind: intra[kind] + inter[kind] for kind in intra}


def errors_in(err):
    return [line for line in err.splitlines() if "expertlane: error:" in line]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Results of local ranks."""
    ((code, out, err),) = run(tmp_path_factory.mktemp("local"), [sys.executable, *COMMAND])
    assert code == 0, err
    return json.loads(out)


@pytest.mark.full
@pytest.mark.parametrize(("num_nodes", "num_processes"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_one_process_speaks_and_results_are_those_of_local_ranks(
    local, tmp_path, num_nodes, num_processes
):
    commands = [[*node, *COMMAND] for node in torchrun(num_nodes, num_processes)]
    (code, out, err), *others = run(tmp_path, *commands)
    assert code == 0, err
    for other in others:
        assert other == (0, "", "")
    assert err.count("written: ") == 1
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["report.html", "report.md", "results.json"]
    machine = json.loads(out)["machine"]
    assert (machine["num_ranks"], machine["ranks_per_node"]) == (4, 4 // num_nodes)
    assert machine["backend"].startswith("shared_memory")
    theirs, ours = json.loads(out)["deployments"], local["deployments"]
    for one, other in zip(theirs, ours, strict=True):
        for key in ("name", "tokens_sha256", "num_tokens_per_expert"):
            assert one[key] == other[key]
        assert one["num_tokens_per_expert"], "counted"
        assert [step["phase"] for step in one["steps"]] == ["prefill", "decode"]
        for step, other_step in zip(one["steps"], other["steps"], strict=True):
            for key in ("flops", "weight_bytes", "kv_bytes", "num_collectives"):
                assert step[key] == other_step[key]
                assert step[key], "counted"
            assert sent_bytes(step) == sent_bytes(other_step)
            assert sent_bytes(step)["payload"] > 0
    assert theirs[0]["tokens_sha256"] == theirs[1]["tokens_sha256"]


LATE = """
import json, os, runpy, sys, time
if __name__ == "__main__":
    time.sleep(json.loads(sys.argv.pop(1))[int(os.environ["RANK"])])
    runpy.run_module("expertlane", run_name="__main__")
"""


@pytest.mark.full
@pytest.mark.parametrize("seed", range(50))
def test_processes_that_come_late(local, tmp_path, seed):
    draw = random.Random(seed)
    num_nodes, num_processes = draw.choice([(1, 4), (2, 1), (2, 2)])
    late = draw.sample(range(num_nodes * num_processes), draw.randrange(1, 3))
    waits_s = [
        draw.uniform(0, 6) if rank in late else 0 for rank in range(num_nodes * num_processes)
    ]
    (tmp_path / "late.py").write_text(LATE)
    command = ["late.py", json.dumps(waits_s), *COMMAND[2:]]
    nodes = [[*node, *command] for node in torchrun(num_nodes, num_processes)]
    draw.shuffle(nodes)  # which one starts first
    results = run(tmp_path, *nodes, apart_s=draw.choice([0, draw.uniform(0, 4)]))
    assert [code for code, _, _ in results] == [0] * num_nodes, results
    (out,) = (out for _, out, _ in results if out)
    for one, other in zip(json.loads(out)["deployments"], local["deployments"], strict=True):
        assert one["tokens_sha256"] == other["tokens_sha256"]


def test_too_few_processes(tmp_path):
    ((_, out, err),) = run(tmp_path, [*torchrun(1, 2)[0], *COMMAND])
    (line,) = errors_in(err)
    assert tells(line, "expertlane: error: 4 ranks torchrun 2 processes node")
    assert out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_all_end_with_torchrun_while_nodes_still_come(tmp_path):
    """Killed so early that they would wait minutes for its store, or for the other node."""
    (tmp_path / "four.toml").write_text(EXPERIMENT)
    agents = [start(tmp_path, [*node, *COMMAND]) for node in torchrun(2, 1)]
    launcher, other = (psutil.Process(agent.pid) for agent in agents)
    try:
        assert wait_until(launcher.children)
        assert wait_until(other.children)
        other.children()[0].suspend()
        processes = launcher.children(recursive=True)
        agents[0].kill()
        assert not psutil.wait_procs(processes, timeout=60)[1]
    finally:
        for each in other.children():
            each.kill()
        for agent in agents:
            agent.kill()
            agent.communicate()
