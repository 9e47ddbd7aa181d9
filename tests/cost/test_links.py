"""Hand-made loads whose times are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import Device, LinkSheet, Profile, Term, read_profile
from expertlane.cost.laws.times import Basis, Surface
from expertlane.cost.step.operation import HandOver, RankGroups, Transfer, TransferKind
from expertlane.spec.names import Link, Stage

NVLINK, NIC = 400e9, 50e9
FLOOR = {
    "all_gather.intra_node": 10e-6,
    "all_to_all.intra_node": 8e-6,
    "dispatch.low_latency.intra_node": 15e-6,
    "dispatch.low_latency.inter_node": 20e-6,
    "dispatch.forwarded.inter_node": 40e-6,
}
FORWARDING = 200e9
GROUPED = (TransferKind.ALL_GATHER, TransferKind.REDUCE_SCATTER, TransferKind.ALL_TO_ALL)


def term(value: float) -> Term:
    return Term(value, value / 2, value * 2, Basis.FITTED, "made up")


def exact(variant: str, knots: tuple[float, ...], correction: float = 0.0) -> Surface:
    """The roofline times exp(correction), from 1 kB to 1 GB."""
    axes = {"bytes": (1e3, 1e9), variant: knots}
    table = np.full((2, len(knots)), correction)
    return Surface(axes, table, 0.9, 1.2, Basis.FITTED, "made up")


def profile(*without: str) -> Profile:
    surfaces = {
        name: exact("nodes", (2.0, 4.0)) if "inter" in name else exact("ranks", (2.0, 8.0))
        for name in FLOOR
    }
    terms = {f"floor_s.{name}": term(floor) for name, floor in FLOOR.items()}
    terms["forwarding_bytes_per_s.dispatch"] = term(FORWARDING)
    return Profile(
        name="made up",
        device=Device("made up", 80e9, 3e12, {"bfloat16": 1e15}, "made up"),
        ranks_per_node=2,
        links={Link.INTRA_NODE: LinkSheet(NVLINK, ""), Link.INTER_NODE: LinkSheet(NIC, "")},
        surfaces={name: each for name, each in surfaces.items() if name not in without},
        terms=terms,
    )


def transfer(
    kind: TransferKind,
    sent: np.ndarray,
    node: list[int],
    group: list[int] | None = None,
    stage: Stage = Stage.DISPATCH,
) -> Transfer:
    sent = np.asarray(sent, dtype=np.int64)
    group = group or [0] * len(sent)
    return Transfer(kind, stage, RankGroups(np.array(group), np.array(node)), sent[None])


def evenly(num_ranks: int, num_bytes: int) -> np.ndarray:
    sent = np.full((num_ranks, num_ranks), num_bytes)
    np.fill_diagonal(sent, 0)
    return sent


def test_inside_a_node_floor_and_bytes() -> None:
    times = LinkModel(profile()).times(
        transfer(TransferKind.ALL_GATHER, evenly(4, 1_000_000), [0] * 4)
    )
    assert times.seconds == pytest.approx([10e-6 + 3e6 / NVLINK] * 4)
    assert times.low == pytest.approx(times.seconds * 0.9)
    assert times.high == pytest.approx(times.seconds * 1.2)
    assert times.basis is Basis.FITTED
    assert not times.is_extrapolated.any()


def test_floor_grows_with_peers_and_nodes() -> None:
    made = profile()
    terms = {
        **made.terms,
        "floor_per_peer_s.all_gather.intra_node": term(1e-6),
        "floor_per_doubling_s.dispatch.low_latency.inter_node": term(5e-6),
    }
    model = LinkModel(Profile("", made.device, 2, made.links, made.surfaces, terms))
    gathered = model.times(transfer(TransferKind.ALL_GATHER, evenly(4, 0), [0] * 4))
    assert gathered.seconds == pytest.approx([13e-6] * 4, rel=1e-3)
    flat = model.times(transfer(TransferKind.ALL_TO_ALL, evenly(4, 0), [0, 1, 2, 3]))
    assert flat.seconds == pytest.approx([30e-6] * 4, rel=1e-2)


@pytest.mark.parametrize("kind", list(TransferKind))
def test_group_of_one_takes_nothing(kind: TransferKind) -> None:
    times = LinkModel(profile()).times(transfer(kind, evenly(3, 0), [0, 0, 1], [0, 1, 2]))
    assert times.seconds.tolist() == times.high.tolist() == [0, 0, 0]


def test_hot_receiver_is_slow() -> None:
    sent = np.zeros((4, 4))
    sent[1:, 0] = 4_000_000
    times = LinkModel(profile()).times(
        transfer(TransferKind.ALL_TO_ALL, sent, [0] * 4, stage=Stage.COLLECTIVES)
    )
    assert times.seconds == pytest.approx([8e-6 + 12e6 / NVLINK] + [8e-6 + 4e6 / NVLINK] * 3)


def test_flat_over_two_nodes_takes_the_slower_link() -> None:
    model, node = LinkModel(profile()), [0, 0, 1, 1]
    sent = evenly(4, 1_000_000)
    times = model.times(transfer(TransferKind.ALL_TO_ALL, sent, node))
    assert times.seconds == pytest.approx([20e-6 + 2e6 / NIC] * 4)
    sent[0, 1] = 100_000_000
    times = model.times(transfer(TransferKind.ALL_TO_ALL, sent, node))
    inside = 15e-6 + 100e6 / NVLINK
    assert times.seconds[:2] == pytest.approx([inside] * 2)
    assert times.seconds[2:] == pytest.approx([20e-6 + 2e6 / NIC] * 2)


def hops(num_bytes: int) -> tuple[Transfer, Transfer]:
    node = [0, 0, 1, 1]
    between = np.zeros((4, 4), dtype=np.int64)
    between[[0, 1, 2, 3], [2, 3, 0, 1]] = num_bytes
    inside = np.zeros((4, 4), dtype=np.int64)
    inside[[0, 1, 2, 3], [1, 0, 3, 2]] = num_bytes * 2
    return (
        transfer(TransferKind.ALL_TO_ALL, between, node, [0, 1, 0, 1]),
        transfer(TransferKind.ALL_TO_ALL, inside, node, [0, 0, 1, 1]),
    )


def test_forwarding_is_exposed_where_the_node_is_slower() -> None:
    between, inside = hops(10_000_000)
    inside = transfer(
        TransferKind.ALL_TO_ALL, inside.sent_bytes[0] * 10, [0, 0, 1, 1], [0, 0, 1, 1]
    )
    first, second = LinkModel(profile()).forwarded(between, inside)
    assert first.seconds == pytest.approx([40e-6 + 10e6 / NIC] * 4)
    assert first.seconds + second.seconds == pytest.approx([40e-6 + 200e6 / FORWARDING] * 4)


def test_hops_without_a_law_are_priced_apart() -> None:
    model = LinkModel(profile("dispatch.forwarded.inter_node"))
    between, inside = hops(1_000_000)
    first, second = model.forwarded(between, inside)
    assert first.seconds.tolist() == model.times(between).seconds.tolist()
    assert second.seconds.tolist() == model.times(inside).seconds.tolist()


def test_collective_over_nodes_uses_all_nics_and_is_a_bound() -> None:
    model = LinkModel(profile())
    times = model.times(transfer(TransferKind.ALL_GATHER, evenly(4, 100_000_000), [0, 0, 1, 1]))
    assert times.basis is Basis.BOUND
    # Of 200 MB from the other node, each of the node's two NICs brings half.
    assert (times.seconds > 100e6 / NIC).all()
    assert (times.seconds < 1.5 * 100e6 / NIC).all()
    assert (times.low < times.seconds).all()
    assert (times.seconds < times.high).all()


def test_machine_whose_nodes_share_one_memory() -> None:
    made = profile()
    surfaces = {"all_gather.all_links": exact("ranks", (2.0, 8.0), correction=np.log(2))}
    model = LinkModel(Profile("cpu", made.device, 2, made.links, surfaces))
    times = model.times(transfer(TransferKind.ALL_GATHER, evenly(4, 1_000_000), [0, 0, 1, 1]))
    assert times.seconds == pytest.approx([2 * 3e6 / NVLINK] * 4)


def test_hand_over() -> None:
    sent = np.array([0, 1_000_000, 1_000_000])
    times = LinkModel(profile()).hand_over(HandOver(sent, np.array([True, True, False])))
    assert times.seconds[0] == 0
    assert times.seconds[1] > 1e6 / NIC
    assert times.seconds[2] == pytest.approx(8e-6 + 1e6 / NVLINK)
    assert times.basis is Basis.BOUND


def test_keys_and_values_cross_in_parallel() -> None:
    model = LinkModel(profile())
    together = model.kv_transfer(np.array([8e6]), np.array([1e6] * 8))
    spread = model.kv_transfer(np.array([1e6] * 8), np.array([1e6] * 8))
    assert together.seconds[0] - spread.seconds[0] == pytest.approx(7e6 / NIC / 0.85)
    assert model.kv_transfer(np.zeros(2), np.zeros(2)).seconds.tolist() == [0]


def test_contention_of_kernels() -> None:
    made = profile()
    surfaces = {**made.surfaces, "dispatch.low_latency.inter_node": exact("nodes", (2.0, 4.0))}
    terms = {**made.terms, "contention.all_to_all": term(0.2), "contention.low_latency": term(0.01)}
    model = LinkModel(Profile("", made.device, 2, made.links, surfaces, terms))
    flat = transfer(TransferKind.ALL_TO_ALL, evenly(4, 1000), [0, 0, 1, 1])
    large = transfer(TransferKind.ALL_TO_ALL, evenly(4, 10**9), [0, 0, 1, 1])
    between, inside = hops(1000)
    assert [np.max(model.contention(each, 4)) for each in (flat, large, between, inside)] == [
        0.01,
        0.2,
        0.2,
        0.2,
    ]


@st.composite
def loads(draw: st.DrawFn) -> Transfer:
    num_nodes = draw(st.sampled_from([1, 2, 4, 8]))
    per_node = draw(st.sampled_from([1, 2, 4, 8]))
    size = num_nodes * per_node
    node = np.repeat(np.arange(num_nodes), per_node)
    group = draw(
        st.sampled_from([np.zeros(size), np.arange(size), node, np.arange(size) % per_node])
    )
    scale = 10.0 ** draw(st.integers(0, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    sent = np.random.default_rng(seed).pareto(1, (size, size)) * scale
    sent = np.where(
        (group[:, None] == group) & ~np.eye(size, dtype=bool), np.minimum(sent, 1e12), 0
    )
    kind = draw(st.sampled_from(GROUPED))
    stage = draw(st.sampled_from([Stage.DISPATCH, Stage.COMBINE, Stage.COLLECTIVES]))
    groups = RankGroups(group.astype(np.int64), node)
    return Transfer(kind, stage, groups, sent.astype(np.int64)[None])


def doubled(of: Transfer) -> Transfer:
    return Transfer(of.kind, of.stage, of.groups, of.sent_bytes * 2)


@given(st.lists(loads(), max_size=4))
def test_many_at_once_are_as_one_by_one(transfers: list[Transfer]) -> None:
    model = LinkModel(profile())
    for at_once, each in zip(model.times_of(transfers), transfers, strict=True):
        alone = model.times(each)
        assert at_once.seconds == pytest.approx(alone.seconds)
        assert at_once.high == pytest.approx(alone.high)


@pytest.fixture(scope="module")
def h100() -> Profile:
    return read_profile("h100")


@given(load=loads())
def test_times_are_finite_ordered_and_rise_with_bytes(h100: Profile, load: Transfer) -> None:
    for each in (profile(), h100):
        model = LinkModel(each)
        times = model.times(load)
        assert np.isfinite(times.high).all()
        assert (times.low >= 0).all()
        assert (times.low <= times.seconds).all()
        assert (times.seconds <= times.high).all()
        # Tables are rounded to thousandths.
        assert (model.times(doubled(load)).seconds >= times.seconds * 0.999).all()
