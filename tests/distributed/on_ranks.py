"""Commands that tests run on the ranks of a pool, and the fork server whose ranks know them."""

import errno
import os
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from distributed.links import LINKS, use_links
from engine.stage.planted import FlipBit, Plant, flip_bit, plant
from expertlane.balance.placement import Placement
from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.collectives import interleave
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.comm.progress import NO_LAYER
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.moe.dispatch import CopyChooser, Payload, RoutedTokens
from expertlane.engine.moe.forms import make_dispatcher
from expertlane.engine.ranks import fork_server
from expertlane.engine.ranks.commands import Command
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.node_ranks import NodeRanks
from expertlane.engine.ranks.rendezvous import Meeting
from expertlane.engine.ranks.supervisor import SupervisorSettings, supervisor_command
from expertlane.engine.stage import worker
from expertlane.engine.stage.context import RankContext
from expertlane.engine.stage.worker import Handlers
from expertlane.errors import UserError
from expertlane.results.step_record import RankRecord
from expertlane.spec.deployment import DISPATCH_FORMS, DispatchForm, PayloadType
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage


def join(
    context: RankContext, layout: Layout, ranks_per_node: int, *, hierarchical: bool = False
) -> tuple[ParallelMesh, Recorder] | None:
    """This rank's groups and what counts their traffic; None on ranks beyond the layout."""
    context.meshes.make(layout, ranks_per_node if hierarchical else 0)
    if context.rank >= layout.world_size:
        return None
    recorder = Recorder(context.rank, 1, 1, context.progress, HostClock(), layout.world_size)
    meshes = context.meshes
    return ParallelMesh(layout, meshes, context.rank, ranks_per_node, recorder), recorder


class Recording:
    """Records what is sent inside a `with` block, all of it in one stage."""

    def __init__(self, recorder: Recorder, stage: Stage) -> None:
        self._recorder = recorder
        self._stage = stage
        self.record: RankRecord

    def __enter__(self) -> "Recording":
        self._recorder.begin_step(0, 1, record=True, count_idle=False)
        self._recorder.enter(self._stage, 0)
        return self

    def __exit__(self, *_: object) -> None:
        record = self._recorder.end_step()
        assert record is not None
        self.record = record


def on_host(context: RankContext, values: torch.Tensor) -> np.ndarray:
    """Values that may lie on a GPU, once it has them: it may wait for a rank that is lost."""
    if values.is_cuda:
        event = torch.cuda.Event()
        event.record()
        context.await_device(event)
    return values.cpu().numpy()


class Collective(Command[tuple[np.ndarray, RankRecord] | None]):
    """Call a group's method with `rows[rank]` and `arguments[rank]`; result and record."""

    layout: Layout
    ranks_per_node: int
    axis: str
    method: str
    rows: list[np.ndarray]
    arguments: list[list[Any]]


def collective(context: RankContext, command: Collective) -> tuple[np.ndarray, RankRecord] | None:
    joined = join(context, command.layout, command.ranks_per_node)
    if joined is None:
        return None
    mesh, recorder = joined
    rows, rest = command.rows[context.rank], command.arguments[context.rank]
    method = getattr(getattr(mesh, command.axis), command.method)
    with Recording(recorder, Stage.COLLECTIVES) as recording:
        received = method(torch.from_numpy(rows).to(context.platform.device), *rest).wait()
    return on_host(context, received), recording.record


class PassOn(Command[tuple[np.ndarray, RankRecord] | None]):
    """Send `rows` down the pipeline; what this rank received (its own at the start), its record."""

    layout: Layout
    ranks_per_node: int
    rows: np.ndarray


