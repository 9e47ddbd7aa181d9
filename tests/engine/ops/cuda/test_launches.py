"""What launches on a GPU depend on, beside the numbers that they are given."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from expertlane.engine.comm.transport import EpochEndedError
from expertlane.engine.ops.cuda import attention, grouped, launch
from expertlane.engine.ops.device import CudaGraphs

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        (attention._attention_kernel, {"num_seqs", "num_tokens", "table_width"}),
        (attention._combine_kernel, {"num_rows", "num_splits"}),
        (grouped._grouped_kernel, {"num_rows"}),
        (grouped._sum_kernel, {"num_rows", "num_splits"}),
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
    assert launch.stages_within(tile.num_stages, tile.stage_bytes(16, 2), GPU) == num_stages


class Stream:
    def __init__(self):
        self.waits_for = []

    def wait_stream(self, other):
        self.waits_for.append(other)


class Graph:
    def replay(self):
        pass


class Event:
    def record(self):
        pass


class Unjoined(RuntimeError):
    """Of a capture that ends while a stream is still forked."""


@pytest.fixture
def torch_graphs(monkeypatch):
    """What torch has for graphs: the pools of captures, streams in use, what was called."""
    told = SimpleNamespace(main=Stream(), pools=[], streams=["main"], calls=[], is_unjoined=False)

    @contextmanager
    def graph(captured, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        told.pools.append(pool)
        told.streams.append("capture")
        try:
            yield
        finally:
            if told.is_unjoined:
                raise Unjoined
            told.streams.pop()

    @contextmanager
    def on(stream):
        before = [*told.streams]
        told.streams.append("side")
        try:
            yield
        finally:
            told.streams[:] = before

    handles = iter(range(9))
    double = {
        "graph_pool_handle": lambda: next(handles),
        "Stream": Stream,
        "current_stream": lambda: told.main,
        "current_device": lambda: 0,
        "stream": on,
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": graph,
    }
    for name, each in double.items():
        monkeypatch.setattr(torch.cuda, name, each)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):

        def call(device, pool, name=name):
            told.calls.append((name, pool))

        monkeypatch.setattr(torch._C, name, call, raising=False)
    return told


def test_graphs_have_another_pool_once_the_last_is_gone(torch_graphs):
    """Torch refuses a pool whose graphs are all gone."""
    graphs, ran, waited = CudaGraphs(), [], []
    kept = [graphs.capture(lambda: ran.append(1), waited.append) for _ in range(2)]
    kept.pop(0)
    kept.append(graphs.capture(lambda: ran.append(1), waited.append))
    assert torch_graphs.pools == [0, 0, 0]
    kept.clear()
    kept = [graphs.capture(lambda: ran.append(1), waited.append) for _ in range(2)]
    assert torch_graphs.pools == [0, 0, 0, 1, 1]
    assert (len(ran), len(waited)) == (10, 5)


@pytest.mark.parametrize("is_unjoined", [False, True])
def test_an_error_in_a_capture_is_the_one_that_is_raised(is_unjoined, torch_graphs):
    graphs, is_first = CudaGraphs(), iter((True, False))
    kept = [graphs.capture(lambda: None, lambda _: None)]
    torch_graphs.is_unjoined = is_unjoined

    def run():
        if not next(is_first):
            raise EpochEndedError("another epoch has begun")

    with pytest.raises(EpochEndedError):
        graphs.capture(run, lambda _: None)
    assert torch_graphs.streams == ["main"]
    ended = [("_cuda_endAllocateToPool", 0), ("_cuda_releasePool", 0)]
    assert torch_graphs.calls == (ended if is_unjoined else [])
    torch_graphs.is_unjoined = False
    kept.append(graphs.capture(lambda: None, lambda _: None))
    assert torch_graphs.pools == [0, 0, 1 if is_unjoined else 0]


def test_a_capture_that_only_its_end_fails_is_an_error(torch_graphs):
    torch_graphs.is_unjoined = True
    with pytest.raises(Unjoined):
        CudaGraphs().capture(lambda: None, lambda _: None)
    assert torch_graphs.streams == ["main"]


def test_what_follows_waits_for_a_call_that_was_given_up(torch_graphs):
    graphs = CudaGraphs()

    def end(event):
        raise EpochEndedError("another epoch has begun")

    with pytest.raises(EpochEndedError):
        graphs.capture(lambda: None, end)
    assert torch_graphs.main.waits_for == [graphs._stream]
    assert (torch_graphs.streams, torch_graphs.pools) == (["main"], [])
