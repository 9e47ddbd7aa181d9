"""Ranks of several nodes: gloo's messages with all receives posted before all sends."""

import threading

import torch
from torch.distributed import HashStore

from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.torch_transport import TorchTransport
from expertlane.engine.comm.transport import Epoch


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
