"""Ranks that do not compute alike are refused."""

from types import SimpleNamespace

import pytest

from expertlane.engine.launch import describe_ranks
from expertlane.errors import UserError


def pool_of(*kernels):
    machines = [SimpleNamespace(host=f"node{i}", kernels=each) for i, each in enumerate(kernels)]
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
