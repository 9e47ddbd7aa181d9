import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance import greedy_yardstick as yardstick
from cli.screen import telling
from expertlane.balance.planner import plan_placement
from expertlane.balance.trace import coactivation, cross_node_copies, spread_sources
from expertlane.errors import SpecError
from expertlane.spec.layout import partition


@st.composite
def problems(draw):
    num_experts = draw(st.integers(1, 16))
    num_nodes, ranks_per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    ep = num_nodes * ranks_per_node
    num_redundant = draw(st.integers(0, min(num_experts * (ep - 1), 24)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skew = draw(st.sampled_from([0.0, 0.7, 1.5, 4.0]))
    popularity = rng.permuted(np.tile(np.arange(1, num_experts + 1.0) ** -skew, (2, 1)), axis=1)
    load = rng.poisson(draw(st.sampled_from([0, 1, 30, 10_000])) * popularity)
    return load, ep, ranks_per_node, num_redundant, rng


def maxima(placements, load, ranks_per_node):
    return [
        each.rank_loads(of_layer, ranks_per_node).max()
        for each, of_layer in zip(placements, load, strict=True)
    ]


def topics(rng, num_experts):
    together = rng.integers(0, 50, size=(2, num_experts, num_experts))
    together += np.swapaxes(together, 1, 2)
    together[:, np.arange(num_experts), np.arange(num_experts)] = 0
    return together.astype(np.float32)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(problems())
def test_every_plan_is_a_placement_with_near_equal_slots(problem):
    load, ep, ranks_per_node, num_redundant, rng = problem
    num_experts = load.shape[1]
    num_slots = max(num_experts + num_redundant, ep)
    for together in (None, topics(rng, num_experts)):
        plan = plan_placement(load, ep, ranks_per_node, num_redundant, together)
        assert len(plan) == 2
        for placement in plan:  # that no expert is missing or twice on a rank, it checks itself
            slots = list(map(len, placement.experts_of_rank))
            assert slots == list(map(len, partition(num_slots, ep)))
            assert max(map(len, placement.ranks_of_experts())) <= ep


@settings(derandomize=True, deadline=None, max_examples=100)
@given(problems())
def test_it_is_as_even_as_the_greedy_algorithm_or_more(problem):
    load, ep, ranks_per_node, num_redundant, rng = problem
    num_experts = load.shape[1]
    num_slots = num_experts + num_redundant
    num_nodes = ep // ranks_per_node
    if not yardstick.can_run(num_experts, ep, num_slots, 1, 1):
        return
    plans = [
        plan_placement(load, ep, ranks_per_node, num_redundant),
        plan_placement(load, ep, ranks_per_node, num_redundant, topics(rng, num_experts)),
    ]
    for layer, of_layer in enumerate(load.astype(float)):
        greedy = [yardstick.global_plan(of_layer, ep, num_slots)]
        if yardstick.can_run(num_experts, ep, num_slots, num_nodes, num_nodes):
            greedy.append(
                yardstick.hierarchical_plan(of_layer, ep, num_slots, num_nodes, num_nodes)
            )
        reached = [
            yardstick.sender_max_over_mean(plan, of_layer, ranks_per_node) for plan in greedy
        ]
        for plan in plans:
            loads = plan[layer].rank_loads(of_layer, ranks_per_node)
            if loads.any():
                assert loads.max() / loads.mean() <= min(reached) * (1 + 1e-6)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(problems())
def test_even_enough_is_as_even_as_asked_where_that_can_be(problem):
    load, ep, ranks_per_node, num_redundant, _ = problem
    best = maxima(plan_placement(load, ep, ranks_per_node, num_redundant), load, ranks_per_node)
    enough = plan_placement(load, ep, ranks_per_node, num_redundant, even=1.2)
    reached = np.array(maxima(enough, load, ranks_per_node))
    allowed = np.maximum(1.2 * load.sum(axis=1) / ep, best)
    assert (reached <= allowed * (1 + 1e-6)).all()


def test_two_by_hand():
    # A hot expert on both ranks, the others shared out evenly.
    (placement,) = plan_placement(
        np.array([[12, 5, 4, 3, 2]]), ep=2, ranks_per_node=2, num_redundant=1
    )
    assert sorted(placement.ranks_of_experts()[0]) == [0, 1]
    np.testing.assert_array_equal(placement.rank_loads([12, 5, 4, 3, 2], 2), [13, 13])


def test_a_swap_mends_what_greedy_packing_cannot():
    # Heaviest first gives 8 + 6 + 5 and 7 + 6 + 4 where 18 and 18 can be had: 8 + 6 + 4.
    load = np.array([[8, 7, 6, 6, 5, 4]])
    (placement,) = plan_placement(load, ep=2, ranks_per_node=2, num_redundant=0)
    np.testing.assert_array_equal(placement.rank_loads(load[0], 2), [18, 18])


def test_copies_of_an_expert_spread_over_nodes():
    load = np.array([[90, 10, 10, 10, 10, 10, 10, 10]])
    (placement,) = plan_placement(load, ep=8, ranks_per_node=4, num_redundant=8)
    nodes = [rank // 4 for rank in placement.ranks_of_experts()[0]]
    assert nodes.count(0) == nodes.count(1)


def test_no_node_holds_more_copies_than_another():
    # By copies alone 60 calls for three; on two nodes two of them would take a quarter each, and
    # the third one half.
    load = np.array([[60, 20, 20, 20]])
    (placement,) = plan_placement(load, ep=4, ranks_per_node=2, num_redundant=2)
    loads = placement.rank_loads(load[0], 2)
    of_copies = [len(ranks) for ranks in placement.ranks_of_experts()]
    assert of_copies[0] in (2, 4)
    assert loads.max() == 30


def test_experts_chosen_together_meet_on_a_node():
    # Tokens choose two even experts or two odd ones; all loads are equal.
    rng = np.random.default_rng(0)
    ids = 2 * np.array([rng.permutation(8)[:2] for _ in range(4000)])
    ids += rng.integers(2, size=(4000, 1))
    load = np.bincount(ids.ravel(), minlength=16)[None]
    plain = plan_placement(load, ep=8, ranks_per_node=4, num_redundant=0)
    local = plan_placement(load, 8, 4, 0, [coactivation(ids, 16)])
    source = spread_sources(len(ids), 2)
    crossings = [cross_node_copies(ids, plan[0], 4, source) for plan in (plain, local)]
    assert crossings[1] < 0.8 * crossings[0]
    assert maxima(local, load, 4)[0] <= 1.005 * maxima(plain, load, 4)[0]


def test_no_load_no_layer_one_of_each():
    assert plan_placement(np.zeros((0, 4)), 2, 1, 0) == []
    for placement in plan_placement(np.zeros((2, 4), dtype=np.int64), 2, 1, 2):
        assert placement.num_slots == 6
    (placement,) = plan_placement(np.array([[7]]), ep=1, ranks_per_node=1, num_redundant=0)
    assert placement.experts_of_rank == ((0,),)
    (placement,) = plan_placement(np.array([[7, 1]]), ep=6, ranks_per_node=2, num_redundant=0)
    assert list(map(len, placement.ranks_of_experts())) == [4, 2]  # of 5, nodes share none evenly


@pytest.mark.parametrize(
    ("ep", "ranks_per_node", "num_redundant", "message"),
    [
        (4, 3, 0, "4 ranks nodes 3"),
        (4, 0, 0, "4 ranks nodes 0"),
        (2, 2, 5, "9 experts 2 ranks 4 redundant"),
        (2, 2, -1, "-1 redundant experts 0"),
    ],
)
def test_what_cannot_be_planned(ep, ranks_per_node, num_redundant, message):
    with pytest.raises(SpecError, match=telling(message)):
        plan_placement(np.ones((1, 4)), ep, ranks_per_node, num_redundant)
