"""Hand-made records in virtual time, against times worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import telling
from cost.by_hand import LINKS, NUM_LAYERS, logs, records_of
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import read_profile
from expertlane.cost.step.operation import RankGroups, Transfer, TransferKind
from expertlane.cost.virtual import VirtualClock, VirtualLinks, undisturbed, without_each
from expertlane.results.step_record import Action
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage, Track
from records import step_record


def clock(layout, links=LINKS, scale=1.0, ranks_per_node=8):
    links = VirtualLinks(links, (scale / 2, scale, 2 * scale))
    return VirtualClock(Layout.parse(layout), NUM_LAYERS, links, ranks_per_node)


def replay(layout, ranks, num_micro_batches=1, **flags):
    """A single step of these ranks."""
    step = step_record(5.0, 6.0, [0], records_of(ranks, num_micro_batches))
    (replayed,) = clock(layout, **flags).replay([step])
    return replayed.step


def end_s(layout, ranks, **flags):
    return replay(layout, ranks, **flags).finished_s


def cells(array):
    """The places of an array that are not zero: (micro-batch, slot, stage) to value."""
    return {
        (int(m), int(slot), Stage(int(stage))): array[m, slot, stage]
        for m, slot, stage in zip(*array.nonzero(), strict=True)
    }


def exchange(ranks, sent, first_ranks=None):
    """All ranks post an all-to-all at once and wait for it; `sent`: [rank][to] bytes."""
    for number, (rank, of_rank) in enumerate(zip(ranks, sent, strict=True)):
        first_rank = 0 if first_ranks is None else first_ranks[number]
        rank.wait(rank.post(dict(enumerate(of_rank)), first_rank))


def test_one_rank():
    (rank,) = ranks = logs(1)
    rank.place(Stage.EMBED)
    rank.compute(1.0)
    rank.place(Stage.ATTENTION, 0)
    rank.compute(2.0)
    rank.compute(0.5)
    rank.place(Stage.ATTENTION, 2)
    rank.compute(4.0)
    step = replay("tp=1", ranks)
    assert (step.submitted_s, step.finished_s) == (0.0, 7.5)
    (record,) = step.records
    assert cells(record.wall_s) == {
        (0, NUM_LAYERS, Stage.EMBED): 1.0,
        (0, 0, Stage.ATTENTION): 2.5,
        (0, 2, Stage.ATTENTION): 4.0,
    }
    assert not record.blocked_s.any()
    assert record.operations is None


def test_two_ranks_wait_for_each_other():
    ranks = logs(2)
    for rank, before, beside in zip(ranks, (1.0, 4.0), (1.0, 5.0), strict=True):
        rank.place(Stage.DISPATCH, 1)
        rank.compute(before)
        number = rank.post({1 - rank.rank: 2})
        rank.compute(beside)
        rank.wait(number)
        rank.place(Stage.EXPERTS, 1)
        rank.compute(1.0)
    # Both have posted at 4, so it travels from 4 to 7: the first waits from 2 on, the other is busy
    # until 9.
    step = replay("tp=2", ranks)
    first, second = step.records
    assert cells(first.blocked_s) == {(0, 1, Stage.DISPATCH): 5.0}
    assert cells(first.wall_s) == {(0, 1, Stage.DISPATCH): 7.0, (0, 1, Stage.EXPERTS): 1.0}
    assert not second.blocked_s.any()
    assert cells(second.wall_s) == {(0, 1, Stage.DISPATCH): 9.0, (0, 1, Stage.EXPERTS): 1.0}
    assert step.finished_s == 10.0
    # In flight from when the last of the two has posted; the first waits for all of it.
    assert [record.transfers_s.tolist() for record in step.records] == [[3.0, 3.0], [3.0, 0.0]]


def test_the_ranks_of_a_group_wait_for_its_hot_receiver():
    ranks = logs(3)
    exchange(ranks, [[0, 0, 10], [0, 0, 10], [1, 0, 0]])
    assert end_s("dp=3,ep=3", ranks) == 1 + 20
    ranks = logs(3)
    exchange(ranks, [[0, 12, 12], [1, 0, 1], [1, 1, 0]])  # a hot sender is no better
    assert end_s("dp=3,ep=3", ranks) == 1 + 24


def test_links_between_nodes():
    ranks = logs(4)
    exchange(ranks, [[0, 1, 0, 8], [0] * 4, [0] * 4, [0] * 4])
    assert end_s("dp=4,ep=4", ranks) == 1 + 9
    assert end_s("dp=4,ep=4", ranks, ranks_per_node=2) == 2 + 8 / 0.5


def pipeline(first_s=(2.0,), second_s=(1.0,), sent=(6,), ahead_s=0.0):
    """A step of two stages of a rank each; of each micro-batch seconds, and bytes handed over.

    Args:
        ahead_s: what the second stage does before it needs the first's hidden states.
    """
    first, second = ranks = logs(2)
    for number, (a_s, b_s, num_bytes) in enumerate(zip(first_s, second_s, sent, strict=True)):
        first.place(Stage.EXPERTS, 0, number)
        first.compute(a_s)
        first.place(Stage.HAND_OVER, micro_batch=number)
        if num_bytes:
            first.send(1, num_bytes)
        second.place(Stage.HAND_OVER, micro_batch=number)
        second.compute(ahead_s)
        second.arrive()
        second.place(Stage.EXPERTS, 2, number)
        second.compute(b_s)
    return records_of(ranks, len(first_s))


def run_chain(steps, **flags):
    """[(submitted, finished)] in virtual time of steps given as (submitted, finished, records)."""
    made = [step_record(begin, end, [0], records) for begin, end, records in steps]
    replayed = clock("pp=2", **flags).replay(made)
    return [(each.step.submitted_s, each.step.finished_s) for each in replayed]


def test_a_pipeline():
    # The first stage until 2, the hand-over until 2 + (3 + 6), the second one more.
    assert run_chain([(0.0, 1.0, pipeline())]) == [(0.0, 12.0)]
    assert run_chain([(0.0, 1.0, pipeline())], ranks_per_node=1) == [(0.0, 2 + (4 + 12) + 1)]


def test_what_a_stage_does_ahead_hides_behind_the_one_before():
    step = step_record(0.0, 1.0, [0], pipeline(ahead_s=5.0))
    (replayed,) = clock("pp=2").replay([step])
    assert replayed.step.finished_s == 12.0
    second = replayed.step.records[1]
    assert cells(second.wall_s) == {
        (0, NUM_LAYERS, Stage.HAND_OVER): 11.0,
        (0, 2, Stage.EXPERTS): 1.0,
    }
    assert cells(second.blocked_s) == {(0, NUM_LAYERS, Stage.HAND_OVER): 6.0}
    assert run_chain([(0.0, 1.0, pipeline(ahead_s=15.0))]) == [(0.0, 16.0)]


def test_a_step_begins_when_those_before_it_have_ended():
    """Drained: each was submitted after the end of the one before; measured times do not matter."""
    steps = [(0.0, 1.0, pipeline()), (1.0, 50.0, pipeline()), (50.5, 51.0, pipeline())]
    assert run_chain(steps) == [(0.0, 12.0), (12.0, 24.0), (24.0, 36.0)]
    assert run_chain(steps[::-1]) == [(24.0, 36.0), (12.0, 24.0), (0.0, 12.0)]  # in any order


def test_rotating_steps_share_the_pipeline():
    # Two groups take turns: c was submitted when a had ended, d when b had.
    a, b = pipeline((2.0,), (1.0,), (6,)), pipeline((3.0,), (5.0,), (6,))
    steps = [(0.0, 2.0, a), (0.1, 3.0, b), (2.1, 4.0, a), (3.1, 5.0, b)]
    # a: 0-2, sent 2-11, 11-12. b: 2-5, sent behind it 11-20, 20-25. c: 12-14, sent 20-29, 29-30.
    # d: 25-28, sent 29-38, 38-43.
    assert run_chain(steps) == [(0.0, 12.0), (0.0, 25.0), (12.0, 30.0), (25.0, 43.0)]
    # One that was submitted before any had ended begins at once, behind them.
    assert run_chain([(0.0, 2.0, a), (0.1, 3.0, b)], links=None) == [(0.0, 3.0), (0.0, 10.0)]


def test_runs_and_replicas_have_clocks_of_their_own():
    def step(begin, replica=0, run=0):
        rank = logs(2)[replica]
        rank.compute(2.0)
        made = step_record(begin, begin + 1, [0], [rank.record()], replica=replica)
        return replace(made, run=run)

    steps = [step(0.0), step(0.1, replica=1), step(1.5), step(9.0, run=1), step(1.5, replica=1)]
    replayed = clock("replicas=2").replay(steps)
    assert [(each.step.submitted_s, each.step.finished_s) for each in replayed] == [
        (0.0, 2.0),
        (0.0, 2.0),
        (2.0, 4.0),
        (0.0, 2.0),
        (2.0, 4.0),
    ]
    assert [each.step.run for each in replayed] == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("count_idle", [False, True])
def test_idle_time_counts_where_it_counted_when_measured(count_idle):
    steps = []
    for number, cpu_s in enumerate(((1.0, 4.0), (1.0, 1.0))):
        ranks = logs(2)
        for rank, own_s in zip(ranks, cpu_s, strict=True):
            rank.compute(own_s)
        records = [rank.record(count_idle=count_idle and number == 1) for rank in ranks]
        steps.append(step_record(number, number + 0.5, [0], records))
    _, second = clock("dp=2").replay(steps)
    idle = {(0, NUM_LAYERS, Stage.IDLE): 3.0} if count_idle else {}
    assert [cells(record.blocked_s) for record in second.step.records] == [idle, {}]
    assert [record.wall_s.sum() for record in second.step.records] == [1 + 3 * count_idle, 1.0]


def test_without_links_transfers_take_no_time():
    ranks = logs(3)
    for rank, cpu_s in zip(ranks, (1.0, 2.0, 5.0), strict=True):
        rank.compute(cpu_s)
    exchange(ranks, [[0, 10, 10]] * 3)
    for rank, cpu_s in zip(ranks, (5.0, 2.0, 1.0), strict=True):
        rank.compute(cpu_s)
    assert end_s("dp=3,ep=3", ranks, links=None) == 5 + 5  # a rank still waits for others


def test_the_scale_is_that_of_transfers_alone():
    def ranks():
        made = logs(2)
        for rank in made:
            rank.compute(3.0)
        exchange(made, [[0, 4], [2, 0]])
        return made

    assert end_s("tp=2", ranks()) == 3 + 5
    assert end_s("tp=2", ranks(), scale=2.0) == 3 + 2 * 5
    assert end_s("tp=2", ranks(), scale=0.25) == 3 + 0.25 * 5
    for scale in (1.0, 2.0):
        (replayed,) = clock("tp=2", scale=scale).replay(
            [step_record(0.0, 1.0, [0], records_of(ranks()))]
        )
        ends = [step.finished_s for step in replayed.by_scale]
        assert ends == [3 + factor * scale * 5 for factor in (0.5, 1.0, 2.0)]
        assert replayed.step.finished_s == ends[1]
    sent = [(0.0, 1.0, pipeline((0.0,), (0.0,), (6,)))]
    assert run_chain(sent, scale=2.0) == [(0.0, 2 * 9.0)]


def test_events_in_virtual_time():
    first, second = pipeline(ahead_s=5.0)
    first = replace(first, events=object())  # that any rank kept its events says that all are to
    (replayed,) = clock("pp=2").replay([step_record(0.0, 1.0, [0], [first, second])])
    found = [record.events for record in replayed.step.records]
    assert {each.start_s for each in found} == {0.0}
    tracks = list(Track)
    for each, expected in zip(
        found,
        ([("compute", 0, 2), ("network", 2, 11)], [("compute", 0, 5), ("compute", 11, 12)]),
        strict=True,
    ):
        columns = each.track, each.begin_s, each.end_s
        assert [
            (str(tracks[track]), begin, end) for track, begin, end in zip(*columns, strict=True)
        ] == expected


def two_nodes(num_halves, stage, hops):
    """Four ranks on two nodes; every half posts each hop in turn. `hops`: their first ranks."""
    ranks = logs(4)
    for rank in ranks:
        rank.place(stage, 1)
        for first_ranks in hops:
            numbers = []
            for half in range(num_halves):
                group = [each for each in range(4) if first_ranks[each] == first_ranks[rank.rank]]
                num_bytes = 1 << (20 + 2 * half)
                sent = {to: num_bytes for to in group if to != rank.rank}
                numbers.append(rank.post(sent, first_ranks[rank.rank]))
            for number in numbers:
                rank.wait(number)
    return ranks


BETWEEN, INSIDE, ALL = [0, 1, 0, 1], [0, 0, 2, 2], [0, 0, 0, 0]


def transfer(first_ranks, half, stage):
    groups = RankGroups(np.array(first_ranks), np.array([0, 0, 1, 1]))
    sent = groups.is_peer[None] * (1 << (20 + 2 * half))
    return Transfer(TransferKind.ALL_TO_ALL, stage, groups, sent)


@pytest.mark.parametrize("num_halves", [1, 2])
@pytest.mark.parametrize(
    ("stage", "hops"),
    [
        (Stage.DISPATCH, (BETWEEN, INSIDE)),
        (Stage.COMBINE, (INSIDE, BETWEEN)),
        (Stage.DISPATCH, (ALL,)),
    ],
)
def test_both_hops_of_a_half_are_priced_together(num_halves, stage, hops):
    """And flat dispatch is no hop of another half's."""
    profile = read_profile("h100")
    model = LinkModel(profile)
    expected = 0.0
    for half in range(num_halves):
        pair = [transfer(hop, half, stage) for hop in (BETWEEN, INSIDE)]
        flat = [model.times(transfer(ALL, half, stage))]
        expected += sum(
            each.seconds.max() for each in (flat if len(hops) == 1 else model.forwarded(*pair))
        )
    found = end_s("dp=4,ep=4", two_nodes(num_halves, stage, hops), links=profile, ranks_per_node=2)
    assert found == pytest.approx(expected)


