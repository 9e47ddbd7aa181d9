"""Decode steps as CUDA graphs, and without the host waiting: on a GPU for real.

In a rehearsal, a double records operations (`ops.cuda.replayed`), and nobody refuses a wait.
"""

from contextlib import contextmanager

import pytest
import torch
from one_rank import OneRank

pytest.importorskip("triton")

from engine.test_decode_graphs import play
from expertlane.ops.cuda.graphs import CudaGraphs
from expertlane.spec.layout import Layout
from ops.cuda.near import DEVICE
from ops.cuda.replayed import ReplayedGraphs
from ops.cuda.tiny_models import MODELS

pytestmark = pytest.mark.gpu

HAS_GPU = torch.cuda.is_available()
NUM_STEPS = 3


@contextmanager
def no_waits():
    """Torch raises where the host would wait for the GPU."""
    if not HAS_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", MODELS)
def test_graphs_on_and_off_are_equal(name, monkeypatch):
    """Batches grow, shrink and finish; some sequences are sampled."""
    graphs = CudaGraphs() if HAS_GPU else ReplayedGraphs()
    expected, *_ = play(MODELS[name], None, monkeypatch)
    found, *_, runner = play(MODELS[name], graphs, monkeypatch)
    assert found == expected
    assert runner.num_decodes > 5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["tp=1", "dp=4,ep=4", "tp=2"])
def test_no_sync_in_decode(name, layout):
    """Of one rank, transfers left out: eager steps in the form of graphs, and graphs."""
    with torch.inference_mode():
        one = OneRank(MODELS[name], Layout.parse(layout), 0, torch.float32, DEVICE)
        steps = [one.step(4, 6, 1, one.form_of_graphs)]
        if (replay := one.graph_step(4, 6)) is not None:
            steps.append(replay)
        assert len(steps) == 1 + HAS_GPU
        for step in steps:
            step()  # compiles, and records
            with no_waits():
                for _ in range(NUM_STEPS):
                    step()
