"""Ranks are threads here: each has an end of its own, and calls of compiled code let others run."""

import mmap
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import numpy as np
import pytest
import torch

from cli.screen import telling, tells
from expertlane.engine.comm.progress import ProgressBoard, Region
from expertlane.engine.comm.shared_memory import Endpoint, SharedTransport
from expertlane.engine.comm.transport import Epoch, PeerLostError
from expertlane.engine.ops.build import BASELINE, BuildError, build

_TIMEOUT_S = 20.0


@pytest.fixture
def transports():
    """Makes a transport for each of some ranks that share memory."""
    try:
        functions = build(BASELINE)
    except BuildError as error:
        pytest.skip(str(error))

    def make(num_ranks, timeout_s=_TIMEOUT_S, **sizes):
        region = Region(num_ranks, **sizes)
        memory = mmap.mmap(-1, region.num_bytes)
        ends = [Endpoint(functions, memory, region, rank, 0) for rank in range(num_ranks)]
        epoch = Epoch(ProgressBoard(1), 0)
        return [SharedTransport(e, region, 0, r, timeout_s, epoch) for r, e in enumerate(ends)]

    return make


def on_all(transports, groups, function):
    """Results of `function(rank, links)` on all ranks at once; links by group, where it is in."""

    def run(rank):
        for ranks in groups:
            transports[rank].make(ranks)
        links = {ranks: transports[rank].link(ranks) for ranks in groups if rank in ranks}
        return function(rank, links)

    with ThreadPoolExecutor(len(transports)) as pool:
        return list(pool.map(run, range(len(transports))))


def values(num_rows, width, *seeds):
    return (
        torch.arange(num_rows * width)
        .reshape(num_rows, width)
        .mul(7)
        .add(sum(seeds))
        .to(torch.int16)
    )


def test_uneven_all_to_all_by_hand(transports):
    everyone = (0, 1, 2)
    send = [[1, 2, 0], [0, 0, 0], [2, 1, 0]]

    def run(rank, links):
        rows = torch.arange(3, dtype=torch.float32)[: sum(send[rank]), None] + 10.0 * rank
        receive = [send[source][rank] for source in everyone]
        received = torch.full((sum(receive), 1), -1.0)
        links[everyone].all_to_all(rows, send[rank], received, receive).wait()
        return received.ravel().tolist()

    assert on_all(transports(3), [everyone], run) == [[0, 20, 21], [1, 2, 22], []]


def test_all_gather_of_uneven_parts_by_hand(transports):
    everyone, counts = (0, 1, 2), [2, 0, 1]

    def run(rank, links):
        received = torch.full((3, 1), -1.0)
        rows = torch.full((counts[rank], 1), float(rank))
        links[everyone].all_gather(rows, received, counts).wait()
        return received.ravel().tolist()

    assert on_all(transports(3), [everyone], run) == [[0, 0, 2]] * 3


def test_a_message_goes_from_one_to_another_in_order(transports):
    everyone = (0, 1, 2)

    def run(rank, links):
        link, rows = links[everyone], torch.zeros(2, 1)
        if rank == 0:
            works = [link.send(torch.full((2, 1), float(i)), 2) for i in range(20)]
            for work in works:
                work.wait()
        elif rank == 2:
            return [(link.receive(rows, 0).wait(), rows[0].item())[1] for _ in range(20)]
        return None

    assert on_all(transports(3), [everyone], run)[2] == list(range(20))


def test_sends_that_are_let_go_arrive_while_their_sender_does_something_else(transports):
    """More of them than are described at a time, the last too large for one piece."""
    sizes = [1] * 20 + [5000]
    is_received = Event()

    def run(rank, links):
        link = links[0, 1]
        if rank == 0:
            works = [link.send(torch.full((n, 1), float(n)), 1) for n in sizes]
            for work in works:
                work.let_go()
            assert is_received.wait(_TIMEOUT_S)
            for work in works:
                work.wait()
            return None
        rows = [torch.zeros(n, 1) for n in sizes]
        for each in rows:
            link.receive(each, 0).wait()
        is_received.set()
        return [each.unique().tolist() for each in rows]

    received = on_all(transports(2, heap_bytes=1 << 14), [(0, 1)], run)[1]
    assert received == [[float(n)] for n in sizes]


@pytest.mark.parametrize("heap_bytes", [1 << 14, 1 << 22])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_many_exchanges_in_flight_in_two_groups(transports, num_ranks, heap_bytes):
    """With a small heap, messages go in pieces and wait for room; every byte arrives.

    Some are made in the heap, some are read where they are.
    """
    everyone = tuple(range(num_ranks))
    groups = [everyone, tuple(reversed(everyone))]
    random = np.random.default_rng(3)
    sizes = random.integers(0, 8, (60, num_ranks, num_ranks)) ** random.integers(1, 5, (60, 1, 1))
    dtypes = [torch.bfloat16, torch.uint8, torch.float32]

    def run(rank, links):
        flights = []
        for number, size in enumerate(sizes):
            group = groups[number % 2]
            send = [int(size[rank, peer]) for peer in group]
            receive = [int(size[peer, rank]) for peer in group]
            parts = [values(n, 3, rank, 10 * p, number) for p, n in zip(group, send, strict=True)]
            dtype = dtypes[number % 3]
            rows, received = torch.cat(parts).to(dtype), torch.empty(sum(receive), 3, dtype=dtype)
            if number % 5 == 4:  # of all the same size
                receive = [int(size[peer, peer]) for peer in group]
                rows = values(int(size[rank, rank]), 3, rank).to(dtype)
                received = torch.empty(sum(receive), 3, dtype=dtype)
                work = links[group].all_gather(rows, received, receive)
                wanted = [values(n, 3, p) for p, n in zip(group, receive, strict=True)]
            else:
                if number % 3:
                    made = links[group].empty(len(rows), 3, dtype).copy_(rows)
                    rows = made
                if number % 4 < 2:
                    received = None
                    work = links[group].all_to_all_parts(rows, send, receive)
                else:
                    work = links[group].all_to_all(rows, send, received, receive)
                wanted = [
                    values(n, 3, p, 10 * rank, number) for p, n in zip(group, receive, strict=True)
                ]
            flights.append((work, received, torch.cat(wanted).to(dtype), rows))
            if len(flights) == 1 + number // 10 % 3:
                check(*flights.pop(0))
        for flight in flights:
            check(*flight)

    def check(work, received, wanted, rows):
        work.wait()
        if received is None:
            received = work.read(lambda parts: parts.tensor())
        assert torch.equal(received, wanted)

    on_all(transports(num_ranks, heap_bytes=heap_bytes), groups, run)


