import numpy as np
import pytest

from distributed.on_ranks import Collective, PassOn
from expertlane.spec.layout import Layout
from expertlane.spec.names import Link, Stage, Traffic
from records import sent_over as sent

pytestmark = pytest.mark.numerical


def run(pools, layout, axis, method, arguments, ranks_per_node=8):
    """Results and records of the layout's ranks."""
    layout = Layout.parse(layout)
    pool = pools.pool(layout.world_size)
    given, rest = zip(*((rows, others) for rows, *others in arguments), strict=True)
    answers = pool.call(Collective(layout, ranks_per_node, axis, method, list(given), list(rest)))
    return zip(*answers[: layout.world_size], strict=True)


def rows(*values, dtype=np.float32):
    """A column of values."""
    return np.array(values, dtype=dtype).reshape(-1, 1)


def test_all_to_all_of_uneven_parts(pools):
    arguments = [
        (rows(1, 2, 3), [1, 2, 0], [1, 0, 2]),
        (rows(), [0, 0, 0], [2, 0, 1]),
        (rows(4, 5, 6), [2, 1, 0], [0, 0, 0]),
    ]
    results, records = run(pools, "dp=3,ep=3", "ep", "all_to_all", arguments)
    assert [result.ravel().tolist() for result in results] == [[1, 4, 5], [2, 3, 6], []]
    # Four bytes a row; what a rank keeps is not sent.
    assert [sent(record, Traffic.PAYLOAD) for record in records] == [8, 0, 12]
    assert [record.num_collectives[Stage.COLLECTIVES] for record in records] == [1, 1, 1]


def test_metadata_of_a_row_is_counted_apart(pools):
    row = np.zeros((2, 6), dtype=np.uint8)
    arguments = [(row, [0, 2], [0, 1], 2), (row[:1], [1, 0], [2, 0], 2)]
    _, records = run(pools, "dp=2,ep=2", "ep", "all_to_all", arguments)
    assert [sent(record, Traffic.PAYLOAD) for record in records] == [8, 4]
    assert [sent(record, Traffic.METADATA) for record in records] == [4, 2]


def test_bytes_are_counted_by_global_rank(pools):
    counts = [1, 1]
    arguments = [(rows(rank), counts) for rank in range(4)]
    _, records = run(pools, "replicas=2,dp=2", "stage", "all_gather", arguments)
    found = [record.sent_bytes[Stage.COLLECTIVES, Traffic.PAYLOAD].tolist() for record in records]
    assert found == [[0, 4, 0, 0], [4, 0, 0, 0], [0, 0, 0, 4], [0, 0, 4, 0]]


def test_all_gather_of_uneven_and_empty_parts(pools):
    counts = [2, 0, 1]
    arguments = [(rows(1, 2), counts), (rows(), counts), (rows(3), counts)]
    results, records = run(pools, "dp=3,ep=3", "stage", "all_gather", arguments)
    assert [result.ravel().tolist() for result in results] == [[1, 2, 3]] * 3
    assert [sent(record, Traffic.PAYLOAD) for record in records] == [16, 0, 8]


@pytest.mark.parametrize("counts", [[3000, 0, 1], [2, 2000, 3000]])
def test_all_gather_of_many_bytes(pools, counts):
    """By single sends; the same rows, counted alike."""
    of_rank = [np.full((count, 64), rank, dtype=np.float32) for rank, count in enumerate(counts)]
    arguments = [(given, counts, 8) for given in of_rank]
    results, records = run(pools, "dp=3,ep=3", "stage", "all_gather", arguments)
    for result in results:
        np.testing.assert_array_equal(result, np.concatenate(of_rank))
    for record, count in zip(records, counts, strict=True):
        assert sent(record, Traffic.PAYLOAD) == 2 * count * (64 * 4 - 8)
        assert sent(record, Traffic.METADATA) == 2 * count * 8
        assert record.num_collectives[Stage.COLLECTIVES] == 1


def test_reduce_scatter_to_uneven_and_empty_parts(pools):
    counts = [2, 0, 1]
    arguments = [(rows(1, 2, 3), counts), (rows(10, 20, 30), counts), (rows(100, 200, 300), counts)]
    results, records = run(pools, "dp=3,ep=3", "stage", "reduce_scatter", arguments)
    assert [result.ravel().tolist() for result in results] == [[111, 222], [], [333]]
    assert [sent(record, Traffic.PAYLOAD) for record in records] == [4, 12, 8]


def test_sums_are_made_in_float32_and_in_rank_order(pools):
    counts = [1, 0, 0]
    # In float32 (1e8 + 1) - 1e8 is 0, while 1 + (1e8 - 1e8) is 1.
    arguments = [(rows(1e8), counts), (rows(1), counts), (rows(-1e8), counts)]
    results, _ = run(pools, "dp=3,ep=3", "stage", "reduce_scatter", arguments)
    assert next(iter(results)).tolist() == [[0]]


def test_nothing_at_all_is_still_a_collective(pools):
    arguments = [(rows(), [0, 0])] * 2
    results, records = run(pools, "dp=2", "stage", "all_gather", arguments)
    assert [result.shape for result in results] == [(0, 1)] * 2
    assert [record.num_collectives[Stage.COLLECTIVES] for record in records] == [1, 1]
    assert all(record.sent_bytes.sum() == 0 for record in records)


@pytest.mark.parametrize(
    ("method", "rest"),
    [("all_to_all", ([2], [2])), ("all_gather", ([2],)), ("reduce_scatter", ([2],))],
)
def test_a_group_of_one_sends_nothing(pools, method, rest):
    results, records = run(pools, "tp=1", "tp", method, [(rows(1, 2), *rest)])
    assert [result.ravel().tolist() for result in results] == [[1, 2]]
    record = next(iter(records))
    assert record.num_collectives.sum() == record.sent_bytes.sum() == 0


def test_links_between_nodes_are_counted_apart(pools):
    counts = [1, 1, 1, 1]
    arguments = [(rows(rank), counts) for rank in range(4)]
    _, records = run(pools, "dp=4", "stage", "all_gather", arguments, ranks_per_node=2)
    for record in records:
        assert sent(record, Traffic.PAYLOAD, Link.INTRA_NODE, ranks_per_node=2) == 4
        assert sent(record, Traffic.PAYLOAD, Link.INTER_NODE, ranks_per_node=2) == 8


@pytest.mark.parametrize("num_rows", [3, 1, 0])
def test_rows_go_down_the_pipeline(pools, num_rows):
    layout = Layout(pp=3)
    given = np.arange(2 * num_rows, dtype=np.float32).reshape(num_rows, 2)
    answers = pools.pool(3).call(PassOn(layout, 2, given))[:3]
    for held, _ in answers:
        np.testing.assert_array_equal(held, given)
    records = [record for _, record in answers]
    # Ranks 0 and 1 share a node, rank 2 is on the next one; the last stage sends nothing.
    for link, num_bytes in [
        (Link.INTRA_NODE, [8 * num_rows, 0, 0]),
        (Link.INTER_NODE, [0, 8 * num_rows, 0]),
    ]:
        assert [sent(record, Traffic.PAYLOAD, link, 2) for record in records] == num_bytes
    began = [record.num_collectives[Stage.HAND_OVER] for record in records]
    assert began == ([1, 1, 0] if num_rows else [0, 0, 0])
