"""Decode steps as CUDA graphs, and without a wait of the host; only a GPU can run them."""

import time

import pytest
import torch
from one_rank import OneRank

pytest.importorskip("triton")

from engine.ops.cuda.tiny_models import MODELS
from engine.ranks.test_no_wait import ASKED, step_of
from engine.stage.one_rank import stage_of
from engine.stage.test_decode_graphs import difference, limits_of, play, record_all
from expertlane.engine.comm.transport import EpochEndedError
from expertlane.engine.ops.device import CudaGraphs, waits_raise
from expertlane.spec.layout import Layout
from expertlane.spec.sampling import SamplingState

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("name", MODELS)
def test_graphs_on_and_off_are_equal(name, monkeypatch):
    expected, logits, *_ = play(MODELS[name], None, monkeypatch)
    found, others, *_ = play(MODELS[name], CudaGraphs(), monkeypatch)
    assert found == expected
    assert difference(logits, others) <= 1e-5


class Counted(CudaGraphs):
    """Attributes: num_begun: captures."""

    num_begun = 0

    def capture(self, run, until):
        self.num_begun += 1
        return super().capture(run, until)


def test_graphs_recorded_ahead_are_all_that_is_needed(monkeypatch):
    """Recorded again after an epoch that ended in the midst; no step makes a graph any more."""
    graphs, waits = Counted(), []
    expected, logits, *_ = play(MODELS["sinks, window, biases"], None, monkeypatch)

    def end_epoch(event):
        event.synchronize()
        waits.append(event)
        if len(waits) == 2:
            raise EpochEndedError("another epoch has begun")

    def ahead(stage):
        with pytest.raises(EpochEndedError):
            record_all(stage)
        stage.drop_graphs()
        assert record_all(stage) == [1, 1, 1]

    how = {"ahead": ahead, "until": end_epoch}
    found, others, *_ = play(MODELS["sinks, window, biases"], graphs, monkeypatch, **how)
    assert found == expected
    assert difference(logits, others) <= 1e-5
    assert graphs.num_begun == 5
    assert len(waits) > 5  # for the tokens of steps too


def test_a_capture_that_fails_spoils_no_other():
    """Its end fails as well, since a stream that it has forked is not joined."""
    graphs, aside, before = CudaGraphs(), torch.cuda.Stream(), torch.cuda.current_stream()
    x = torch.zeros(4, device="cuda")

    def add():
        x.add_(x.new_ones(4))

    def fail():
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            add()
        if torch.cuda.is_current_stream_capturing():
            raise EpochEndedError("another epoch has begun")
        torch.cuda.current_stream().wait_stream(aside)

    def synchronize(event):
        event.synchronize()

    launches = [graphs.capture(add, synchronize)]
    with pytest.raises(EpochEndedError):
        graphs.capture(fail, synchronize)
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    launches.append(graphs.capture(add, synchronize))
    begun = x.clone()
    for launch in launches:
        launch()
    assert (x - begun).tolist() == [2.0] * 4


def passed(event) -> None:
    while not event.query():
        time.sleep(1e-4)


@pytest.mark.parametrize("has_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("is_sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_waits_for_nothing_but_its_tokens(name, is_sampled, has_graphs, monkeypatch):
    """The second step: in the first one kernels are compiled and graphs recorded."""
    model, num_seqs, device = MODELS[name], 4, torch.device("cuda")
    limits = limits_of(model, num_blocks=12, max_num_seqs=num_seqs)
    graphs = CudaGraphs() if has_graphs else None
    stage = stage_of(model, limits, graphs, monkeypatch, device, torch.float16)
    stage._await_device = passed
    admitted = {}
    if is_sampled:
        empty = torch.empty(0, dtype=torch.int64).numpy()
        admitted = {seq: SamplingState(each, seq, empty, empty) for seq, each in enumerate(ASKED)}
    with torch.inference_mode():
        stage.run(step_of(num_seqs, 0, admitted))
        with waits_raise(device):
            outcome = stage.run(step_of(num_seqs, 1, {}))
    assert [*outcome.token_ids] == [*range(num_seqs)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["dp=4,ep=4", "tp=2"])
def test_no_sync_in_decode_of_a_layout(name, layout):
    """Of one rank, transfers left out: eager steps in the form of graphs, and graphs."""
    with torch.inference_mode():
        one = OneRank(MODELS[name], Layout.parse(layout), 0, torch.float32, torch.device("cuda"))
        for step in (one.step(4, 6, 1, one.form_of_graphs), one.graph_step(4, 6)):
            step()  # compiles, and records
            torch.cuda.synchronize()
            with waits_raise(one.device):
                step()