def pass_on(context: RankContext, command: PassOn) -> tuple[np.ndarray, RankRecord] | None:
    joined = join(context, command.layout, command.ranks_per_node)
    if joined is None:
        return None
    mesh, recorder = joined
    with Recording(recorder, Stage.HAND_OVER) as recording:
        held = torch.from_numpy(command.rows)
        if not mesh.is_first_stage:
            held = mesh.pp.receive(torch.empty_like(held), mesh.at.pp_rank - 1).wait()
        if not mesh.is_last_stage:
            sending = mesh.pp.send(held, mesh.at.pp_rank + 1)
            if sending is not None:
                sending.wait()
    return held.numpy(), recording.record


class MoeResult(NamedTuple):
    """What a rank saw of one dispatch and combine."""

    rows: np.ndarray
    num_tokens_per_expert: list[int]
    combined: np.ndarray
    dispatch: RankRecord
    combine: RankRecord


class DispatchAndCombine(Command[MoeResult | None]):
    """Experts that multiply by their number plus one, each of a group doing an equal part of it.

    `inputs[rank]`: x [T, H], topk_ids [T, K], topk_weights [T, K].
    """

    layout: Layout
    ranks_per_node: int
    placement: Placement
    form: DispatchForm
    inputs: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    payload: PayloadType = "model"


def dispatch_and_combine(context: RankContext, command: DispatchAndCombine) -> MoeResult | None:
    layout, placement, form = command.layout, command.placement, command.form
    joined = join(
        context, layout, command.ranks_per_node, hierarchical=DISPATCH_FORMS[form].by_node
    )
    if joined is None:
        return None
    mesh, recorder = joined
    choice = CopyChooser(mesh, placement, torch.device("cpu"))
    dispatcher = make_dispatcher(form, mesh, placement, choice, Payload(command.payload, recorder))
    x, topk_ids, topk_weights = (torch.from_numpy(array) for array in command.inputs[context.rank])
    num_of_rank = [len(of_rank[0]) for of_rank in command.inputs]
    tokens = RoutedTokens(x, topk_ids, topk_weights, num_of_rank)
    with Recording(recorder, Stage.DISPATCH) as dispatching:
        dispatched = interleave([dispatcher.dispatch(tokens)])
    arrived, pairs, sent = dispatched[0]
    experts = torch.tensor(placement.experts_of_rank[mesh.at.ep_rank])
    factors = (experts + 1.0).repeat_interleave(pairs.counts)
    rows = arrived[pairs.rows]
    results = torch.empty_like(rows)
    results[pairs.order] = rows * factors[:, None].to(rows.dtype) / layout.etp
    with Recording(recorder, Stage.COMBINE) as combining:
        combined = interleave([dispatcher.combine(sent, results)])[0]
    return MoeResult(
        rows.numpy(),
        pairs.counts.tolist(),
        combined.numpy(),
        dispatching.record,
        combining.record,
    )


class Echo(Command[tuple[int, Any]]):
    """The rank and what it was given."""

    value: Any


class Fail(Command[None]):
    """Raise on one rank, in the middle of a layer."""

    rank: int


def fail(context: RankContext, command: Fail) -> None:
    context.progress.set_step(3)
    context.progress.enter(Stage.EXPERTS, 2)
    if context.rank == command.rank:
        raise ValueError("two\nlines")


class Refuse(Command[None]):
    """Find a user's mistake on one rank."""

    rank: int


def refuse(context: RankContext, command: Refuse) -> None:
    if context.rank == command.rank:
        raise UserError("layout is too wide; valid: 1 to 3")


class Stay(Command[None]):
    """Take some time, showing progress after every part only."""

    seconds: float
    num_parts: int = 1


def stay(context: RankContext, command: Stay) -> None:
    context.progress.set_step(5)
    context.progress.enter(Stage.ATTENTION, 1)
    for _ in range(command.num_parts):
        time.sleep(command.seconds / command.num_parts)
        context.progress.touch()


class FailWhileOthersWait(Command[None]):
    """Raise on one rank while the others wait for it in a collective."""

    rank: int


