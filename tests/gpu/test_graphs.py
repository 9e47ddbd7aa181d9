"""Decode steps as CUDA graphs, and without a wait of the host; only a GPU can run them."""

import time

import pytest
import torch
from one_rank import OneRank

pytest.importorskip("triton")

from engine.one_rank import stage_of
from engine.test_decode_graphs import difference, limits_of, play, record_all
from engine.test_no_wait import ASKED, step_of
from expertlane.comm.transport import EpochEndedError
from expertlane.ops.cuda.graphs import CudaGraphs
from expertlane.ops.transfer import waits_raise
from expertlane.spec.layout import Layout
from expertlane.spec.sampling import SamplingState
from ops.cuda.tiny_models import MODELS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("name", MODELS)
def test_graphs_on_and_off_are_equal(name, monkeypatch):
    expected, logits, *_ = play(MODELS[name], None, monkeypatch)
    found, others, *_ = play(MODELS[name], CudaGraphs(), monkeypatch)
    assert found == expected
    assert difference(logits, others) <= 1e-5


def test_graphs_recorded_ahead_are_all_that_is_needed(monkeypatch):
    """Recorded again after an epoch that ended in the midst; no step makes a graph any more."""
    graphs, waits, made = CudaGraphs(), [], []
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
        made.extend(waits)

    how = {"ahead": ahead, "until": end_epoch}
    found, others, *_ = play(MODELS["sinks, window, biases"], graphs, monkeypatch, **how)
    assert found == expected
    assert difference(logits, others) <= 1e-5
    assert len(made) == len(waits) == 5


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
