"""Ranks that do not compute alike are refused."""

from types import SimpleNamespace

import pytest

from expertlane.engine.launch import describe_ranks
from expertlane.errors import UserError


def pool_of(*kernels, transports=()):
    machines = [
        SimpleNamespace(host=f"node{i}", kernels=each, backend="gloo")
        for i, each in enumerate(kernels)
    ]
    for machine, transport in zip(machines, transports, strict=False):
        machine.backend = transport
    return SimpleNamespace(call=lambda command: machines)


def test_ranks_that_compute_alike():
    pool = pool_of("torch", "torch (there is no compiler)")
    assert [each.host for each in describe_ranks(pool)] == ["node0", "node1"]


def test_nodes_with_other_kernels_are_refused():
    """Weights of experts that move would be taken for others: silently wrong numbers."""
    with pytest.raises(UserError) as refused:
        describe_ranks(pool_of("expertlane", "expertlane", "torch (this CPU lacks avx512_bf16)"))
    assert str(refused.value) == (
        "rank 0 on node0 computes with expertlane, but rank 2 on node2 with torch (this CPU lacks "
        "avx512_bf16); set EXPERTLANE_BACKEND=torch on all nodes, or make them alike"
    )


def test_ranks_with_other_transports_are_refused():
    """They would wait for each other in vain."""
    transports = "shared_memory", "shared_memory (without compiled code)"
    with pytest.raises(UserError) as refused:
        describe_ranks(pool_of("torch", "torch", transports=transports))
    assert str(refused.value) == (
        "rank 0 exchanges messages by shared_memory, but rank 1 by shared_memory (without compiled "
        "code); set EXPERTLANE_TRANSPORT=gloo on all nodes"
    )
