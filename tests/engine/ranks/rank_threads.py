"""Ranks of a layout as threads of this process, with our Triton kernels and a double of graphs.

Their links are the engine's of nccl, on a double of its process group: what a collective does is
recorded with a graph, and done anew when that is launched. Ranks that do not begin the same
collectives, of sizes that fit, fail at once.
"""

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import torch

from engine.ops.cuda.near import DEVICE
from engine.ops.cuda.replayed import ReplayedGraphs, launched, recorded
from engine.stage.one_rank import KernelsWithGraphs, compute_with, stage_on
from expertlane.engine.comm.mesh import Meshes
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.torch_transport import NcclLink
from expertlane.engine.model_runner import outcome_of
from expertlane.engine.moe.dispatch import Dispatcher
from expertlane.engine.ops.cuda import launch
from expertlane.engine.warm_up import forms_of_sizes

PATIENCE_S = 60


class Meeting:
    """What ranks have begun, by group and number; all of it ends once one fails."""

    def __init__(self):
        self.changed = threading.Condition()
        self.begun = defaultdict(dict)  # of [what, ranks, number]: by place, rows for each place
        self.error = None

    def put(self, key, place, parts):
        with self.changed:
            self.begun[key][place] = parts
            self.changed.notify_all()

    def take(self, key, places):
        """What they have begun, in their order."""
        with self.changed:
            there = self.changed.wait_for(
                lambda: self.error or self.begun[key].keys() >= {*places}, PATIENCE_S
            )
            if self.error or not there:
                raise AssertionError(f"{key}: not begun by all of {places}: {self.error}")
            return [self.begun[key][place] for place in places]

    def fail(self, error):
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()


class ThreadGroup:
    """What links take of a process group of nccl."""

    def __init__(self, meeting, ranks, place):
        self.meeting, self.ranks, self.place = meeting, ranks, place
        self.num_begun = defaultdict(int)

    def alltoall_base(self, received, rows, receive, send):
        def parts():
            return [part.clone() for part in torch.split(rows, send)]

        return self._begin("exchange", parts, [*torch.split(received, receive)])

    def _allgather_base(self, whole, sent):
        size = len(self.ranks)
        assert len(whole) == size * len(sent)
        return self._begin("gather", lambda: [sent.clone()] * size, [*whole.chunk(size)])

    def _begin(self, what, parts, into):
        work = ThreadWork(self, what, into)
        recorded(work.begin, parts)
        return work

    def send(self, tensors, to, tag):
        (rows,), key = tensors, ("send", self.ranks, self.place, to, tag)
        self.num_begun[key] += 1
        self.meeting.put((*key, self.num_begun[key]), self.place, rows.clone())
        return SimpleNamespace(wait=lambda: None)

    def recv(self, tensors, source, tag):
        (rows,), key = tensors, ("send", self.ranks, source, self.place, tag)
        self.num_begun[key] += 1
        key = *key, self.num_begun[key]

        def wait():
            (came,) = self.meeting.take(key, [source])
            assert came.shape == rows.shape, f"{key}: {came.shape} came, not {rows.shape}"
            rows.copy_(came)

        return SimpleNamespace(wait=wait)


class ThreadWork:
    """A collective; begun and waited for at every launch of a graph that has it."""

    def __init__(self, group, what, into):
        self.group, self.what, self.into = group, what, into
        self.key = None

    def begin(self, parts):
        group = self.group
        group.num_begun["collective"] += 1  # of any kind: all ranks begin them in one order
        self.key = group.ranks, group.num_begun["collective"]
        group.meeting.put(self.key, group.place, (self.what, parts()))

    def wait(self):
        recorded(self._finish)

    def _finish(self):
        group = self.group
        for into, (what, parts) in zip(
            self.into, group.meeting.take(self.key, range(len(group.ranks))), strict=True
        ):
            came = parts[group.place]
            fits = what == self.what and came.shape == into.shape
            assert fits, f"{self.key}: {what} of {came.shape}, not {self.what} of {into.shape}"
            into.copy_(came)


