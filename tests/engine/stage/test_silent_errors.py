"""`--check`: planted errors are found, and named by step, layer, place and rank."""

import re
from dataclasses import replace

import numpy as np
import pytest

from cli.screen import telling, tells
from distributed.on_ranks import local_ranks
from distributed.running import deployment, runner_on
from engine.elastic.recovering import facts, record_of
from engine.stage.planted import FlipBit, Plant
from expertlane.engine import llm as llm_module
from expertlane.engine.llm import LLM
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import RankError, RanksLostError
from expertlane.results.step_checks import Alike, RankChecks, first_found
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler, drive
from expertlane.spec.model import PRESETS
from expertlane.spec.names import CheckPoint
from expertlane.spec.sampling import SamplingParams

TINY = PRESETS["paper-tiny"]
GREEDY = SamplingParams(temperature=0, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.8, frequency_penalty=0.3)
LIMITS = Limits(TINY.vocab_size, 64, num_blocks=64, block_size=4, max_num_seqs=8)
NOT_ONCE = "1 of 10 tokens did not get exactly one result from each of their experts"


class Lenient:
    """A pool whose ranks live on where a check has failed: the next test has others to find."""

    def __init__(self, pool):
        self._pool = pool

    def __getattr__(self, name):
        return getattr(self._pool, name)

    def lose(self, loss):
        raise loss.error(recovers=True)


class Deployed:
    """A deployment with two requests a data-parallel rank."""

    def __init__(self, pools, layout, level, dtype="float32", **options):
        self.chosen = deployment(layout, **options)
        self.pool = Lenient(pools.pool(self.chosen.layout.world_size, dtype))
        self.runner = runner_on(self.pool, TINY, self.chosen, LIMITS, ranks_per_node=2, check=level)

    def run(self, params=GREEDY):
        layout = self.chosen.layout
        scheduler = ContinuousScheduler(layout, self.chosen.options, LIMITS, record=False)
        requests = []
        for number in range(2 * layout.dp):
            prompt = np.arange(number, number + 5)
            sampling = params if params.needs_logits else None
            requests.append(
                Request(str(number), prompt, max_tokens=3, sampling=sampling, sampling_seed=number)
            )
            scheduler.add(requests[-1])
        list(drive(scheduler, self.runner))
        return [request.output_token_ids for request in requests]

    def planted(self, kind, rank, params=GREEDY):
        """The error that a planted one leads to."""
        self.pool.call(Plant(kind, rank))
        try:
            with pytest.raises(RanksLostError) as caught:
                self.run(params)
        finally:
            self.pool.call(Plant("", 0))
        return str(caught.value), tuple(sorted(caught.value.ranks))


FINITE = "rank {} step 0 layer 1 {} 5 values finite"
DIFFER = "ranks 0 1 differ step 0 {}"


@pytest.mark.parametrize(
    ("layout", "level", "kind", "rank", "line", "ranks", "options"),
    [
        ("tp=1", "light", "attention", 0, FINITE.format(0, "after attention"), (0,), {}),
        ("tp=2", "light", "attention", 1, FINITE.format(1, "attention"), (1,), {}),
        ("dp=2,ep=2", "light", "experts", 1, FINITE.format(1, "experts"), (1,), {}),
        ("pp=2,dp=2,ep=2", "light", "attention", 1, FINITE.format(1, "after attention"), (1,), {}),
        ("tp=2", "light", "gathered", 1, DIFFER.format("layer 1 before attention"), (0, 1), {}),
        ("dp=2,ep=2", "light", "placement", 0, DIFFER.format("layer 1 placement"), (0, 1), {}),
        (
            *("tp=4,ep=4", "light", "gathered", 2),
            "rank 2 differs ranks 0 1 3 step 0 layer 1 before attention",
            *((2,), {}),
        ),
        (
            *("dp=2,ep=2", "full", "sent", 1),
            "rank 0 1 changed transfer step layer dispatch",
            *((0, 1), {}),
        ),
        (
            *("dp=2,ep=2", "full", "kept", 1),
            "rank 1 step 0 layer dispatch 10 rows changed transfer",
            *((1,), {}),
        ),
        (
            *("pp=2", "full", "handed over", 1),
            "rank 0 1 changed transfer step layer PP send/recv",
            *((0, 1), {}),
        ),
        (
            *("dp=2,ep=2", "full", "twice", 1),
            "rank 0 step layer dispatch token rank 1 arrived 2",
            *((0,), {}),
        ),
        ("dp=2,ep=2", "full", "lost", 1, f"rank 1 step 0 layer combine {NOT_ONCE}", (1,), {}),
    ],
)
def test_planted_errors_are_named(pools, layout, level, kind, rank, line, ranks, options):
    deployed = Deployed(pools, layout, level, **options)
    said, found = deployed.planted(kind, rank)
    assert tells(said, line)
    assert found == ranks


@pytest.mark.parametrize(
    ("layout", "form"),
    [("dp=2,ep=2", "all_gather"), ("dp=2,ep=2", "static"), ("dp=4,ep=4", "hierarchical")],
)
def test_a_pair_that_goes_nowhere(pools, layout, form):
    deployed = Deployed(pools, layout, "full", dispatch=form)
    line, ranks = deployed.planted("dropped", 1)
    found = re.search(r"(\d+) tokens .* expert \d+\b.* (\d+) arrived", line)
    assert tells(line, "step 0 layer 1 dispatch")
    assert int(found[1]) == int(found[2]) + 1
    assert ranks == tuple(range(deployed.chosen.layout.world_size))


