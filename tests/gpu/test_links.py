"""Transfers between GPUs, by nccl and through host memory; skipped where there is no GPU."""

import time

import numpy as np
import pytest
import torch

from cli.screen import telling
from distributed.on_ranks import Collective, Describe, Lose, local_ranks
from distributed.running import run_deployment
from expertlane.engine.comm.clocks import clock_for
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.transport import Epoch, PeerLostError, await_event
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import RankError
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload
from parity.contract import check_contract
from parity.reference import ReferenceModel

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(not NUM_GPUS, reason="no GPU here")
several = pytest.mark.skipif(NUM_GPUS < 2, reason="fewer than two GPUs here")


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
@pytest.mark.parametrize("layout", ["dp=4,ep=4", "tp=2,dp=2,ep=4", "pp=2,tp=2,ep=2"])
def test_contract_1_of_four_ranks_on_shared_gpus(monkeypatch, transport, layout):
    monkeypatch.setenv("EXPERTLANE_TRANSPORT", transport)
    model, workload = PRESETS["paper-tiny"], Workload(5, 7, 6, seed=1)
    reference = ReferenceModel(model, 0).generate(
        workload.prompt_token_ids(model.vocab_size), workload.output_len
    )
    with RankPool(local_ranks(4, 60.0), 60.0) as pool:
        assert pool.call(Describe())[0][-1].endswith(", staged on the host")
        for overlap in (False, True):
            run = run_deployment(
                pool,
                model,
                Deployment("shared", Layout.parse(layout), Options(overlap=overlap)),
                workload,
                forced=reference.tokens,
                return_logits=True,
            )
            check_contract(reference, run.logits, run.tokens)


@several
@pytest.mark.parametrize("counts", [[2, 2], [3, 0], [0, 0], [70_000, 1]])
def test_collectives_of_nccl(counts):
    """Equal, padded, empty, and too uneven for padding."""
    layout = Layout(dp=2, ep=2)
    of_rank = [np.full((num, 4), 1 + rank, dtype=np.float32) for rank, num in enumerate(counts)]
    with RankPool(local_ranks(2, 60.0), 60.0) as pool:
        assert pool.call(Describe())[0][-1] == "nccl"
        gather = Collective(layout, 2, "ep", "all_gather", of_rank, [[counts]] * 2)
        for found, _ in pool.call(gather):
            np.testing.assert_array_equal(found, np.concatenate(of_rank))
        every = [np.full((sum(counts), 4), 1 + rank, dtype=np.float32) for rank in range(2)]
        add = Collective(layout, 2, "ep", "reduce_scatter", every, [[counts]] * 2)
        for (found, _), num in zip(pool.call(add), counts, strict=True):
            np.testing.assert_array_equal(found, np.full((num, 4), 3, dtype=np.float32))


@several
@pytest.mark.parametrize("way", ["kill", "stop"])
def test_a_lost_rank_ends_all(way):
    pool = RankPool(local_ranks(2, 5.0), 5.0)
    pool.call(Describe())
    began_s = time.monotonic()
    with pytest.raises(RankError, match="rank 1"):
        pool.call(Lose({1: way}))
    assert time.monotonic() - began_s < 15
    pool.close()


def test_a_stream_is_timed_and_waited_for():
    device = torch.device("cuda")
    clock, board = clock_for(device), ProgressBoard(1)
    x = torch.randn(4096, 4096, device=device)
    begin = clock.mark()
    for _ in range(50):
        x = x @ x * 1e-3
    end = clock.mark()
    clock.settle()
    assert clock.seconds(begin, end) > 1e-4
    for _ in range(200):
        x = x @ x * 1e-3
    event = torch.cuda.Event()
    event.record()
    with pytest.raises(PeerLostError, match=telling("waited 0 s GPU")):
        await_event(event, Epoch(board, 0), 0.0)
    await_event(event, Epoch(board, 0), 60.0)
    assert event.query()