class ThreadTransport:
    """Implements `Transport`."""

    def __init__(self, meeting, rank):
        self.meeting, self.rank, self.links = meeting, rank, {}

    def make(self, ranks):
        if self.rank in ranks:
            group = ThreadGroup(self.meeting, ranks, ranks.index(self.rank))
            self.links[ranks] = NcclLink(
                *(SimpleNamespace(group=group), group.place, len(ranks), DEVICE),
                SimpleNamespace(check=lambda: None),
                spans_nodes=False,
            )

    def link(self, ranks):
        return self.links[ranks]

    def leave(self):
        self.links.clear()


def pairs_of_a_gpu(dispatcher, ids, first):
    """As where the device is no CPU: the host does not ask how many pairs there are."""
    num = dispatcher._num_local_experts
    return dispatcher._ops.group_pairs(ids, first, 1, num, ids.numel())


class RankThreads:
    """The ranks of a layout; runs every step at once.

    Args:
        graphs: None for without.

    Attributes:
        graphs: [world_size]; of each rank.
        sizes: of each decode step so far, [dp] sequences.
        num_sampled: sequences of those steps in which any asks for more than its likeliest token.
        before: by the number of a step, what all ranks do before it, given their stage and rank.
    """

    def __init__(self, layout, model, limits, options, monkeypatch, *, has_graphs):
        self.layout, self.num_steps, self.before, self.sizes = layout, 0, {}, []
        self.placements = None  # of the next step
        self.num_sampled = 0
        of_rank = threading.local()
        self.graphs = [ReplayedGraphs() if has_graphs else None for _ in range(layout.world_size)]
        ops = KernelsWithGraphs(None)
        ops.graphs = lambda: of_rank.graphs
        compute_with(ops, monkeypatch)
        monkeypatch.setattr(Dispatcher, "_pairs", pairs_of_a_gpu)
        monkeypatch.setattr(launch, "_run", launched)
        board = ProgressBoard(layout.world_size)
        self.meeting, self.meshes = Meeting(), [Meshes() for _ in range(layout.world_size)]
        self.join(self.meeting)
        self._threads = ThreadPoolExecutor(layout.world_size)

        def build(rank):
            of_rank.graphs = self.graphs[rank]
            meshes = self.meshes[rank]
            stage = stage_on(
                *(board, rank, meshes, layout, model, limits, options, DEVICE, torch.float32),
                transport="nccl",
            )
            stage.totals()
            return stage

        self.stages = self.on_all(build)

    def record_ahead(self, limits, table):
        """As the launcher has all ranks do before requests come; gives graphs by size and rank."""
        by_size = forms_of_sizes(limits, table, self.layout)
        return [self.on_all(partial(self._record, size, forms)) for size, forms in by_size.items()]

    def _record(self, size, forms, rank):
        return self.stages[rank].record_graphs(size, forms)

    def join(self, meeting):
        """Have all ranks talk there."""
        self.meeting = meeting
        for rank, meshes in enumerate(self.meshes):
            meshes.renew(ThreadTransport(meeting, rank))
            meshes.make(self.layout)

    def on_all(self, action):
        """What it gives on each rank, all at the same time."""

        def guarded(rank):
            try:
                with torch.inference_mode():
                    return action(rank)
            except BaseException as error:
                self.meeting.fail(error)
                raise

        futures = [self._threads.submit(guarded, rank) for rank in range(self.layout.world_size)]
        errors = [each.exception() for each in futures]
        if self.meeting.error is not None:
            raise self.meeting.error
        assert not any(errors)
        return [each.result() for each in futures]

    def submit(self, plan):
        steps, placements = plan.of_dp_ranks(), None
        if (action := self.before.get(self.num_steps)) is not None:
            placements = action(self)
        self.num_steps += 1
        is_decode = all((batch.num_scheduled_tokens == 1).all() for batch in plan.batches)
        if is_decode:
            self.sizes += [[batch.num_seqs for batch in part] for part in plan.micro_batches]
        at = self.layout.coordinates
        done = self.on_all(lambda rank: self.stages[rank].run(steps[at(rank).dp_rank], placements))
        sampler = self.stages[-1]._sampler
        if is_decode:
            asked = [each for each in plan.batches if sampler.samples_any(each.seq_ids)]
            self.num_sampled += sum(each.num_seqs for each in asked)
        return done

    def first_done(self, handles):
        return handles[0]

    def collect(self, handle):
        return outcome_of(handle, 0.0, 0.0)

    def close(self):
        self._threads.shutdown()
