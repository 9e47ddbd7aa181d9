"""nccl's collectives for whole groups, on gloo's process group: what is padded, and cut again.

Ranks are threads with a process group each. The process group of nccl itself needs GPUs
(tests/gpu/test_links.py).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import HashStore, PrefixStore

from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.collectives import Group
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.comm.torch_transport import MANY_BYTES, Gloo, NcclLink
from expertlane.engine.comm.transport import Epoch
from expertlane.spec.names import Stage, Traffic

MOST_RANKS = 4
CPU = torch.device("cpu")
_TIMEOUT = timedelta(seconds=60)
_WIDE = MANY_BYTES // 8  # two float32 rows so wide are many bytes


class Ranks:
    """A group of each size, made once; its ranks are threads."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(MOST_RANKS)
        self._store, self._names = HashStore(), count()
        self._backends: dict[int, list[Gloo]] = {}

    def groups(self, size: int, *, spans_nodes: bool) -> list[Group]:
        if size not in self._backends:
            name = f"group-{next(self._names)}"

            def meet(place: int) -> Gloo:
                return Gloo(PrefixStore(name, self._store), place, size, _TIMEOUT)

            self._backends[size] = self.each(meet, range(size))
        board = ProgressBoard(size)
        epoch, groups = Epoch(board, 0), []
        for place, backend in enumerate(self._backends[size]):
            link = NcclLink(backend, place, size, CPU, epoch, spans_nodes=spans_nodes)
            recorder = Recorder(place, 1, 1, board.reporter(place), HostClock(), size)
            groups.append(Group(link, range(size), place, 1, recorder))
        return groups

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Of all ranks at once."""
        return list(self._pool.map(function, *arguments))

    def end(self) -> None:
        self._pool.shutdown()
        self._backends.clear()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.end()


def values(source: int, num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers that tell rank, row and column, small enough for 16 bits."""
    rows = torch.arange(num_rows)[:, None] % 7 + torch.arange(width) % 3
    return (rows + 16 * source).to(dtype)


def gather(ranks: Ranks, num_rows_of: list[int], width: int) -> list[Tensor]:
    groups = ranks.groups(len(num_rows_of), spans_nodes=False)

    def of_rank(group: Group) -> Tensor:
        rows = values(group.rank, num_rows_of[group.rank], width)
        return group.all_gather(rows, num_rows_of).wait()

    return ranks.each(of_rank, groups)


def expected(num_rows_of: list[int], width: int) -> Tensor:
    return torch.cat([values(rank, num, width) for rank, num in enumerate(num_rows_of)])


@settings(deadline=None, max_examples=40)
@given(
    num_rows_of=st.lists(st.integers(0, 5), min_size=1, max_size=MOST_RANKS),
    width=st.sampled_from([1, 3, _WIDE]),
)
def test_gathers_of_any_sizes(ranks, num_rows_of, width):
    """Equal, padded, too uneven for padding; of no rows at all, and among one rank."""
    for found in gather(ranks, num_rows_of, width):
        assert torch.equal(found, expected(num_rows_of, width))


@pytest.mark.parametrize(
    ("num_rows_of", "width", "called"),
    [
        ([2, 2, 2], 3, "_allgather_base"),
        ([2, 0, 1], 3, "_allgather_base"),  # few bytes: padded
        ([5, 5, 4], _WIDE, "_allgather_base"),  # many, of which few are padding
        ([5, 0, 1], _WIDE, "send"),
        ([0, 0, 0], 3, None),
    ],
)
def test_what_a_gather_calls(ranks, monkeypatch, num_rows_of, width, called):
    groups = ranks.groups(len(num_rows_of), spans_nodes=False)
    calls = []

    class Spied:
        def __init__(self, group):
            self._group = group

        def __getattr__(self, name):
            calls.append(name)
            return getattr(self._group, name)

    for group in groups:
        monkeypatch.setattr(group._link, "_group", Spied(group._link._group))
    results = ranks.each(
        lambda group: group.all_gather(
            values(group.rank, num_rows_of[group.rank], width), num_rows_of
        ).wait(),
        groups,
    )
    assert all(torch.equal(found, expected(num_rows_of, width)) for found in results)
    assert {*calls} - {"recv"} == {called} - {None}


