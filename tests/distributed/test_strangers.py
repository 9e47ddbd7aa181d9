"""Strangers connect to the launcher while torchrun's ranks do: the run goes on."""

import os
import signal
import socket
import struct
import subprocess
import sys
from datetime import timedelta

import psutil
import pytest
from torch.distributed import PrefixStore, TCPStore

from engine.processes import wait_until
from expertlane.engine.rendezvous import handshake

NUM_RANKS = 2
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
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS)]
COMMAND = ["-m", "expertlane", "compare", "two.toml", "--out", "out", "--timeout-s", "60"]


class Torchrun:
    """A run that has just begun.

    Attributes:
        place: where its launcher listens for ranks.
        environment: of its ranks.
    """

    def __init__(self, folder):
        (folder / "two.toml").write_text(EXPERIMENT)
        self.process = subprocess.Popen(
            [sys.executable, *TORCHRUN, *COMMAND],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        agent = psutil.Process(self.process.pid)
        assert wait_until(lambda: len(agent.children()) == NUM_RANKS)
        launcher = min(agent.children(), key=lambda child: child.pid)
        listening = []

        def listens():
            found = launcher.net_connections("tcp")
            listening[:] = [each.laddr for each in found if each.status == psutil.CONN_LISTEN]
            return listening

        assert wait_until(listens), "the launcher never listened"
        self.place = tuple(listening[0])
        self.environment = launcher.environ()

    def hash_in_store(self, rank):
        """What anyone can read in torchrun's store, which has no authentication."""
        place = self.environment["MASTER_ADDR"], int(self.environment["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=30))
        return bytes.fromhex(PrefixStore("expertlane-0", store).get(f"rank {rank}").decode())


@pytest.fixture
def torchrun(tmp_path):
    run = Torchrun(tmp_path)
    yield run
    run.process.kill()
    run.process.communicate()


def test_all_end_with_torchrun_while_ranks_still_come(torchrun):
    """Killed so early that its ranks would wait minutes for its store."""
    ranks = psutil.Process(torchrun.process.pid).children(recursive=True)
    os.kill(torchrun.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=15)
    for each in alive:
        each.kill()
    assert not alive


def test_the_run_goes_on(torchrun):
    strangers = [socket.create_connection(torchrun.place) for _ in range(5)]
    _silent, reset, garbage, huge, thief = strangers
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset.close()
    garbage.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(100))
    huge.sendall(struct.pack("<4sIQQ", b"XLM1", 2, 2**63, 2**63) + bytes(100))
    thief.sendall(handshake(1, torchrun.hash_in_store(1)))
    out, err = torchrun.process.communicate(timeout=60)
    assert torchrun.process.returncode == 0, err
    assert "EP 2" in out
    refused = [line for line in err.splitlines() if "refused a connection from" in line]
    said = sorted(line.rpartition(": ")[2] for line in refused)
    at_the_end = [
        line for line in said if line in ("all ranks are connected", "it sent no handshake in time")
    ]
    assert len(at_the_end) == 1  # the silent one
    assert said.count("it sent no valid handshake") == 2
    assert len(refused) == 5, err
    for stranger in strangers:
        stranger.close()