@pytest.mark.parametrize(("kind", "place"), [("sampler", "tokens"), ("counts", "sampler")])
def test_samplers_that_differ(pools, kind, place):
    deployed = Deployed(pools, "tp=2", "light")
    said, found = deployed.planted(kind, 1, DRAWN)
    assert tells(said, DIFFER.format(place))
    assert found == (0, 1)


def test_a_copy_with_a_flipped_bit(pools):
    """Found on demand by what was loaded; at a start, by the other copies."""
    deployed = Deployed(pools, "dp=3,ep=3", "light", num_redundant_experts=16)
    deployed.runner.checking.check_weights()
    deployed.pool.call(FlipBit(1, 0, 3), ranks=range(3))
    holders = [
        rank
        for rank, held in enumerate(deployed.runner.arranged.now.placements[0][0].experts_of_rank)
        if 3 in held
    ]
    assert len(holders) == 2
    assert 1 in holders
    with pytest.raises(RanksLostError) as caught:
        deployed.runner.checking.check_weights()
    assert tells(str(caught.value), "rank 1 weights layer 0 expert 3 changed")
    assert caught.value.ranks == {1}
    with pytest.raises(RanksLostError) as caught:  # ranks keep what they have
        Deployed(pools, "dp=3,ep=3", "light", num_redundant_experts=16)
    first, second = holders
    assert tells(str(caught.value), f"ranks {first} {second} weights layer 0 expert 3 same")
    deployed.pool.call(FlipBit(1, 0, 3), ranks=range(3))
    deployed.runner.checking.check_weights()


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("layout", "dtype", "options"),
    [
        ("tp=1", "float32", {}),
        ("dp=2,tp=2,ep=2", "float32", {}),
        ("pp=2,dp=2,ep=2", "float32", {}),
        ("dp=3", "float32", {}),
        ("dp=3,ep=3", "float32", {"payload": "float8"}),
        ("dp=2,ep=2", "bfloat16", {}),
    ],
)
def test_tokens_are_the_same_and_nothing_is_wrong(pools, layout, dtype, options):
    deployed = (
        Deployed(pools, layout, level, dtype, **options) for level in ("off", "light", "full")
    )
    found = [each.run(DRAWN) for each in deployed]
    assert found[0] == found[1] == found[2]


def test_an_error_ends_the_ranks(monkeypatch):
    def spoil(runner, handle):
        handle.ticket.results[0].checks = RankChecks(
            np.array([[0, 1, CheckPoint.EXPERTS]]),
            ["1 value is not finite"],
            *([], 0, np.zeros(0, int), np.zeros((0, 16), int), np.zeros((0, 16), int)),
        )
        return collect(runner, handle)

    collect = ModelRunner.collect
    with LLM("paper-tiny", dtype="float32", check="light") as llm:
        llm.check_weights()
        monkeypatch.setattr(ModelRunner, "collect", spoil)
        line = telling("rank 0 step layer 1 experts value finite ended")
        with pytest.raises(RankError, match=line):
            llm.generate([[1, 2]], GREEDY)
        assert llm._pool.is_closed


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("layout", "level", "kind", "lost"),
    [
        ("tp=2", "light", "attention", [1]),
        ("tp=2", "light", "gathered", [0, 1]),  # nothing tells which of two is right
        ("dp=2,ep=2", "full", "lost", [1]),
    ],
)
def test_ranks_that_compute_something_wrong_are_replaced(monkeypatch, layout, level, kind, lost):
    def start(config):
        given = config.layout.world_size, config.timeout_s, config.dtype
        return RankPool(local_ranks(*given, recovers=True), config.timeout_s)

    monkeypatch.setattr(llm_module, "start_pool", start)
    given = {"dtype": "float32", "num_blocks": 64, "block_size": 4, "max_num_seqs": 4}
    with LLM("paper-tiny", layout=layout, check=level, on_failure="replace", **given) as llm:
        expected = facts(llm)
        llm._pool.call(Plant(kind, 1))
        assert facts(llm) == expected
        record = record_of(llm)
        assert record.ranks == lost
        assert ", layer 1, " in record.line
        llm._pool.call(FlipBit(1, 0, 9), ranks=[1])
        llm.check_weights()
        record = record_of(llm)
        assert record.ranks == [1]
        assert tells(record.line, "changed")
        assert tells(record.line, "rank 1 weights layer 0 expert 9")
        assert facts(llm) == expected
        assert llm.engine.recovery.num_recoveries == 2


def alike(sums, point=CheckPoint.BEFORE_ATTENTION):
    places = np.array([[0, layer, point] for layer in range(len(sums))]).reshape(-1, 3)
    none = np.zeros(0, dtype=np.int64)
    return RankChecks(
        none.reshape(0, 3),
        [],
        [Alike([4, 5, 6], places, np.array(sums))],
        *(0, none, none.reshape(0, 16), none.reshape(0, 16)),
    )


@pytest.mark.parametrize(
    ("sums", "line"),
    [
        (([1, 2], [1, 2], [1, 2]), None),
        (([], [], []), None),
        (([1, 2], [1, 3], [1, 2]), "rank 5 differs ranks 4 6 step 9 layer 1"),
        (([1, 2], [7, 2], [8, 2]), "ranks 4 5 6 differ step 9 layer 0"),
        (([1, 2], [1, 2], [1]), "ranks 4 5 6 differ step 9 layer 1"),
    ],
)
def test_who_differs(sums, line):
    found = first_found([4, 5, 6], [alike(each) for each in sums])
    if line is None:
        assert found is None
    else:
        assert tells(found.line(9), f"{line} before attention")
