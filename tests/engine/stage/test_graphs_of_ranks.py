"""Decode steps of several ranks as graphs give what steps without graphs give.

Without a GPU a double records operations and collectives, and does them again
(`engine.ranks.rank_threads`).
"""

from contextlib import closing

import pytest

pytest.importorskip("triton")

from engine.ops.cuda.near import needs_kernels
from engine.ops.cuda.tiny_models import MODELS
from engine.ranks.rank_threads import Meeting, RankThreads
from engine.stage.test_decode_graphs import arrivals, difference, drive, limits_of, requests_of
from engine.test_graph_recording import table_of
from expertlane.balance.placement import Move, MovedPart, Placement
from expertlane.spec.deployment import GraphLimits, Options, is_static_on
from expertlane.spec.layout import Layout

pytestmark = needs_kernels

MODEL = MODELS["normed heads, shared expert"].with_overrides(num_hidden_layers=1)
COMES_AT = arrivals(4, rate=0.4)


def play(
    layout,
    options,
    monkeypatch,
    *,
    has_graphs,
    model=MODEL,
    comes_at=COMES_AT,
    max_tokens=6,
    before=(),
):
    """Tokens, logits of each step, and the ranks."""
    layout, limits = Layout.parse(layout), limits_of(model, num_blocks=12)
    ranks = RankThreads(layout, model, limits, options, monkeypatch, has_graphs=has_graphs)
    ranks.before = dict(before)
    requests = requests_of(model, len(comes_at), max_tokens)
    with closing(ranks):
        logits = drive(ranks, layout, options, limits, requests, comes_at)
    return [request.output_token_ids for request in requests], logits, ranks


def assert_equal(layout, options, monkeypatch, **how):
    """Gives the ranks with graphs."""
    with monkeypatch.context() as patch:
        expected, logits, without = play(layout, options, patch, has_graphs=False, **how)
    found, others, ranks = play(layout, options, monkeypatch, has_graphs=True, **how)
    assert found == expected
    assert difference(logits, others) <= 1e-5
    assert ranks.sizes == without.sizes
    for stage, other in zip(ranks.stages, without.stages, strict=True):
        ours, theirs = stage.totals(), other.totals()
        assert ours.num_tokens.tolist() == theirs.num_tokens.tolist()
        assert (ours.sent_bytes >= theirs.sent_bytes).all()
        if ranks.layout.dp == 1:  # every size has its graph: nothing is padded
            # That of a whole step finds likeliest tokens, two float64, though logits are asked for.
            is_whole = is_static_on(ranks.layout, options.dispatch)
            has_head = is_whole and stage.stage.mesh.is_last_stage
            more = 16 * (ranks.layout.tp - 1) * ranks.num_sampled * has_head
            assert ours.sent_bytes.sum() - theirs.sent_bytes.sum() == more
    return ranks


full = pytest.mark.full


def test_a_few_whole_steps(monkeypatch):
    comes_at = [0, 0, 1]
    options = Options(dispatch="static")
    ranks = assert_equal("dp=2,ep=2", options, monkeypatch, comes_at=comes_at, max_tokens=3)
    assert [each.num_replayed for each in ranks.graphs] == [len(ranks.sizes)] * 2


@full
@pytest.mark.parametrize(
    ("layout", "form", "name"),
    [
        ("dp=2,ep=2", "static", None),
        pytest.param("dp=2,ep=2", "all_gather", None, marks=full),
        pytest.param("dp=4,ep=4", "static", None, marks=full),
        pytest.param("dp=4,ep=4", "all_gather", None, marks=full),
        pytest.param("tp=2", "static", None, marks=full),
        pytest.param("dp=2,tp=2,ep=2", "static", None, marks=full),
        pytest.param("tp=2,ep=2", "all_gather", "norm of all heads", marks=full),
        pytest.param("pp=2", "static", "sinks, window, biases", marks=full),
        pytest.param("dp=2,ep=2,pp=2", "static", "sinks, window, biases", marks=full),
        pytest.param("dp=2,ep=2", "static", "latent, dense layer", marks=full),
    ],
)
def test_whole_steps_of_ranks(layout, form, name, monkeypatch):
    """Data-parallel ranks have different numbers of sequences, and none."""
    model, dp = MODELS[name] if name else MODEL, Layout.parse(layout).dp
    comes_at = COMES_AT if dp < 4 else arrivals(8, rate=0.8)
    options = Options(dispatch=form)
    ranks = assert_equal(layout, options, monkeypatch, model=model, comes_at=comes_at)
    assert [each.num_replayed for each in ranks.graphs] == [len(ranks.sizes)] * len(ranks.graphs)
    assert len({each.num_recorded for each in ranks.graphs}) == 1
    assert len({max(sizes) for sizes in ranks.sizes}) > 1
    if dp > 1:
        assert any(0 in sizes and any(sizes) for sizes in ranks.sizes)
        assert any(len({*sizes}) > 1 and min(sizes) for sizes in ranks.sizes)


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        pytest.param("dp=2,ep=2", None, marks=full),
        pytest.param("dp=4,ep=4", None, marks=full),
        pytest.param("dp=2,ep=2,pp=2", "latent, dense layer", marks=full),
        ("tp=2,ep=2", None),
        pytest.param("tp=2,ep=2", "norm of all heads", marks=full),
        pytest.param("tp=2,ep=2", "sinks, window, biases", marks=full),
        pytest.param("dp=2,tp=2,ep=2", None, marks=full),
        pytest.param("dp=2,tp=2,ep=4", "latent, dense layer", marks=full),
        pytest.param("tp=2,ep=2,pp=2", "latent, dense layer", marks=full),
    ],
)
def test_beginnings_of_layers(layout, name, monkeypatch):
    """Each rank has graphs for its own numbers of sequences, and none where it has none.

    Ranks of a tensor-parallel group have transfers in them; one may own no token.
    """
    model = MODELS[name] if name else MODEL
    ranks = assert_equal(layout, Options(dispatch="all_to_all"), monkeypatch, model=model)
    for rank, graphs in enumerate(ranks.graphs):
        at = ranks.layout.coordinates(rank)
        num_layers = model.num_hidden_layers // ranks.layout.pp
        num_steps = sum(sizes[at.dp_rank] > 0 for sizes in ranks.sizes)
        assert graphs.num_replayed == num_layers * num_steps