def fail_while_others_wait(context: RankContext, command: FailWhileOthersWait) -> None:
    joined = join(context, Layout(dp=context.settings.world_size), 1)
    assert joined is not None
    mesh, _ = joined
    if context.rank == command.rank:
        context.progress.enter(Stage.ROUTER, 0)
        raise ValueError("broken")
    context.progress.enter(Stage.DISPATCH, 0)
    mesh.stage.all_gather(torch.zeros(1, 1), [1] * mesh.stage.size).wait()


class Exchange(Command[np.ndarray]):
    """All ranks tell each other something; [num_ranks, 4]: of each rank what it has told this one.

    That is: the epoch it is in, its rank, to whom it told this, and `value`.
    """

    value: int


def exchange(context: RankContext, command: Exchange) -> np.ndarray:
    num_ranks = context.settings.world_size
    joined = join(context, Layout(dp=num_ranks), 1)
    assert joined is not None
    mesh, _ = joined
    rows = [[context.epoch, context.rank, to, command.value] for to in range(num_ranks)]
    context.progress.enter(Stage.DISPATCH, 0)
    told, each = torch.tensor(rows, device=context.platform.device), [1] * num_ranks
    received = on_host(context, mesh.stage.all_to_all(told, each, each).wait())
    context.progress.enter(Stage.IDLE, NO_LAYER)
    return received


class ExchangeAmong(Command[np.ndarray]):
    """As `Exchange`, among some ranks, which are all that are asked."""

    ranks: list[int]
    value: int


def exchange_among(context: RankContext, command: ExchangeAmong) -> np.ndarray:
    ranks, meshes = tuple(command.ranks), context.meshes
    rows = torch.tensor([[context.epoch, context.rank, to, command.value] for to in ranks])
    if len(ranks) == 1:
        return np.array(rows)
    if ranks not in meshes._made:
        assert meshes._transport is not None, "the epoch is joined"
        meshes._transport.make(ranks)
        meshes._made.add(ranks)
    context.progress.enter(Stage.DISPATCH, 0)
    each, received = [1] * len(ranks), torch.empty_like(rows)
    context.progress.set_waiting(True)
    meshes.link(ranks).all_to_all(rows, each, received, each).wait()
    context.progress.set_waiting(False)
    context.progress.enter(Stage.IDLE, NO_LAYER)
    return np.array(received)


class LoseAmong(Command[np.ndarray]):
    """As `ExchangeAmong`, but some ranks are lost."""

    ranks: list[int]
    ways: dict[int, str]


def lose_among(context: RankContext, command: LoseAmong) -> np.ndarray:
    if (way := command.ways.get(context.rank)) is not None:
        context.progress.enter(Stage.ROUTER, 3)
        lose_rank(way)
    return exchange_among(context, ExchangeAmong(command.ranks, 0))


class Ahead(Command[tuple[int, Any]]):
    """The rank and what it was given, after some time; needs no epoch."""

    needs_epoch = False

    value: Any
    seconds: float = 0.0
    way: str = ""  # to be lost instead


def ahead(context: RankContext, command: Ahead) -> tuple[int, Any]:
    context.progress.touch()
    if command.way:
        lose_rank(command.way)
    time.sleep(command.seconds)
    return context.rank, command.value


class Describe(Command[tuple[int, int, int, str]]):
    """Its epoch, descriptors and threads, and how messages go."""


def describe(context: RankContext, command: Describe) -> tuple[int, int, int, str]:
    num_threads = torch.get_num_threads()
    return context.epoch, len(os.listdir("/proc/self/fd")), num_threads, context.platform.transport


class Lose(Command[np.ndarray]):
    """As `Exchange`, but some ranks are lost, by way, while the others wait for them."""

    ways: dict[int, str]


def lose(context: RankContext, command: Lose) -> np.ndarray:
    context.progress.set_step(7)
    if (way := command.ways.get(context.rank)) is not None:
        context.progress.enter(Stage.ROUTER, 3)
        lose_rank(way)
    return exchange(context, Exchange(0))


WAYS = ("kill", "stop", "raise", "exit", "compute")


