from collections.abc import Sequence
from typing import NamedTuple

import pytest

from cli.screen import telling, tells
from expertlane.cost.throughput import Goals
from expertlane.errors import UserError
from expertlane.planner.candidates import family_of
from expertlane.planner.ranking import best_of_families, contender, gap_to, pareto, ranked
from expertlane.planner.screen import fitting
from expertlane.planner.two_pools import TwoPools, TwoPoolSearch, _prefill_sizes
from expertlane.spec.layout import Layout
from expertlane.spec.workload import Workload
from planner.requests import MIXED, PAPER, WORKLOAD, planned, request_of, search_of


@pytest.fixture(scope="module")
def found():
    return planned(search_of())


def test_the_best_comes_first_and_is_projected_in_full(found):
    tps = [each.tps for each in found.finalists]
    assert tps == sorted(tps, reverse=True)
    best = found.finalists[0]
    assert best.decode.num_tokens == best.num_seqs
    assert best.decode.wall_s.low <= best.decode.wall_s.value <= best.decode.wall_s.high
    assert sum(best.decode.shares.values()) == pytest.approx(1)
    assert best.tps == pytest.approx(max(option.tps for option in found.options), rel=0.1)


def test_no_option_beats_the_pareto_front(found):
    front = [
        (option.served.tpot_s[1, place], option.served.tps[1, place])
        for option, place in pareto(found.options)
    ]
    assert front == sorted(front)
    for option in found.options:
        for tpot, tps in zip(option.served.tpot_s[1], option.served.tps[1], strict=True):
            assert any(a <= tpot and b >= tps for a, b in front)


@pytest.fixture(scope="module")
def ranking(found):
    return ranked([contender(each, WORKLOAD) for each in found.finalists], Goals())


def test_each_family_has_one_best(found, ranking):
    families = best_of_families(ranking)
    assert next(iter(families.values())) is ranking.chosen
    assert set(families) == {family_of(each.candidate.layout) for each in found.finalists}
    assert family_of(Layout.parse("replicas=2,pp=2,dp=2,ep=2")) == (
        "expert parallel, data-parallel attention, pipeline"
    )
    assert family_of(Layout.parse("tp=8")) == "no expert parallelism"


def test_gaps_of_what_does_not_tie_are_explained(ranking):
    slower = ranking.contenders[ranking.num_tied :]
    assert slower
    for each in slower:
        assert gap_to(ranking.chosen, each, WORKLOAD).startswith("µs per token: ")


def test_a_limit_that_nothing_keeps_names_the_nearest():
    with pytest.raises(UserError, match=telling("h100x4 nearest")) as e:
        planned(search_of(goals=Goals(max_tpot_s=1e-6)))
    assert "misses the TPOT limit of 0.001 ms with " in str(e.value)


def test_one_sequence_is_not_many():
    alone = Workload(1, 512, 128)
    with pytest.raises(UserError, match=telling("1 sequence misses TPOT")) as e:
        planned(search_of(workload=alone, goals=Goals(max_tpot_s=1e-6, max_ttft_s=10)))
    assert tells(str(e.value), "meets TTFT 10000 ms")


def test_a_model_that_fits_nowhere_says_by_how_much():
    huge = PAPER.with_overrides(num_hidden_layers=64)
    with pytest.raises(UserError, match=telling("h100x4 smallest needs")):
        planned(search_of(huge))


def test_a_number_of_devices_that_no_layout_takes():
    odd = MIXED.with_overrides(num_hidden_layers=1, sliding_window=(), dense_layers=())
    layouts = [str(each.candidate.layout) for each in search_of(odd, 3).screen()]
    assert set(layouts) == {"replicas=3", "dp=3", "dp=3,ep=3"}  # attention is never cut in three


@pytest.mark.smoke(1)
@pytest.mark.parametrize("num_sequences", [1, 3, 5])
def test_no_more_sequences_at_once_than_asked(num_sequences):
    workload = Workload(num_sequences, 512, 128)
    found = planned(search_of(PAPER, 8, workload))
    assert max(option.steps.num_seqs.max() for option in found.options) == num_sequences
    for each in found.finalists:
        assert each.num_seqs == each.decode.num_tokens <= num_sequences
        assert each.prefill.num_tokens <= num_sequences * workload.prompt_len
        assert each.tps <= 1.05 * each.num_seqs / each.decode.round_s.value


def test_a_sequence_alone_is_served_by_tensor_parallelism():
    found = planned(search_of(PAPER, 8, Workload(1, 1024, 256)))
    assert found.finalists[0].option.candidate.layout.dp == 1
    assert found.finalists[0].option.candidate.layout.replicas == 1


@pytest.mark.parametrize(
    ("model", "num_devices", "goals", "why"),
    [
        (MIXED, 1, Goals(), "no split"),
        (PAPER.with_overrides(num_hidden_layers=48), 4, Goals(), "too large"),
        (MIXED, 4, Goals(max_tpot_s=1e-6), "over limits"),
    ],
)
def test_why_there_are_no_two_pools(model, num_devices, goals, why):
    assert TwoPoolSearch(request_of(model, num_devices, goals=goals)).run() == why


@pytest.mark.parametrize(
    ("num_devices", "expected"),
    [
        (8, {2, 4, 6}),
        (96, set(range(8, 96, 8))),
        (104, set(range(8, 104, 8))),
        (128, set(range(8, 128, 8))),
        (4096, {part * 512 for part in range(1, 8)}),
    ],
)
def test_pools_are_of_whole_nodes(num_devices, expected):
    assert _prefill_sizes(num_devices, 8) == expected


@pytest.mark.smoke(1)
@pytest.mark.parametrize(("num_sequences", "prompt_len"), [(32, 4096), (4096, 512), (4096, 8192)])
def test_the_best_split_is_found_without_trying_all(num_sequences, prompt_len, monkeypatch):
    """Of eight nodes; pairs by the formula, none simulated."""
    monkeypatch.setattr(
        TwoPoolSearch, "_best_simulated", lambda _, pairs, most: NotSimulated(pairs)
    )
    monkeypatch.setattr("expertlane.planner.two_pools.TwoPools", NotSimulated)
    search = search_of(MIXED, 64, Workload(num_sequences, prompt_len, 256))
    pools = TwoPoolSearch(search.request, search.known, fitting(search.screen()))
    found = pools.run().pairs[0]
    sizes = set(range(8, 64, 8))
    tried = pools._found.keys()
    for place in range(pools.num_splits):
        if place not in tried:
            pools._screen(place, lambda _: None)
    best = pools._pairs_of(range(pools.num_splits))[0]
    assert {size for size, _ in pools._splits} == sizes
    assert found.tps >= 0.99 * best.tps


class NotSimulated(NamedTuple):
    pairs: Sequence[object]


def test_a_cluster_too_large_to_plan_for():
    with pytest.raises(UserError, match=telling("5,000 4,096")):
        search_of(num_devices=5000)


def test_two_pools_share_the_devices():
    search = TwoPoolSearch(request_of(workload=Workload(256, 2048, 64)))
    done: list[int] = []
    pools = search.run(done.append)
    assert isinstance(pools, TwoPools)
    assert sum(done) == search.num_splits == 3
    assert search.num_candidates > 10
    sizes = [each.steps.layout.world_size for each in (pools.prefill, pools.decode)]
    assert sum(sizes) == 4
    assert pools.transfer_s[1] > 0
    assert (
        pools.served.tps[1, 0]
        <= pools.decode.steps.num_seqs[0] / pools.decode.steps.decode_s[1, 0] * 1.001
    )
