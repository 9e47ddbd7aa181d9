"""One rank of the benchmarks, with transfers left out: its graphs do what its steps do.

Without a GPU our kernels run in Triton's interpreter, and a double records operations.
"""

import pytest
import torch
from one_rank import OneRank

pytest.importorskip("triton")

from engine.ops.cuda.near import DEVICE, needs_kernels
from engine.ops.cuda.replayed import ReplayedGraphs
from engine.ranks.rank_threads import pairs_of_a_gpu
from engine.stage.one_rank import KernelsWithGraphs, compute_with
from expertlane.engine.moe.dispatch import Dispatcher
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS

pytestmark = needs_kernels

MODEL = PRESETS["paper-tiny"].with_overrides(
    num_hidden_layers=2, num_attention_heads=4, head_dim=16, num_experts=4
)


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "rank"), [("tp=1", 0), ("dp=4,ep=4", 1), ("tp=2,pp=2", 0), ("tp=2,pp=2", 3)]
)
def test_a_graph_does_what_a_step_does(layout, rank, monkeypatch):
    graphs = ReplayedGraphs()
    compute_with(KernelsWithGraphs(graphs), monkeypatch)
    monkeypatch.setattr(Dispatcher, "_pairs", pairs_of_a_gpu)
    torch.manual_seed(0)
    found = []
    with torch.inference_mode():
        one = OneRank(MODEL, Layout.parse(layout), rank, torch.float32, DEVICE)
        for make in (lambda: one.step(4, 6, 1, one.form_of_graphs), lambda: one.graph_step(4, 6)):
            step = make()
            for cache in one.stage.leave_cache():
                cache.keys.fill_(0.1)
                cache.values.fill_(0.1)
            result = step()
            found.append(result if isinstance(result, torch.Tensor) else result.logits)
    assert graphs.num_replayed == 1
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_experts_have_equally_many_tokens_whichever_rank():
    for rank in (0, 3):
        one = OneRank(MODEL, Layout.parse("dp=4,ep=4"), rank, torch.float32, torch.device("cpu"))
        record = one.record(one.step(6, 2, 1))
        for of_layer in record.num_tokens_per_expert:
            assert of_layer.sum() == of_layer[rank] == 4 * 6 * 2 / 4