def test_a_step_without_operations_is_refused():
    (rank,) = logs(1)
    rank.compute(1.0)
    record = replace(rank.record(), operations=None)
    with pytest.raises(ValueError, match=telling("rank 0 operations")):
        clock("tp=1").replay([step_record(0.0, 1.0, [0], [record])])


def _more(rank):
    rank.wait(rank.post({}))


def _elsewhere(rank):
    rank.place(Stage.COMBINE, 1)
    rank.wait(rank.post({}))


def _of_another_kind(rank):
    rank.wait(rank.post({}, kind=TransferKind.ALL_GATHER))


def _without_waiting(rank):
    rank.post({})


@pytest.mark.parametrize("other", [_elsewhere, _of_another_kind, _without_waiting, None])
def test_ranks_that_did_other_things_are_refused(other):
    ranks = logs(3)
    for rank in ranks[:2]:
        _more(rank)
    ranks[2].compute(1.0)
    if other is not None:
        other(ranks[2])
    with pytest.raises(ValueError, match=telling("rank 2 0 transfers")):
        end_s("dp=3,ep=3", ranks)


@st.composite
def programs(draw, num_ranks):
    """What ranks do in turn: CPU seconds, transfers ([R, R] bytes and groups), waits."""
    durations = st.floats(0.0, 10.0, allow_subnormal=False)
    groups = st.sampled_from([[0] * num_ranks, [place // 2 * 2 for place in range(num_ranks)]])
    items: list[tuple] = [("compute", [0.0] * num_ranks)]
    posted = 0
    waiting: list[int] = []
    for kind in draw(st.lists(st.sampled_from("cptw"), min_size=1, max_size=12)):
        if kind == "c":
            items.append(
                ("compute", draw(st.lists(durations, min_size=num_ranks, max_size=num_ranks)))
            )
        elif kind in "pt":
            sizes = st.lists(st.integers(0, 9), min_size=num_ranks**2, max_size=num_ranks**2)
            items.append(("post", draw(sizes), draw(groups)))
            waiting.append(posted)
            posted += 1
        elif waiting:
            items.append(("wait", waiting.pop(draw(st.integers(0, len(waiting) - 1)))))
    return items + [("wait", number) for number in waiting]


def run_program(items, num_ranks, layout, **flags):
    ranks = logs(num_ranks)
    seconds = []  # of each transfer, of the rank with the longest
    for rank in ranks:
        seconds = []
        for what, *given_values in items:
            if what == "compute":
                rank.compute(given_values[0][rank.rank])
            elif what == "wait":
                rank.wait(given_values[0])
            else:
                first_ranks = given_values[1]
                is_peer = np.equal.outer(first_ranks, first_ranks) & ~np.eye(num_ranks, dtype=bool)
                sent = np.reshape(given_values[0], (num_ranks, num_ranks)) * is_peer
                rank.post(dict(enumerate(sent[rank.rank].tolist())), first_ranks[rank.rank])
                own = np.maximum(sent.sum(axis=0), sent.sum(axis=1)) + is_peer.any(axis=1)
                seconds.append([own[np.equal(first_ranks, each)].max() for each in first_ranks])
    return replay(layout, ranks, **flags), np.array(seconds).reshape(-1, num_ranks)


@settings(max_examples=150, deadline=None)
@given(items=programs(4))
def test_between_the_longest_chain_and_the_sum_of_all(items):
    step, of_transfers = run_program(items, 4, "dp=4,ep=4")
    computed = np.array([item[1] for item in items if item[0] == "compute"]).reshape(-1, 4)
    found = step.finished_s
    assert found >= computed.sum(axis=0).max() - 1e-9
    assert found >= of_transfers.sum(axis=0).max() - 1e-9
    assert found <= computed.max(axis=1).sum() + of_transfers.max(axis=1).sum() + 1e-9
    for record, cpu_s in zip(step.records, computed.sum(axis=0), strict=True):
        assert record.wall_s.sum() - record.blocked_s.sum() == pytest.approx(cpu_s)
        assert record.wall_s.sum() <= found + 1e-9


def test_what_disturbed_one_run_counts_in_none():
    def step_of(run, cpu_s, sent=8):
        ranks = logs(2)
        for rank in ranks:
            rank.compute(cpu_s[0])
        exchange(ranks, [[0, sent], [sent, 0]])
        for rank in ranks:
            rank.compute(cpu_s[1])
        return replace(step_record(5.0, 6.0, [0], records_of(ranks)), run=run)

    def least(*steps):
        found = [step.records[0].operations for step in undisturbed(steps)]
        return [each.cpu_s[each.action == Action.COMPUTE].tolist() for each in found]

    quiet = step_of(0, [1.0, 5.0])
    assert least(quiet, step_of(1, [3.0, 2.0])) == [[1.0, 2.0], [1.0, 2.0]]
    other = step_of(1, [0.5, 0.5], sent=16)  # it sent something else
    assert least(quiet, other) == [[1.0, 5.0], [0.5, 0.5]]


def test_each_run_takes_the_lesser_times_of_itself_and_the_next():
    def step_of(run, cpu_s, begins_s=5.0):
        ranks = logs(1)
        ranks[0].compute(cpu_s)
        step = step_record(begins_s, begins_s + 1, [0], records_of(ranks))
        return replace(step, run=run)

    def seconds(steps):
        return [
            (step.run, float(step.records[0].operations.cpu_s.sum()))
            for step in sorted(steps, key=lambda step: (step.run, step.submitted_s))
        ]

    times = [4.0, 1.0, 3.0, 5.0]
    runs = [step_of(run, each) for run, each in enumerate(times)]
    assert seconds(undisturbed(runs)) == [(0, 1.0), (1, 1.0), (2, 3.0), (3, 4.0)]
    # Without a run, the one before it is followed by the one after it.
    assert seconds(without_each(runs)) == [(0, 1.0), (1, 3.0), (2, 1.0), (3, 3.0)]
    assert seconds(undisturbed(runs[:1])) == [(0, 4.0)]
    later = [step_of(run, 2 * each, 7.0) for run, each in enumerate(times)]
    both = seconds(undisturbed([*runs, *later]))  # step by step
    assert both[:2] == [(0, 1.0), (0, 2.0)]
