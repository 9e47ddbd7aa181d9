"""What torchrun's variables say, and what each process that it starts becomes."""

import msgspec
import pytest

from cli.screen import telling
from expertlane.engine import launch
from expertlane.engine.launch import start_pool
from expertlane.engine.ranks import torchrun
from expertlane.engine.ranks.rendezvous import Meeting
from expertlane.engine.ranks.torchrun import SupervisorSettings, TorchrunNode, num_nodes
from expertlane.errors import CapacityError, UserError
from expertlane.spec.engine_config import EngineConfig

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OTHERS = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture
def place(monkeypatch):
    """Set torchrun's variables: rank, world size, local rank, local world size."""

    def put(*numbers, **others):
        for name in _NAMES + _OTHERS:
            monkeypatch.delenv(name, raising=False)
        given = dict(zip(_NAMES, map(str, numbers), strict=True))
        for name, value in (given | {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}).items():
            monkeypatch.setenv(name, value)
        for name, value in others.items():
            monkeypatch.setenv(name, value)

    monkeypatch.delenv("EXPERTLANE_BACKEND", raising=False)  # torch, where kernels are not wanted
    put(0, 1, 0, 1)
    return put


@pytest.mark.parametrize(
    ("numbers", "number", "is_supervisor", "nodes"),
    [
        ((0, 1, 0, 1), 0, True, 1),
        ((3, 4, 3, 4), 0, False, 1),
        ((4, 6, 0, 2), 2, True, 3),
        ((5, 6, 1, 2), 2, False, 3),
    ],
)
def test_where_a_process_is(place, numbers, number, is_supervisor, nodes):
    place(*numbers)
    node = TorchrunNode.from_environment()
    assert (node.number, node.is_supervisor, node.num_nodes) == (number, is_supervisor, nodes)
    assert num_nodes() == nodes
    meeting = Meeting("first", 29500, False, "", nodes)
    assert node.meeting == (meeting if nodes > 1 else None)


def test_without_torchrun_there_is_one_node(monkeypatch):
    for name in _NAMES:
        monkeypatch.delenv(name, raising=False)
    assert num_nodes() == 1


@pytest.mark.parametrize(
    ("numbers", "needed", "num_ranks"),
    [
        ((0, 1, 0, 1), 16, 16),  # one process a node: as many as are needed
        ((0, 2, 0, 1), 16, 8),
        ((0, 3, 0, 1), 16, 6),  # two of them idle
        ((0, 8, 0, 4), 8, 4),  # several: one each
        ((0, 8, 0, 4), 3, 4),
    ],
)
def test_how_many_ranks_a_node_gets(place, numbers, needed, num_ranks):
    place(*numbers)
    assert TorchrunNode.from_environment().num_ranks(needed) == num_ranks


def test_too_few_processes(place):
    place(0, 4, 0, 2)
    with pytest.raises(CapacityError, match=telling("5 ranks 4 processes node")):
        start_pool(EngineConfig(timeout_s=1.0), 5)
    place(2, 4, 0, 2)
    assert start_pool(EngineConfig(timeout_s=1.0), 5) is None  # the first node's says so


def test_other_numbers_of_processes_on_nodes(place):
    place(0, 5, 0, 2)
    with pytest.raises(UserError, match=telling("2 5 node")):
        start_pool(EngineConfig(timeout_s=1.0), 2)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
def test_a_variable_that_is_missing(place, monkeypatch, name):
    place(0, 2, 0, 1)
    monkeypatch.delenv(name)
    with pytest.raises(UserError, match=telling(f"{name} torchrun")):
        start_pool(EngineConfig(timeout_s=1.0), 2)


def test_more_ranks_than_the_machine_should_run(place):
    with pytest.raises(CapacityError, match=telling("10000 ranks cores")):
        start_pool(EngineConfig(timeout_s=1.0), 10_000)


def test_all_processes_but_the_first_of_a_node_leave(place):
    for rank in (1, 3):
        place(rank, 4, 1, 2)
        assert start_pool(EngineConfig(timeout_s=1.0), 4) is None


class _Replaced(Exception):
    pass


@pytest.mark.parametrize(("number", "num_processes"), [(1, 1), (2, 2)])
def test_the_first_process_of_another_node_becomes_its_supervisor(
    place, monkeypatch, number, num_processes
):
    """It is replaced by another program, whose output can't mix with results."""
    place(number * num_processes, 3 * num_processes, 0, num_processes, TORCHELASTIC_RUN_ID="x")
    seen, duplicated = {}, []

    def execve(path, command, environment):
        seen.update(command=command, environment=environment)
        raise _Replaced

    monkeypatch.setattr(torchrun.os, "execve", execve)
    monkeypatch.setattr(torchrun.os, "dup2", lambda *fds: duplicated.append(fds))
    with pytest.raises(_Replaced):
        start_pool(EngineConfig(timeout_s=7.0, dtype="bfloat16", cpu_isa="avx2"), 6)
    settings = msgspec.json.decode(seen["command"][-1], type=SupervisorSettings)
    meeting = TorchrunNode.from_environment().meeting
    assert settings == SupervisorSettings(
        number, 2, meeting, torchrun._PARENT, 7.0, "bfloat16", num_processes > 1
    )
    assert (2, 1) in duplicated
    assert "GOMP_SPINCOUNT" in seen["environment"]
    assert seen["environment"]["EXPERTLANE_CPU_ISA"] == "avx2"


def test_the_launcher_of_one_node_starts_local_ranks(place, monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "LocalRanks", lambda *args, **named: asked.append((*args, named)))
    monkeypatch.setattr(launch, "RankPool", lambda ranks, timeout_s: "pool")
    assert start_pool(EngineConfig(timeout_s=1.0, cpu_isa="avx2"), 2) == "pool"
    assert asked == [(2, 1.0, None, {"cpu_isa": "avx2", "recovers": False})]