@pytest.mark.parametrize(
    ("layout", "forms", "of_sizes"),
    [
        pytest.param("dp=2,ep=2", ("all_gather", "all_gather"), [1, 1, 1], marks=full),
        pytest.param("tp=2,ep=2", ("all_to_all", "all_to_all"), [1, 1, 1], marks=full),
        # Above one sequence whole steps; a rank with one has steps of the other form then.
        pytest.param("dp=2,ep=2", ("all_to_all", "all_gather"), [1, 1, 2], marks=full),
    ],
)
def test_all_ranks_record_ahead_what_they_need(layout, forms, of_sizes, monkeypatch):
    """One size after the other, all ranks alike; no step records any more."""
    table, found = table_of(*forms), []

    def ahead(ranks):
        have_forms(*forms)(ranks)
        if any(ranks.graphs):
            found.extend(ranks.record_ahead(GraphLimits(3, 24), table))

    how = {"comes_at": [0, 2, 2], "max_tokens": 8, "before": {0: ahead}}
    ranks = assert_equal(layout, Options(dispatch=forms[1]), monkeypatch, **how)
    world_size = ranks.layout.world_size
    assert found == [[num] * world_size for num in of_sizes]
    assert [each.num_recorded for each in ranks.graphs] == [sum(of_sizes)] * world_size
    assert min(each.num_replayed for each in ranks.graphs) > 0


def have_forms(few, many):
    """All ranks take them as `table_of` has it."""
    table = table_of(few, many)

    def change(ranks):
        ranks.on_all(lambda rank: ranks.stages[rank].set_dispatch(table))
        assert not any(has_graphs(stage) for stage in ranks.stages)

    return change


def has_graphs(stage):
    return stage._graphs is not None and len(stage._graphs._launch) > 0


@full
def test_ranks_without_a_sequence_record_the_same_steps(monkeypatch):
    """Of whole steps, where one rank alone has recorded beginnings of layers before."""
    before = {0: have_forms("all_to_all", "all_gather")}
    how = {"comes_at": [0, 2, 2], "max_tokens": 10, "before": before}
    ranks = assert_equal("dp=2,ep=2", Options(dispatch="all_gather"), monkeypatch, **how)
    first = next(place for place, sizes in enumerate(ranks.sizes) if max(sizes) > 1)
    assert first > 0
    assert all(sizes == [1, 0] for sizes in ranks.sizes[:first])


def move_two(ranks):
    """Two ranks exchange an expert; gives placements for the next step."""
    placements = [Placement(4, ((0, 2), (1, 3)))] * MODEL.num_hidden_layers
    parts = [
        MovedPart(Move(layer, expert, source, 1 - source, slot))
        for layer in range(MODEL.num_hidden_layers)
        for expert, source, slot in ((1, 0, 0), (2, 1, 1))
    ]
    ranks.on_all(lambda rank: ranks.stages[rank].migration.start_moves(parts))
    ranks.on_all(lambda rank: ranks.stages[rank].migration.finish_moves())
    return placements


def begin_epoch(ranks):
    """All ranks stay, and meet anew."""
    for stage in ranks.stages:
        stage.drop_graphs()
    ranks.join(Meeting())
    ranks.on_all(lambda rank: ranks.stages[rank].rejoin(()))


@full
@pytest.mark.parametrize(
    "change",
    [move_two, have_forms("all_gather", "all_gather"), begin_epoch],
    ids=["move", "form", "epoch"],
)
def test_graphs_are_recorded_anew(change, monkeypatch):
    """After a rebalance, a change of form and in a new epoch."""
    seen = []

    def change_and_look(ranks):
        seen.append([graphs and graphs.num_recorded for graphs in ranks.graphs])
        return change(ranks)

    options = Options(dispatch="static")
    how = {"comes_at": [0, 0], "max_tokens": 10, "before": {6: change_and_look}}
    ranks = assert_equal("dp=2,ep=2", options, monkeypatch, **how)
    _, at_change = seen
    for graphs, before in zip(ranks.graphs, at_change, strict=True):
        assert graphs.num_recorded > before > 0
