"""Ranks of which one is lost, again and again: `python -m comm.epoch_ranks KIND SEED…`.

This process stands for the fork servers of all nodes: it forks ranks, and begins epochs. Ranks
exchange rows until one of them dies or stops at a drawn moment; in the last epoch they end. Each
row says of which epoch, step, source and destination it is. A line of JSON for each seed says how
ranks left epochs, what they had when they joined others, and how they ended.
"""

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed.links import use_links
from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.collectives import interleave
from expertlane.engine.comm.mesh import Meshes, ParallelMesh
from expertlane.engine.comm.progress import ProgressBoard, Region
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.comm.transport import Epoch, EpochEndedError, PeerLostError
from expertlane.engine.ops.backend import SHARED_MEMORY, STAGED, Platform, compiled_messages
from expertlane.engine.ops.host import Share
from expertlane.engine.ranks.fork_server import StoreHost
from expertlane.engine.ranks.rank_settings import RankSettings
from expertlane.engine.ranks.rendezvous import Meeting
from expertlane.engine.stage import context
from expertlane.spec.layout import Layout

KINDS = ("shared_memory", "gloo", "nodes", "staged", "native")
NUM_RANKS = 4
LAYOUT = Layout.parse("dp=4,ep=4")
LAST_EPOCH, NUM_STEPS = 3, 24
_PATIENCE_S = 30.0
_BLOCKED_S = 0.15  # until all that wait for a lost rank do
_BOUND_S = 600.0  # on waits: more than a test may take
_MEMORY = "expertlane-memory"
_NOBODY, _RUNS = 0, -1000  # in place of a process, and of its exit code

Report = Callable[..., None]


@dataclass(frozen=True)
class Harm:
    """What happens to a rank of an epoch, and when.

    Attributes:
        number: of the signal that it sends itself.
        delay_us: of a wait, or of joining the epoch, before it does.
        late: another rank, which begins that step when the epoch is over.
    """

    epoch: int
    rank: int
    late: int
    number: int
    step: int
    moment: str
    delay_us: int

    @classmethod
    def drawn(cls, random: np.random.Generator, epoch: int) -> "Harm":
        rank, late = random.choice(NUM_RANKS, 2, replace=False).tolist()
        number = int(random.choice([signal.SIGKILL, signal.SIGSTOP]))
        if epoch == LAST_EPOCH - 1:
            return cls(epoch, rank, late, number, -1, "joining", int(random.integers(0, 60_000)))
        moment = str(random.choice(["before", "begun", "waiting"]))
        step, delay_us = int(random.integers(4, 24)), int(random.integers(0, 2000))
        return cls(epoch, rank, late, number, step, moment, delay_us)

    def at(self, rank: int, epoch: int, step: int, moment: str, board: ProgressBoard) -> None:
        """Do it if this is the moment, or a later one: some steps have no wait."""
        if epoch != self.epoch or step < self.step:
            return
        if rank == self.rank and moment == self.moment:
            if moment in ("waiting", "joining"):
                threading.Thread(target=self._happen_later, daemon=True).start()
            else:
                signal.raise_signal(self.number)
        elif rank == self.late and step == self.step and moment == "before":
            until_s, present = time.monotonic() + _PATIENCE_S, Epoch(board, epoch)
            while not present.has_ended and time.monotonic() < until_s:
                time.sleep(_BLOCKED_S / 10)

    def _happen_later(self) -> None:
        time.sleep(self.delay_us / 1e6)
        os.kill(os.getpid(), self.number)


