"""Ranks of several nodes: gloo's messages with all receives posted before all sends."""

import subprocess
import sys
import threading

import pytest
import torch
from torch.distributed import HashStore

from expertlane.engine.comm.epoch import Epoch
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.torch_transport import TorchTransport

NUM_RANKS = 3
RANK = """
import sys, torch, torch.distributed as dist
from expertlane.engine.comm.epoch import Epoch
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.torch_transport import TorchTransport

rank, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
device, store, epoch = torch.device("cpu"), dist.FileStore(path, size), Epoch(ProgressBoard(1), 0)
transport = TorchTransport(device, store, rank, 60.0, epoch, ranks_per_node=1)
transport.make(tuple(range(size)))
link = transport.link(tuple(range(size)))

def exchange(number):  # rank r sends (r + 2 p + number) % 4 rows to rank p, of which some are none
    num_rows = lambda source, to: (source + 2 * to + number) % 4
    send = [num_rows(rank, to) for to in range(size)]
    receive = [num_rows(source, rank) for source in range(size)]
    value = lambda source, to: 100.0 * number + 10 * source + to
    rows = torch.tensor([[value(rank, to)] * 2 for to in range(size) for _ in range(send[to])])
    expected = [[value(s, rank)] * 2 for s in range(size) for _ in range(receive[s])]
    received = torch.full((sum(receive), 2), -1.0)
    work = link.all_to_all(rows.reshape(-1, 2), send, received, receive)
    return work, received, expected, rows

for begun in (1, 3):  # how many are under way at once
    under_way = [exchange(number) for number in range(begun * 2)]
    for work, received, expected, _ in under_way:
        work.wait()
        assert received.tolist() == expected, (received, expected)
transport.leave()
"""


@pytest.mark.full
def test_uneven_exchanges_between_nodes(tmp_path):
    begin = [sys.executable, "-P", "-c", RANK]
    ranks = [
        subprocess.Popen([*begin, str(rank), str(NUM_RANKS), str(tmp_path / "store")])
        for rank in range(NUM_RANKS)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * NUM_RANKS
    finally:
        for rank in ranks:
            rank.kill()


def test_groups_are_aborted_at_once():
    """One's end waits for the other's, as with nccl where its kernels are queued behind those."""
    both, epoch = threading.Barrier(2), Epoch(ProgressBoard(1), 0)

    class Group:
        def abort(self):
            both.wait(20)

    transport = TorchTransport(torch.device("cpu"), HashStore(), 0, 60.0, epoch, ranks_per_node=1)
    transport._backends = {(0, 1): Group(), (0, 2): Group()}
    transport.leave()
    assert not both.broken
