"""What launches on a GPU depend on, beside the numbers that they are given."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from expertlane.ops.cuda import attention, grouped, permute, splits
from expertlane.ops.cuda import graphs as module
from expertlane.ops.cuda.graphs import CudaGraphs

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        (attention._attention_kernel, {"num_seqs", "num_tokens", "table_width"}),
        (attention._combine_kernel, {"num_rows", "num_splits"}),
        (grouped._grouped_kernel, {"num_rows"}),
        (grouped._sum_kernel, {"num_rows", "num_splits"}),
        (permute._count_kernel, {"num_pairs", "num_tiles"}),
        (permute._place_kernel, {"num_kept", "num_pairs", "num_tiles"}),
    ],
)
def test_no_kernel_is_compiled_anew_for_the_size_of_a_batch(kernel, sizes):
    if hasattr(kernel, "params"):
        found = {each.name for each in kernel.params if each.do_not_specialize}
    else:  # in the interpreter
        found = {*kernel.kwargs["do_not_specialize"]}
    assert found == sizes <= {*kernel.arg_names}


@pytest.mark.parametrize(("shared_kib", "num_stages"), [(227, 4), (163, 4), (99, 2), (1, 1)])
def test_stages_fit_into_a_cards_shared_memory(shared_kib, num_stages, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_kib << 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    tile = grouped.Tile(16, 128, 128, 4, 4)
    assert splits.stages_within(tile.num_stages, tile.stage_bytes(16, 2), GPU) == num_stages


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    def replay(self):
        pass


def test_graphs_have_another_pool_once_the_last_is_gone(monkeypatch):
    """Torch refuses a pool whose graphs are all gone."""
    pools = []

    @contextmanager
    def graph(captured, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        pools.append(pool)
        yield

    @contextmanager
    def on(stream):
        yield

    handles = iter(range(9))
    double = {
        "graph_pool_handle": lambda: next(handles),
        "Stream": Stream,
        "current_stream": Stream,
        "stream": on,
        "CUDAGraph": Graph,
        "graph": graph,
    }
    for name, each in double.items():
        monkeypatch.setattr(torch.cuda, name, each)
    monkeypatch.setattr(module, "recorded_event", lambda: "event")
    graphs, ran, waited = CudaGraphs(), [], []
    kept = [graphs.capture(lambda: ran.append(1), waited.append) for _ in range(2)]
    kept.pop(0)
    kept.append(graphs.capture(lambda: ran.append(1), waited.append))
    assert pools == [0, 0, 0]
    kept.clear()
    kept = [graphs.capture(lambda: ran.append(1), waited.append) for _ in range(2)]
    assert pools == [0, 0, 0, 1, 1]
    assert len(ran) == 2 * len(pools)
    assert waited == ["event"] * len(pools)
