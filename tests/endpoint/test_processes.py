"""A server's processes: who listens, what is left when it dies, which process is which rank."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from uuid import uuid4

import pytest

from engine.ranks.processes import wait_until
from expertlane.comparison.engines.known import Sglang, Vllm
from expertlane.comparison.server_process import ServerProcess
from expertlane.endpoint import processes as module
from expertlane.endpoint.faults import SignalFault, by_kubectl, by_shell
from expertlane.endpoint.processes import (
    Footprint,
    Process,
    is_here,
    processes,
    rank_process,
    server_at,
)
from expertlane.errors import UserError
from expertlane.spec.layout import Layout

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Listens, shares memory with a child that outlives it, and says when it is ready.
SERVER = """
    import mmap, os, socket, sys, time
    listening = socket.create_server(("127.0.0.1", 0))
    path = sys.argv[1]
    with open(path, "wb") as file:
        file.truncate(8192)
    shared = open(path, "r+b")
    memory = mmap.mmap(shared.fileno(), 8192)
    if os.fork() == 0:
        os.setsid()
    open("ready", "a").write(f"{os.getpid()} {listening.getsockname()[1]}\\n")
    time.sleep(60)
"""


@pytest.fixture
def shm():
    path = Path(f"/dev/shm/drill-{uuid4().hex}")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def server(tmp_path, shm):
    """A server under a guard that lingers; its process, its child, and its port."""
    argv = [sys.executable, "-c", textwrap.dedent(SERVER), str(shm)]
    with ServerProcess(argv, {}, tmp_path) as process:
        ready = tmp_path / "ready"
        assert wait_until(lambda: ready.exists() and ready.read_text().count("\n") == 2)
        process.linger()
        pids = {int(line.split()[0]) for line in ready.read_text().splitlines()}
        port = int(ready.read_text().split()[1])
        root = min(pids, key=lambda pid: processes()[pid].began)
        if processes()[root].parent != process.guard_pid:
            (root,) = (each for each in pids if processes()[each].parent == process.guard_pid)
        (child,) = pids - {root}
        yield root, child, port, process


def test_what_a_dead_server_leaves_is_told(server, shm):
    root, child, port, process = server
    assert server_at(port) == root
    before = Footprint.of(root)
    assert {*before.tree} == {root, child}
    assert before.ports == {port}
    assert before.files == {str(shm)}
    assert before.left() == []
    os.kill(root, signal.SIGKILL)
    assert wait_until(lambda: root not in processes())
    left = {each.kind: each for each in before.left()}
    assert str(child) in left["process"].what
    assert left["port"].what == str(port)
    assert "shared memory" not in left  # the child has it open
    process.stop()
    (only,) = before.left()
    assert (only.kind, only.what, only.num_bytes) == ("shared memory", str(shm), 8192)


def test_a_stopped_process_is_left_where_the_server_goes_on(server):
    root, child, *_ = server
    before = Footprint.of(root)
    os.kill(child, signal.SIGSTOP)
    assert wait_until(lambda: processes()[child].state == "T")
    (left,) = before.left()
    assert left.what.startswith(f"{child} ")
    assert "stopped" in left.what
    os.kill(child, signal.SIGKILL)  # a zombie until its parent waits for it
    assert wait_until(lambda: processes()[child].state == "Z")
    (left,) = before.left()
    assert "not waited for" in left.what


def test_nothing_is_known_of_what_is_not_here():
    assert Footprint.of(None) is None
    assert Footprint.of(2**22) is None
    assert server_at(1) is None


def test_addresses_of_this_machine():
    assert is_here("127.0.0.1")
    assert is_here("localhost")
    assert not is_here("192.0.2.1")  # for documentation
    assert not is_here("no-such-host.invalid")


def made_up(monkeypatch, titles: dict[int, tuple[int, str]]) -> None:
    found = {
        pid: Process(pid, pid, parent, "S", line.split(":")[0], line)
        for pid, (parent, line) in titles.items()
    }
    monkeypatch.setattr(module, "processes", lambda: found)


@pytest.mark.parametrize(
    ("titles", "layout", "ranks"),
    [
        (["VLLM::EngineCore"], "tp=1", [2]),
        (["VLLM::EngineCore", "  VLLM::Worker_TP0", "  VLLM::Worker_TP1"], "tp=2", [3, 4]),
        (["VLLM::EngineCore_DP0", "VLLM::EngineCore_DP1"], "dp=2", [2, 3]),
        (
            [
                "VLLM::EngineCore_DP0",
                *("  VLLM::Worker_DP0_TP0_EP0", "  VLLM::Worker_DP0_TP1_EP1"),
                "VLLM::EngineCore_DP1",
                *("  VLLM::Worker_TP0", "  VLLM::Worker_TP1"),  # its engine says the rest
            ],
            "dp=2,tp=2,ep=4",
            [3, 4, 6, 7],
        ),
        (
            ["VLLM::EngineCore", *(f"  VLLM::Worker_PP{p}_TP{t}" for p in (0, 1) for t in (0, 1))],
            "pp=2,tp=2",
            [3, 4, 5, 6],
        ),
    ],
)
def test_ranks_of_vllm_are_found_by_their_titles(monkeypatch, titles, layout, ranks):
    made_up(monkeypatch, tree_of(titles))
    for rank, pid in enumerate(ranks):
        assert rank_process(1, [Vllm.rank_title], Layout.parse(layout), rank).pid == pid
    with pytest.raises(UserError, match=f"--rank {len(ranks)}"):
        rank_process(1, [Vllm.rank_title], Layout.parse(layout), len(ranks))


def test_the_engine_is_told_by_the_titles_and_a_wrong_layout_is_refused(monkeypatch):
    known = [Vllm.rank_title, Sglang.rank_title]
    made_up(monkeypatch, tree_of([f"sglang::scheduler_TP{each}" for each in range(2)]))
    assert rank_process(1, known, Layout.parse("tp=1"), 1).pid == 3
    made_up(monkeypatch, tree_of(["VLLM::EngineCore_DP0", "VLLM::EngineCore_DP1"]))
    assert rank_process(1, known, Layout.parse("tp=1"), 1).pid == 3
    titles = [f"VLLM::Worker_DP{e // 2}_TP{e % 2}" for e in range(4)]
    made_up(monkeypatch, tree_of(titles))
    with pytest.raises(UserError, match="--layout"):
        rank_process(1, known, Layout.parse("tp=1"), 1)
    assert rank_process(1, known, Layout.parse("dp=2,tp=2"), 2).pid == 4
    made_up(monkeypatch, tree_of(["gunicorn"]))
    with pytest.raises(UserError, match="none were found"):
        rank_process(1, known, Layout.parse("tp=1"), 0)


def tree_of(titles: list[str]) -> dict[int, tuple[int, str]]:
    found, engine = {1: (0, "vllm serve")}, 1
    for pid, title in enumerate(titles, 2):
        is_worker = title.startswith(" ")
        engine = engine if is_worker else pid
        found[pid] = (engine if is_worker else 1, title.strip())
    return found


@pytest.mark.parametrize(
    ("titles", "layout"),
    [
        (["sglang::scheduler_TP0", "sglang::scheduler_TP1"], "tp=2"),
        ([f"sglang::scheduler_DP{each}_TP{each}_EP{each}" for each in (0, 1)], "dp=2,ep=2"),
        ([f"sglang::scheduler_DP{e // 2}_TP{e}" for e in range(4)], "dp=2,tp=2,ep=4"),
        (
            [f"sglang::scheduler_PP{e // 2}_ATTN_CP0_MOE_DP0_TP{e % 2}_EP0" for e in range(4)],
            "pp=2,tp=2",
        ),
        (["sglang::scheduler"], "tp=1"),
    ],
)
def test_ranks_of_sglang_are_numbered_in_their_stage(monkeypatch, titles, layout):
    made_up(monkeypatch, tree_of(titles))
    for rank in range(len(titles)):
        assert rank_process(1, [Sglang.rank_title], Layout.parse(layout), rank).pid == rank + 2


def denied(pid: int, number: int) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_a_signal_goes_to_its_process(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    fault = SignalFault(child.pid, "KILL", "process 4711 (sleep)")
    fault.check()
    fault._send(signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
    with pytest.raises(UserError, match="no process 4711"):
        fault.check()
    monkeypatch.setattr(os, "kill", denied)
    with pytest.raises(UserError, match=r"process 4711 .*belongs to another user"):
        fault.check()
    for pid in (os.getpid(), os.getppid()):
        with pytest.raises(UserError, match="this process"):
            SignalFault(pid, "KILL", "own").check()


def strike(fault):
    import asyncio

    return asyncio.run(fault.strike())


def test_a_command_runs_once_and_is_bounded(tmp_path):
    found = strike(by_shell(f"echo a >> {tmp_path}/runs; echo said", 20))
    assert (found.exit_code, found.printed) == (0, "said")
    assert (tmp_path / "runs").read_text() == "a\n"
    with pytest.raises(UserError, match=r"did not end in 2 s"):
        strike(by_shell(f"echo $$ > {tmp_path}/pid; sleep 600 & sleep 600", 2))
    pid = int((tmp_path / "pid").read_text())
    assert wait_until(lambda: pid not in processes())
    with pytest.raises(UserError, match="exit code 7: no such rank"):
        strike(by_shell("echo no such rank >&2; exit 7", 20))


def test_a_pod_is_deleted_by_kubectl(tmp_path, monkeypatch):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\necho "$@"\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fault = by_kubectl("prod/vllm-0", "KILL", 20)
    fault.check()
    said = strike(fault).printed
    delete = "delete pod vllm-0 --wait=false --request-timeout=20s"
    assert said == f"{delete} --namespace prod --grace-period=0 --force"
    assert strike(by_kubectl("vllm-0", "TERM", 20)).printed == delete
    given = "-n prod vllm-0 --context='a b' --kubeconfig /etc/kube"
    said = strike(by_kubectl(given, "TERM", 20)).printed
    assert said == f"{delete} -n prod --context=a b --kubeconfig /etc/kube"
    for pod in ("", "a/-x", "-x/a", "a b", "a '", "a -n", "a -n --context b", "a --all", "-c b a"):
        with pytest.raises(UserError, match="--kubectl"):
            by_kubectl(pod, "KILL", 20)
    kubectl.write_text(
        '#!/bin/sh\necho "Error from server (NotFound): pods not found" >&2; exit 1\n'
    )
    with pytest.raises(UserError, match=r"kubectl delete pod a .*exit code 1: Error from server"):
        strike(by_kubectl("a", "KILL", 20))
    kubectl.write_text("#!/bin/sh\nsleep 60\n")
    with pytest.raises(UserError, match=r"did not end in 0\.3 s"):
        strike(by_kubectl("a", "KILL", 0.3))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no command 'kubectl'"):
        fault.check()