class Rank:
    """What a rank does."""

    def __init__(
        self,
        settings: RankSettings,
        transport: str,
        harms: list[Harm],
        report: Report,
        ended: mmap.mmap,
    ) -> None:
        self._settings, self._harms, self._report = settings, harms, report
        self._ended = ended
        self._platform = Platform(torch.device("cpu"), transport, torch.float32, "CPU", "torch")
        self._board = ProgressBoard(NUM_RANKS, settings.board_fd)
        self._meshes = Meshes()
        self._mesh: ParallelMesh | None = None

    def live(self) -> None:
        """Take part in epochs, to the end of the last one."""
        epoch = self._settings.epoch
        while True:
            try:
                mesh = self._join(epoch)
                for step in range(NUM_STEPS if epoch == LAST_EPOCH else 10**9):
                    self._take_step(mesh, epoch, step)
                self._wait_for_all()
                self._meshes.leave()
                return
            except (EpochEndedError, PeerLostError) as error:
                self._report(left=epoch, error=type(error).__name__, text=str(error))
            while self._board.epoch <= epoch:
                time.sleep(0.002)
            epoch = self._board.epoch

    def _wait_for_all(self) -> None:
        """As the launcher does before it ends ranks: a connection that ends may lose rows."""
        self._ended[self._settings.rank] = 1
        while sum(self._ended[:NUM_RANKS]) < NUM_RANKS:
            time.sleep(0.002)

    def _join(self, epoch: int) -> ParallelMesh:
        share, rank = Share(NUM_RANKS, 1, ()), self._settings.rank
        self._meshes.renew(
            context.connect(self._settings, self._platform, share, self._board, epoch)
        )
        for each in self._harms:
            each.at(rank, epoch, -1, "joining", self._board)
        self._meshes.make(LAYOUT, NUM_RANKS // 2)
        if self._mesh is None:
            progress = self._board.reporter(rank)
            recorder = Recorder(rank, 1, 1, progress, HostClock(), NUM_RANKS)
            self._mesh = ParallelMesh(LAYOUT, self._meshes, rank, NUM_RANKS // 2, recorder)
        else:
            self._mesh.renew()
        maps = Path("/proc/self/maps").read_text()
        num_fds = len(os.listdir("/proc/self/fd"))
        self._report(
            **{"joined": epoch, "num_mapped": maps.count(_MEMORY), "num_fds": num_fds},
            num_threads=len(os.listdir("/proc/self/task")),
        )
        return self._mesh

    def _take_step(self, mesh: ParallelMesh, epoch: int, step: int) -> None:
        """Rows to all, the same for all, to one other, and to all in one call; at times none."""
        own = self._settings.rank

        def harm(moment: str) -> None:
            for each in self._harms:
                each.at(own, epoch, step, moment, self._board)

        group = (mesh.ep, mesh.ep_intra, mesh.ep_inter, mesh.ep)[step % 4]
        others = [rank for rank in group.ranks if rank != own]
        to_each = [(own, to) for to in group.ranks]
        from_each = [(source, own) for source in group.ranks]
        send = [num_rows(step, *pair) for pair in to_each]
        receive = [num_rows(step, *pair) for pair in from_each]
        harm("before")
        if step % 4 == 0:
            pending = [group.all_to_all(rows_of(epoch, step, to_each), send, receive)]
        elif step % 4 == 1:
            from_each = [(source, source) for source in group.ranks]
            counts = [num_rows(step, *pair) for pair in from_each]
            pending = [group.all_gather(rows_of(epoch, step, [(own, own)]), counts)]
        elif step % 4 == 2:
            (other,) = others
            place, from_each = group.ranks.index(other), [(other, own)]
            room = torch.full_like(rows_of(epoch, step, from_each), -1.0)
            sending = group.send(rows_of(epoch, step, [(own, other)]), place)
            pending = [group.receive(room, place)] + [sending] * (sending is not None)
        harm("begun")
        harm("waiting")
        if step % 4 == 3:
            exchanged = group.exchanged(rows_of(epoch, step, to_each), send, receive)
            found = interleave([exchanged])[0]
        else:
            found, *_ = [each.wait() for each in pending]
        assert torch.equal(found, rows_of(epoch, step, from_each)), (own, epoch, step, found)


def num_rows(step: int, source: int, to: int) -> int:
    """How many are sent; none at all in every seventh step."""
    return (source + 2 * to + step) % 4 * (step % 7 > 0)


def rows_of(epoch: int, step: int, pairs: Iterable[tuple[int, int]]) -> Tensor:
    """[num_rows, 1]; of pairs of source and destination, whole numbers that float32 has exactly."""
    values = [
        float(((epoch * 1000 + step % 1000) * NUM_RANKS + source) * NUM_RANKS + to)
        for source, to in pairs
        for _ in range(num_rows(step, source, to))
    ]
    return torch.tensor(values).view(-1, 1)


class Servers:
    """The fork servers of all nodes.

    Args:
        meeting: None where all ranks are on one node.
    """

    def __init__(self, kind: str, harms: list[Harm], meeting: Meeting | None) -> None:
        self._transport = "gloo" if kind in ("gloo", "native") else SHARED_MEMORY
        self._transport += STAGED if kind == "staged" else ""
        num_nodes = meeting.num_nodes if meeting else 1
        self._per_node = NUM_RANKS // num_nodes
        self._meeting, self._harms = meeting, harms
        self._board_fds = [os.memfd_create("board") for _ in range(num_nodes)]
        self._boards = [ProgressBoard(NUM_RANKS, fd) for fd in self._board_fds]
        self._files = self._new_files()
        self._pids, self._ended = [_NOBODY] * NUM_RANKS, mmap.mmap(-1, NUM_RANKS)
        self._reading, self._writing = os.pipe()

    def _new_files(self) -> list[tuple[int, int]]:
        files = []
        for _ in self._board_fds:
            memory_fd, store_fd = os.memfd_create(_MEMORY), os.memfd_create("store")
            os.ftruncate(memory_fd, Region(self._per_node).num_bytes)
            files.append((memory_fd, store_fd))
        return files

    def fork(self, ranks: Iterable[int], epoch: int) -> None:
        """Start ranks."""
        for rank in ranks:
            node, local_rank = divmod(rank, self._per_node)
            memory_fd, store_fd = self._files[node]
            settings = RankSettings(
                rank=rank,
                world_size=NUM_RANKS,
                local_rank=local_rank,
                num_local_ranks=self._per_node,
                board_fd=self._board_fds[node],
                memory_fd=memory_fd,
                store_path=f"/proc/self/fd/{store_fd}",
                meeting=self._meeting,
                timeout_s=_BOUND_S,
                dtype="float32",
                epoch=epoch,
            )
            self._pids[rank] = os.fork()
            if self._pids[rank] == 0:
                self._be(settings)

    def _be(self, settings: RankSettings) -> None:
        code = 1
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with this process
            torch.set_num_threads(1)

            def report(**values: Any) -> None:
                line = {"rank": settings.rank, "time_s": time.monotonic(), **values}
                os.write(self._writing, (json.dumps(line) + "\n").encode())

            Rank(settings, self._transport, self._harms, report, self._ended).live()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def begin_epoch(self, epoch: int, lost: Iterable[int]) -> float:
        """Fence ranks that are lost, and have others in their places; when the epoch began."""
        for rank in lost:
            if pid := self._pids[rank]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self._pids[rank] = _NOBODY
        old, self._files = self._files, self._new_files()
        began_s = time.monotonic()
        for board, files in zip(self._boards, self._files, strict=True):
            board.begin_epoch(epoch, os.getpid(), *files, num_ranks=0)  # nobody asks for it
        for fd in (fd for files in old for fd in files):
            os.close(fd)
        self.fork(lost, epoch)
        return began_s

    def wait_for_harm(self, rank: int) -> None:
        """Until a rank has died, or stopped."""
        _, status = os.waitpid(self._pids[rank], os.WUNTRACED)
        assert os.WIFSIGNALED(status) or os.WIFSTOPPED(status), f"rank {rank} ended: {status}"
        if os.WIFSIGNALED(status):
            self._pids[rank] = _NOBODY

    def end(self) -> tuple[list[int], list[dict[str, Any]]]:
        """How ranks end, and what they have reported."""
        codes = dict.fromkeys(self._pids, _RUNS)
        while _RUNS in codes.values():
            pid, status = os.waitpid(-1, 0)
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid]:  # the others would wait for it
                for other in [each for each, code in codes.items() if code == _RUNS]:
                    os.kill(other, signal.SIGKILL)
        os.close(self._writing)
        with os.fdopen(self._reading) as reports:
            lines = [json.loads(line) for line in reports]
        for fd in [*self._board_fds, *(fd for f in self._files for fd in f)]:
            os.close(fd)
        return list(codes.values()), lines


def run(kind: str, seed: int, meeting: Meeting | None) -> dict[str, Any]:
    """Two losses, and a third one while the next epoch begins."""
    random = np.random.default_rng(seed)
    harms = [Harm.drawn(random, epoch) for epoch in range(LAST_EPOCH)]
    servers = Servers(kind, harms, meeting)
    servers.fork(range(NUM_RANKS), 0)
    began_s = {}
    for harm in harms:
        servers.wait_for_harm(harm.rank)
        time.sleep(_BLOCKED_S)
        began_s[harm.epoch] = servers.begin_epoch(harm.epoch + 1, [harm.rank])
    codes, reports = servers.end()
    for each in reports:
        if "left" in each:
            each["after_s"] = round(each["time_s"] - began_s.get(each["left"], 0.0), 3)
    return {
        "harms": [asdict(harm) for harm in harms],
        "codes": codes,
        "left": [each for each in reports if "left" in each],
        "joined": [each for each in reports if "joined" in each],
    }


def main(kind: str, seeds: list[int]) -> None:
    """Run all seeds in turn."""
    meeting = host = None
    if kind == "nodes":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        meeting = Meeting("127.0.0.1", port, False, "test", 2)
        host = StoreHost(meeting)
    library, why_not = compiled_messages()
    if kind in ("shared_memory", "nodes", "staged") and library is None:
        print(json.dumps({"skipped": why_not}))
        return
    if kind == "native":
        use_links(kind)
    for seed in seeds:
        named = meeting.of_run(f"test-{seed}") if meeting else None
        print(json.dumps(run(kind, seed, named)), flush=True)
    if host is not None:
        host.end()


if __name__ == "__main__":
    main(sys.argv[1], [int(each) for each in sys.argv[2:]])