def test_padding_of_a_gather_is_counted_apart(ranks):
    """Rows of twelve bytes, of which four are no hidden state; what a rank keeps is not sent."""
    num_rows_of = [2, 0, 1]

    def of_rank(group: Group) -> Any:
        group._recorder.begin_step(0, 1, record=True, count_idle=False)
        group._recorder.enter(Stage.COLLECTIVES)
        rows = values(group.rank, num_rows_of[group.rank], 3)
        group.all_gather(rows, num_rows_of, metadata_bytes=4).wait()
        return group._recorder.end_step().sent_bytes[Stage.COLLECTIVES]

    sent = ranks.each(of_rank, ranks.groups(3, spans_nodes=False))
    for rank, (of_rank_bytes, num) in enumerate(zip(sent, num_rows_of, strict=True)):
        for to in range(3):
            others = to != rank
            assert of_rank_bytes[Traffic.PAYLOAD][to] == 8 * num * others
            assert of_rank_bytes[Traffic.METADATA][to] == 4 * num * others
            assert of_rank_bytes[Traffic.PADDING][to] == 12 * (2 - num) * others


def add_up(
    ranks: Ranks, num_rows_of: list[int], dtype: torch.dtype, *, spans_nodes: bool, width: int = 2
) -> list[tuple[Tensor, Any]]:
    """Each rank's part of the sum, and its record."""
    groups = ranks.groups(len(num_rows_of), spans_nodes=spans_nodes)

    def of_rank(group: Group) -> tuple[Tensor, Any]:
        rows = values(group.rank, sum(num_rows_of), width, dtype)
        group._recorder.begin_step(0, 1, record=True, count_idle=False)
        group._recorder.enter(Stage.COLLECTIVES)
        return group.reduce_scatter(rows, num_rows_of).wait(), group._recorder.end_step()

    return ranks.each(of_rank, groups)


@settings(deadline=None, max_examples=40)
@given(
    num_rows_of=st.lists(st.integers(0, 5), min_size=1, max_size=MOST_RANKS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    spans_nodes=st.booleans(),
)
def test_sums_of_any_sizes(ranks, num_rows_of, dtype, spans_nodes):
    """Of numbers that every order of adding gives exactly; counted alike, whoever adds."""
    size, total = len(num_rows_of), sum(num_rows_of)
    whole = torch.stack([values(rank, total, 2) for rank in range(size)]).sum(dim=0)
    parts = torch.split(whole.to(dtype), num_rows_of)
    found = add_up(ranks, num_rows_of, dtype, spans_nodes=spans_nodes)
    for rank, (own, record) in enumerate(found):
        assert own.dtype == dtype
        assert torch.equal(own, parts[rank])
        assert record.num_collectives[Stage.COLLECTIVES] == 1
        sent = record.sent_bytes[Stage.COLLECTIVES, Traffic.PAYLOAD].tolist()
        is_padded = spans_nodes and dtype != torch.float32 and total
        padding = [
            max(num_rows_of) - num if is_padded and to != rank else 0
            for to, num in enumerate(num_rows_of)
        ]
        found_padding = record.sent_bytes[Stage.COLLECTIVES, Traffic.PADDING]
        assert found_padding.tolist() == [num * 2 * dtype.itemsize for num in padding]
        of_each = [
            0 if to == rank else num * 2 * dtype.itemsize for to, num in enumerate(num_rows_of)
        ]
        assert sent == of_each


@pytest.mark.parametrize(
    ("dtype", "spans_nodes", "width", "is_native"),
    [
        (torch.bfloat16, True, 2, True),
        (torch.float16, True, 2, True),
        (torch.float32, True, 2, False),  # bit for bit in rank order, everywhere
        (torch.bfloat16, False, 2, False),  # in a node it would save no bytes
        (torch.bfloat16, True, 2 * _WIDE, False),  # most of it would be padding
    ],
)
def test_who_adds_up(ranks, dtype, spans_nodes, width, is_native):
    num_rows_of = [0, 4, 1]
    (group, *_) = ranks.groups(3, spans_nodes=spans_nodes)
    calls = []

    def begun(*arguments):
        calls.append(arguments)
        return type("Done", (), {"wait": lambda self: None})()

    group._link._group = type("Group", (), {"_reduce_scatter_base": staticmethod(begun)})()
    native = group._link.reduce_scatter(torch.zeros(5, width, dtype=dtype), num_rows_of)
    assert (native is not None) == bool(calls) == is_native


def test_float32_is_added_up_in_rank_order(ranks):
    """(1e8 + 1) - 1e8 is 0 in float32, while 1 + (1e8 - 1e8) is 1."""
    groups = ranks.groups(3, spans_nodes=True)
    rows = [torch.tensor([[value]]) for value in (1e8, 1.0, -1e8)]
    found = ranks.each(
        lambda group: group.reduce_scatter(rows[group.rank], [1, 0, 0]).wait(), groups
    )
    assert found[0].tolist() == [[0]]


@pytest.mark.parametrize("kind", ["AllToAllOptions", "AllgatherOptions", "ReduceScatterOptions"])
def test_torch_begins_collectives_on_a_stream_of_their_own(kind):
    """What is not asynchronous goes onto the computing stream, and would overlap nothing."""
    options = getattr(torch._C._distributed_c10d, kind)
    assert options().asyncOp
