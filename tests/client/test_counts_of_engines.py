"""Requests and tokens on real engines: client, engine's metrics and record count the same."""

from dataclasses import replace

import pytest

from client.vllm_server import checkpoint, dense_checkpoint, vllm
from expertlane.client.connection import Url
from expertlane.client.run import MeasureOptions, Target, measure
from expertlane.client.server import Vocabulary
from expertlane.progress import Progress
from expertlane.spec.workload import LengthRange, Load

pytestmark = [pytest.mark.full, pytest.mark.timeout(1500)]

LOAD = Load(24, LengthRange(33, 60), LengthRange(2, 30), batch=6)
ASKED = MeasureOptions([LOAD], 3, num_rounds=3)


def measured(url, folder, asked=ASKED):
    asked = replace(asked, tokenizer=Vocabulary.of_folder(folder))
    seen = measure([Target(Url.parse(url))], asked, Progress())
    assert seen.unflushed == ()
    return seen.records[0].serving[0]


def check_same(serving, num_ranks=1):
    """Every round, and all together, are counted the same three times."""
    engine, client = serving.engine, serving.client
    assert len(engine.rounds) == client.num_rounds
    assert (client.num_failed, client.num_uncounted) == (0, 0)
    assert (engine.differences, engine.num_others) == ([], 0)
    for both in engine.rounds:
        for name in ("num_requests", "num_prompt_tokens", "num_output_tokens"):
            assert getattr(both.engine, name) == getattr(both.client, name)
            assert getattr(both.engine, name) > 0
    counts = engine.counts
    assert counts.num_requests == serving.num_requests == len(client.requests.numbers)
    assert counts.num_prompt_tokens == serving.num_prompt_tokens
    assert counts.num_prompt_tokens == sum(client.requests.prompt_lens)
    assert counts.num_output_tokens == serving.num_output_tokens
    assert counts.num_output_tokens == sum(client.requests.output_lens)
    assert len(engine.by_rank) == (num_ranks if engine.engine == "vllm" else 0)
    assert engine.gauges is not None


def check_cut_off(url, folder, usual):
    """Requests that end too early for their client count no answer twice, and none is lost."""
    timeout_s = usual.e2e_s.median.value
    asked = replace(ASKED, timeout_s=timeout_s, num_warm_up=0, seed=8)
    serving = measured(url, folder, asked)
    assert serving.client.num_failed > 0
    for both in serving.engine.rounds:
        assert both.engine.num_requests >= both.client.num_requests
        assert both.differences == []
    # And the next rounds agree exactly again.
    check_same(measured(url, folder, replace(ASKED, seed=9)), len(serving.engine.by_rank) or 1)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_vllm(tmp_path, num_ranks):
    """A mixture of experts; two data-parallel ranks of a dense model."""
    (folder := tmp_path / "tiny").mkdir()
    flags = ["--block-size", "32"]  # the smallest that its kernels for CPUs take
    if num_ranks > 1:
        dense_checkpoint(folder)
        flags += ["--data-parallel-size", str(num_ranks)]
    else:
        checkpoint(folder)
    with vllm(folder, *flags, VLLM_SERVER_DEV_MODE="1") as url:
        first = measured(url, folder)
        check_same(first, num_ranks)
        assert first.engine.engine == "vllm"
        assert first.engine.counts.num_cached_tokens == 0
        if num_ranks > 1:
            assert first.engine.max_over_mean is not None
            assert all(each.num_requests for each in first.engine.by_rank.values())
        again = measured(url, folder)  # the same prompts: a warm cache has their beginnings
        check_same(again, num_ranks)
        # A rank has the beginnings of its own requests alone.
        assert again.engine.cached_share > 0.2 / num_ranks
        assert again.num_cached_tokens == again.engine.counts.num_cached_tokens
        flushed = measured(url, folder, replace(ASKED, flushes_caches=True))
        check_same(flushed, num_ranks)
        assert flushed.engine.counts.num_cached_tokens == 0
        check_cut_off(url, folder, first)