def test_what_is_made_in_the_heap_is_not_copied_there(transports):
    """Its room is used again once all have read it; where there is none, it is made elsewhere."""
    everyone, heap_bytes = (0, 1), 1 << 14
    places = set()

    def run(rank, links):
        link, sums = links[everyone], []
        for number in range(100):
            rows = link.empty(4, 16, torch.float32).fill_(rank + number)
            if rank == 0:
                places.add(rows.data_ptr())
            work = link.all_to_all_parts(rows, [2, 2], [2, 2])
            work.wait()
            sums.append(work.read(lambda parts: parts.tensor().sum()).item())
        too_many = link.empty(1 << 20, 1, torch.uint8)
        return sums, too_many.shape

    for result in on_all(transports(2, heap_bytes=heap_bytes), [everyone], run):
        assert result == ([32.0 * (1 + 2 * number) for number in range(100)], (1 << 20, 1))
    assert len(places) < 20


def test_a_sender_without_room_is_waited_for_by_one_that_reads_in_place(transports):
    """Rank 0 sees rank 1's part and waits for rank 2's; rank 1 has no room for what 2 awaits."""
    everyone, size = (0, 1, 2), 1 << 11
    is_begun = Barrier(3)

    def run(rank, links):
        link, each = links[everyone], [size] * 3
        rows = torch.full((3 * size, 1), rank, dtype=torch.uint8)
        if rank == 2:  # the others' heaps hold what it does not take yet
            is_begun.wait()
        works = [link.all_to_all_parts(rows, each, each) for _ in range(6)]
        if rank != 2:
            is_begun.wait()
        return [
            (work.wait(), work.read(lambda parts: parts.tensor().long().sum()).item())[1]
            for work in works
        ]

    results = on_all(transports(3, heap_bytes=1 << 15), [everyone], run)
    assert results == [[3 * size] * 6] * 3


def test_another_size_than_expected_is_named(transports):
    everyone = (0, 1)

    def run(rank, links):
        received = torch.empty(2, 1)
        sizes = [1, 1] if rank == 0 else [2, 1]
        try:
            links[everyone].all_to_all(torch.zeros(3, 1), sizes, received, [1, 1]).wait()
        except PeerLostError as error:
            return str(error)
        return None

    assert tells(on_all(transports(2), [everyone], run)[0], "rank 1 size")


def test_a_wait_ends_and_names_who_is_missing(transports):
    everyone = (0, 1, 2)
    both_have_begun = Barrier(2)

    def run(rank, links):
        if rank == 1:
            return None
        received = torch.empty(3, 1)
        work = links[everyone].all_gather(torch.zeros(1, 1), received, [1, 1, 1])
        both_have_begun.wait()
        with pytest.raises(PeerLostError, match=telling("0.2 rank 1")):
            work.wait()
        return True

    assert on_all(transports(3, timeout_s=0.2), [everyone], run) == [True, None, True]


def test_a_transfer_that_is_waited_for_at_once(transports):
    """One call: uneven rows, the same ones for all, and what is made of them."""
    everyone = (0, 1, 2)
    send = [[1, 2, 0], [0, 0, 0], [2, 1, 0]]

    def run(rank, links):
        at_once = links[everyone].at_once
        rows = torch.arange(3, dtype=torch.float32)[: sum(send[rank]), None] + 10.0 * rank
        receive = [send[source][rank] for source in everyone]
        found = [at_once(rows, send[rank], receive)]
        found.append(at_once(rows, send[rank], receive, finish=lambda parts: parts.tensor() + 1))
        found.append(at_once(rows[:1], [len(rows[:1])] * 3, [1, 0, 1], same_for_all=True))
        return [each.ravel().tolist() for each in found]

    plain, one_more, same_for_all = zip(*on_all(transports(3), [everyone], run), strict=True)
    assert plain == ([0, 20, 21], [1, 2, 22], [])
    assert one_more == ([1, 21, 22], [2, 3, 23], [])
    assert same_for_all == ([0, 20],) * 3


@pytest.mark.parametrize(("receive", "message"), [(1, "1 s rank"), (2, "sent another")])
def test_a_wait_at_once_ends_and_names_who_is_missing(transports, receive, message):
    def run(rank, links):
        at_once = links[(0, 1)].at_once
        if rank and receive == 1:
            return None
        rows = torch.zeros(1, 1)
        with pytest.raises(PeerLostError, match=telling(message)):
            at_once(rows, [1, 1], [receive, receive])
        return rank

    on_all(transports(2, timeout_s=1.0), [(0, 1)], run)