def lose_rank(way: str) -> None:
    """Lose the rank that calls it."""
    if way in ("kill", "stop"):
        signal.raise_signal(signal.SIGKILL if way == "kill" else signal.SIGSTOP)
    elif way == "raise":
        raise ValueError("broken")
    elif way == "exit":
        os._exit(3)
    else:
        time.sleep(600)


LOST_AT_START = "LOST_AT_START"  # names a folder; in it, files named after ranks say how
NO_ROOM = "no room"  # a file there: there is none for more processes


def lose_at_start() -> None:
    """Have ranks be lost before they are up, as often as their files have words, or not start."""
    make_context = worker._context

    def context(settings: Any, *others: Any) -> RankContext:
        file = Path(os.environ[LOST_AT_START], str(settings.rank))
        if file.exists() and (ways := file.read_text().split()):
            file.write_text(" ".join(ways[1:]))
            lose_rank(ways[0])
        return make_context(settings, *others)

    fork = os.fork

    def fork_if_there_is_room() -> int:
        if Path(os.environ[LOST_AT_START], NO_ROOM).exists():
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    mock.patch.object(worker, "_context", context).start()
    mock.patch.object(os, "fork", fork_if_there_is_room).start()


def local_ranks(
    num_ranks: int,
    timeout_s: float,
    dtype: str | None = "float32",
    server_module: str = "distributed.on_ranks",
    *,
    recovers: bool = False,
) -> LocalRanks:
    """Ranks that know the commands of this file too."""
    return LocalRanks(num_ranks, timeout_s, dtype, server_module, recovers=recovers)


class RanksOnNodes(NodeRanks):
    """Ranks of several nodes, all on this machine, that know the commands of this file too.

    Attributes:
        supervisors: of the nodes after the first.
    """

    def __init__(
        self,
        num_nodes: int,
        ranks_per_node: int,
        timeout_s: float,
        dtype: str | None = "float32",
        *,
        recovers: bool = False,
        rejoin_s: float = 0.0,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            meeting = Meeting("127.0.0.1", free.getsockname()[1], False, "", num_nodes)
        common = (ranks_per_node, meeting, os.getpid(), timeout_s, dtype, True, rejoin_s)
        self._settings = [SupervisorSettings(node, *common) for node in range(num_nodes)]
        self.supervisors: list[subprocess.Popen[bytes]] = []
        for node in range(1, num_nodes):
            self.start_supervisor(node)
        super().__init__(
            *(meeting, ranks_per_node, timeout_s, dtype, "distributed.on_ranks"),
            recovers=recovers,
            rejoin_s=rejoin_s,
        )

    def start_supervisor(self, node: int) -> None:
        """Start another one of a node; the last of `supervisors` then."""
        command = supervisor_command(self._settings[node], "distributed.supervisor")
        self.supervisors.append(subprocess.Popen(command, start_new_session=True))

    def close(self, *, failed: bool = False) -> None:
        super().close(failed=failed)
        for each in self.supervisors:
            each.wait(15)


def handlers() -> Handlers:
    from expertlane.engine.stage.worker import HANDLERS

    planted = ExitStack()
    return {
        **HANDLERS,
        Collective: collective,
        PassOn: pass_on,
        DispatchAndCombine: dispatch_and_combine,
        Echo: lambda context, command: (context.rank, command.value),
        Fail: fail,
        Refuse: refuse,
        Stay: stay,
        FailWhileOthersWait: fail_while_others_wait,
        Plant: lambda context, command: plant(context, command, planted),
        FlipBit: flip_bit,
        Exchange: exchange,
        ExchangeAmong: exchange_among,
        LoseAmong: lose_among,
        Ahead: ahead,
        Describe: describe,
        Lose: lose,
    }


def main() -> None:
    if LOST_AT_START in os.environ:
        lose_at_start()
    if LINKS in os.environ:
        use_links(os.environ[LINKS])
    fork_server.main(handlers())
