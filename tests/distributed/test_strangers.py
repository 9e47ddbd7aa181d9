"""Strangers connect to the launcher while torchrun's other node does: the run goes on."""

import socket
import struct
from datetime import timedelta

import psutil
import pytest
from torch.distributed import PrefixStore, TCPStore

from distributed.test_torchrun import start, torchrun
from engine.ranks.processes import wait_until
from expertlane.engine.ranks.rendezvous import Claim, handshake

EXPERIMENT = """
name = "two"
[model]
preset = "paper-tiny"
[workload]
num_sequences = 3
prompt_len = 5
output_len = 3
[[deployments]]
name = "EP 2"
layout = "dp=2,ep=2"
"""
COMMAND = ["-m", "expertlane", "compare", "two.toml", "--repeat", "2", "--out", "out"]
COMMAND += ["--timeout-s", "60"]


class TwoNodes:
    """A run of two nodes; the other one's process is stopped before it does anything.

    Attributes:
        agents: torchrun's own processes.
        launcher, other: the processes that they have started.
        place: where the launcher listens for nodes.
    """

    def __init__(self, folder):
        (folder / "two.toml").write_text(EXPERIMENT)
        self.agents = [start(folder, [*node, *COMMAND]) for node in torchrun(2, 1)]
        self.launcher, self.other = map(self._process_of, self.agents)
        self.other.suspend()
        listening = []

        def listens():
            found = self.launcher.net_connections("tcp")
            listening[:] = [each.laddr for each in found if each.status == psutil.CONN_LISTEN]
            return listening

        assert wait_until(listens), "the launcher never listened"
        self.place = tuple(listening[0])

    def _process_of(self, agent):
        started = psutil.Process(agent.pid)
        assert wait_until(started.children)
        return started.children()[0]

    def read_store(self, key):
        """What anyone can read in torchrun's store, which has no authentication."""
        environment = self.launcher.environ()
        place = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=60))
        return PrefixStore("expertlane", store).get(key).decode()


@pytest.fixture
def two_nodes(tmp_path):
    run = TwoNodes(tmp_path)
    yield run
    if run.other.is_running():
        run.other.kill()
    for each in run.agents:
        each.kill()
        each.communicate()


@pytest.mark.full
def test_all_end_with_torchrun_while_nodes_still_come(two_nodes):
    """Killed so early that they would wait minutes for its store, or for the other node."""
    processes = psutil.Process(two_nodes.agents[0].pid).children(recursive=True)
    two_nodes.agents[0].kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    for each in alive:
        each.kill()
    assert not alive


@pytest.mark.full
def test_the_run_goes_on(two_nodes):
    strangers = [socket.create_connection(two_nodes.place) for _ in range(4)]
    _silent, reset, garbage, huge = strangers
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset.close()
    garbage.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(100))
    huge.sendall(struct.pack("<4sIQQ", b"XLM1", 2, 2**63, 2**63) + bytes(100))
    two_nodes.read_store("launcher")
    (server,) = two_nodes.launcher.children()
    server.suspend()  # it cannot tell the launcher the hashes: the thief comes first
    two_nodes.other.resume()
    from_store = bytes.fromhex(two_nodes.read_store("node 1"))
    strangers.append(socket.create_connection(two_nodes.place))
    strangers[-1].sendall(handshake(Claim(1, 0, 0), from_store))
    server.resume()
    out, err = two_nodes.agents[0].communicate(timeout=90)
    assert two_nodes.agents[0].returncode == 0, err
    assert "EP 2" in out
    refused = [line for line in err.splitlines() if "refused a connection from" in line]
    at_the_end = [line for line in refused if "are connected" in line or "in time" in line]
    assert len(at_the_end) == 1  # the silent one
    assert sum("valid handshake" in line for line in refused) == 2
    assert len(refused) == 5, err
    for stranger in strangers:
        stranger.close()
