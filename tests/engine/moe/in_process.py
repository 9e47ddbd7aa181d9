"""Ranks of a stage in one process: each waits for what the others have begun to send."""

from array import array
from collections import defaultdict
from contextlib import nullcontext

import torch

from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.comm.transport import Link
from expertlane.engine.moe.dispatch import CopyChooser, Payload, RoutedTokens
from expertlane.engine.moe.forms import make_dispatcher
from expertlane.engine.ops.bookkeeping import RowParts
from expertlane.spec.layout import Layout

CPU = torch.device("cpu")


class Board:
    """Implements `Meshes`: what was sent in groups of ranks, transfer by transfer."""

    def __init__(self, device=CPU):
        self.device = device
        self.sent = defaultdict(dict)  # of [group, number of the transfer]: by place, rows and send
        self.num_begun = defaultdict(int)  # of [group, place]
        self.rank = 0  # that asks for its links

    def link(self, ranks):
        return BoardLink(self, ranks, ranks.index(self.rank))


class BoardLink(Link):
    """As a transport's."""

    def __init__(self, board, ranks, place):
        self.board, self.ranks, self.place = board, ranks, place

    def empty(self, num_rows, width, dtype):
        size = num_rows, width * dtype.itemsize
        return torch.full(size, 255, dtype=torch.uint8, device=self.board.device).view(dtype)

    def all_to_all(self, rows, send, received, receive):
        assert len(rows) == sum(send)
        self.board.num_begun[self.ranks, self.place] += 1
        sent = self.board.sent[self.ranks, self.board.num_begun[self.ranks, self.place]]
        sent[self.place] = rows.clone(), list(send)
        return BoardWork(self, sent, received, list(receive))

    def all_gather(self, rows, received, num_rows_of):
        size = len(self.ranks)
        return self.all_to_all(rows.repeat(size, 1), [len(rows)] * size, received, num_rows_of)


class BoardWork:
    """Implements `Work`."""

    def __init__(self, link, sent, received, receive):
        self.link, self.sent, self.received, self.receive = link, sent, received, receive

    def wait(self):
        assert len(self.sent) == len(self.link.ranks), "all began it"
        parts = []
        for place in range(len(self.link.ranks)):
            rows, send = self.sent[place]
            parts.append(torch.split(rows, send)[self.link.place])
        assert list(map(len, parts)) == self.receive
        self.received.copy_(torch.cat(parts))

    def read(self, finish):
        rows = self.received
        whole = RowParts(array("q", [0]), [len(rows)], rows.shape[1], rows.dtype, rows)
        return finish(RowParts.of(rows) if rows.device == CPU else whole)


def in_step(computations):
    """The results of all ranks' computations, which yield where they wait for one another."""
    results, waiting = [None] * len(computations), list(enumerate(computations))
    given = [None] * len(computations)
    while waiting:
        pending = []
        for rank, each in waiting:
            try:
                pending.append((rank, each, each.send(given[rank])))
            except StopIteration as stop:
                results[rank] = stop.value
        for rank, _, transfer in pending:
            given[rank] = transfer.wait()
        waiting = [(rank, each) for rank, each, _ in pending]
    return results


def ranks_of(layout, placement, form, *, ops=None, device=CPU, payload="model"):
    """The dispatchers of all ranks of a layout of one stage."""
    layout, board = Layout.parse(layout), Board(device)
    made = []
    for board.rank in range(layout.world_size):
        progress = ProgressBoard(layout.world_size).reporter(board.rank)
        recorder = Recorder(board.rank, 1, 1, progress, HostClock(), layout.world_size)
        mesh = ParallelMesh(layout, board, board.rank, layout.world_size, recorder)
        choice = CopyChooser(mesh, placement, device)
        if ops is not None:
            choice.ops = ops
        made.append(make_dispatcher(form, mesh, placement, choice, Payload(payload, recorder)))
    return made


def _tensor(array):
    """Rows of which lie in one piece, also where there are none."""
    return torch.empty(array.shape, dtype=torch.from_numpy(array).dtype).copy_(torch.tensor(array))


def dispatch_and_combine(layout, placement, form, inputs, *, device=CPU, during=nullcontext, **how):
    """What all ranks get back; expert e multiplies by e + 1.

    What no pair gives, and rows without a pair, are no numbers.

    Args:
        during: dispatch, and combine.
    """
    ranks = ranks_of(layout, placement, form, device=device, **how)
    num_of, etp = [len(x) for x, _, _ in inputs], Layout.parse(layout).etp
    tokens = [RoutedTokens(*(_tensor(x).to(device) for x in each), num_of) for each in inputs]
    with during():
        arrived = in_step([rank.dispatch(each) for rank, each in zip(ranks, tokens, strict=True)])
    results = []
    for place, (rows, pairs, _) in enumerate(arrived):
        experts = torch.tensor(placement.experts_of_rank[place // etp], device=device)
        factors = (experts + 1.0).repeat_interleave(pairs.counts)[:, None] / etp
        rows = rows.clone()
        rows[(pairs.numbers < 0).all(1)] = torch.nan
        of_pairs = torch.full((len(pairs.rows), rows.shape[1]), torch.nan, device=device)
        num = len(factors)
        of_pairs[pairs.order[:num]] = rows[pairs.rows[:num]] * factors
        results.append(of_pairs)
    combined = [
        rank.combine(sent, of_rank)
        for rank, (_, _, sent), of_rank in zip(ranks, arrived, results, strict=True)
    ]
    with during():
        combined = in_step(combined)
    return [each.cpu() for each in combined], arrived
