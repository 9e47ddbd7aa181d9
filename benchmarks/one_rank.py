"""One rank of a deployment, alone on a device: the engine's own stage, with transfers left out.

What other ranks would send is what this one sends them, copied on the device, as if all ranks did
alike; each token's experts are set, in turn, so that all ranks have equally many. All else is
computed as in the engine: norms, attention over the paged cache, router, bookkeeping of dispatch,
packing, experts, sums, output head. Weights are drawn on the device; their values do not matter.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertlane.balance.holding import placements_of
from expertlane.engine.comm.clocks import clock_for
from expertlane.engine.comm.collectives import interleave
from expertlane.engine.comm.mesh import Meshes, ParallelMesh
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.comm.transport import Link, Work
from expertlane.engine.model.decode_graphs import DecodeGraphs
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.transformer import TransformerStage
from expertlane.engine.model.weights import WeightSource
from expertlane.results.step_record import RankRecord
from expertlane.schedule.plan import Batch
from expertlane.spec.deployment import DispatchForm, GraphLimits, Options, is_static_on
from expertlane.spec.layout import Layout, partition
from expertlane.spec.model import ModelConfig
from expertlane.spec.tensors import cut_dim, tensor_shape

BLOCK_SIZE, MOST_REPEATS, MOST_S = 16, 50, 0.5


class RandomWeights(WeightSource):
    """Drawn on the device.

    Attributes:
        in_turn: routers give experts in turn.
    """

    in_turn = False

    def _read(self, name: str, part: range | None, dtype: torch.dtype) -> Tensor:
        shape = list(tensor_shape(self.model, name))
        fan_in = shape[-1]
        if part is not None:
            shape[cut_dim(name)] = len(part)
        if name.endswith("norm"):
            return torch.ones(shape, dtype=dtype, device=self.device)
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(0, fan_in**-0.5)

    def once(
        self, layer: int | None, key: Hashable, make: Callable[[], Any], *, holds: bool = True
    ) -> Any:
        """As everywhere, but for routers."""
        made = super().once(layer, key, make, holds=holds)
        return InTurn(made) if self.in_turn and key == "router" else made


class InTurn:
    """A router that computes all it does, and then gives experts in turn."""

    def __init__(self, router: Any) -> None:
        self.params, self._router = router.params, router
        self._ids: dict[int, Tensor] = {}

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Router`."""
        hidden, topk_ids, weights = self._router(x)
        return hidden, self._in_turn(topk_ids), weights

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As `Router`."""
        topk_ids, weights = self._router.choose(hidden)
        return self._in_turn(topk_ids), weights

    def _in_turn(self, topk_ids: Tensor) -> Tensor:
        num_tokens, top_k = topk_ids.shape
        if num_tokens not in self._ids:
            ids = torch.arange(num_tokens * top_k, device=topk_ids.device)
            of_token = ids.view(num_tokens, top_k) % self.params.weight.shape[0]
            self._ids[num_tokens] = of_token.to(topk_ids.dtype)
        return self._ids[num_tokens]


class _Done(Work):
    """A transfer that is over as soon as it begins."""

    def __init__(self, received: Tensor) -> None:
        self.received = received

    def wait(self) -> None:
        """Nothing to wait for."""

    let_go = wait


class AloneLink(Link):
    """Transfers of a group of which only this rank is there.

    Args:
        place: of this rank in it.

    Attributes:
        copied_bytes: in place of what would have come from other ranks.
    """

    def __init__(self, place: int, size: int, device: torch.device) -> None:
        self._place, self._size, self._device = place, size, device
        self.copied_bytes = 0
        self._known: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """As `Link`."""
        return torch.empty(num_rows, width, dtype=dtype, device=self._device)

    def all_to_all(
        self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]
    ) -> _Done:
        """As `Link`: rows for this place come from every place."""
        first = sum(send[: self._place])
        return self._fill(rows[first : first + send[self._place]], received, receive)

    def all_gather(self, rows: Tensor, received: Tensor, num_rows_of: Sequence[int]) -> _Done:
        """As `Link`: every place has the rows of this one."""
        return self._fill(rows, received, num_rows_of)

    def _fill(self, own: Tensor, received: Tensor, receive: Sequence[int]) -> _Done:
        """Everyone sends what this rank sends itself, from the start again where that is fewer."""
        if len(set(receive)) == 1 and receive[0] == len(own):
            received.view(len(receive), *own.shape).copy_(own)
        elif len(received):
            torch.index_select(own, 0, self._places(len(own), tuple(receive)), out=received)
        self.copied_bytes += received.nbytes - received.nbytes // self._size
        return _Done(received)

    def _places(self, num_own: int, receive: tuple[int, ...]) -> Tensor:
        if (num_own, receive) not in self._known:
            places = np.concatenate([np.arange(num) % max(1, num_own) for num in receive])
            self._known[num_own, receive] = torch.from_numpy(places).to(self._device)
        return self._known[num_own, receive]


class AloneTransport:
    """Links of groups of which only one rank is there."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self.links: dict[tuple[int, ...], AloneLink] = {}

    def make(self, ranks: tuple[int, ...]) -> None:
        """Nobody else has to know."""

    def link(self, ranks: tuple[int, ...]) -> AloneLink:
        """Of a group."""
        if ranks not in self.links:
            self.links[ranks] = AloneLink(ranks.index(self._rank), len(ranks), self._device)
        return self.links[ranks]

    def leave(self) -> None:
        """Let go of all."""
        self.links.clear()


class OneRank:
    """A rank of a layout, and steps of it.

    Args:
        rank: of the layout.

    Attributes:
        form_of_graphs: the dispatch form in which steps can be recorded.
    """

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        ranks_per_node: int = 8,
    ) -> None:
        self.model, self.layout, self.rank, self.device = model, layout, rank, device
        num, board, clock = layout.world_size, ProgressBoard(layout.world_size), clock_for(device)
        self._recorder = Recorder(
            rank, model.num_hidden_layers, model.num_experts, board.reporter(rank), clock, num
        )
        self._transport = AloneTransport(rank, device)
        meshes = Meshes(self._transport)
        meshes.make(layout)
        mesh = ParallelMesh(layout, meshes, rank, ranks_per_node, self._recorder)
        self.placements = placements_of(model, layout, Options())
        source = RandomWeights(model, dtype, device, lambda: None)
        source.in_turn = layout.stage_size > 1  # one rank alone has all experts in any case
        self.stage = TransformerStage(model, self.placements, source, mesh)
        self.form_of_graphs = next(
            (form for form in ("static", "all_gather") if is_static_on(layout, form)), "all_to_all"
        )
        self.stage.set_forms(("all_to_all", self.form_of_graphs), "model")

    def step(
        self, num_seqs: int, num_computed: int, num_new: int, form: DispatchForm = "all_to_all"
    ) -> Callable[[], Any]:
        """A step of equal sequences, each call of which is the same again; its result.

        Args:
            num_seqs: of each data-parallel rank.
            num_computed, num_new: positions before, and new tokens, of each.
        """
        batch = self._batch(num_seqs, num_computed, num_new)
        self.stage.allocate_cache(batch.block_tables.size, BLOCK_SIZE)
        at, layout = self.layout.coordinates(self.rank), self.layout
        num_tokens = [batch.num_tokens] * layout.dp

        def step() -> Any:
            part = ForwardBatch(batch, num_tokens, layout, at, self.device, BLOCK_SIZE, form)
            if at.pp_rank:
                x = self.stage.empty_hidden(part.num_owned).fill_(0.01)
            else:
                x = self.stage.embed(part)
            return interleave([self.stage.forward(x, part, False)])[0]

        return step

    def graph_step(self, num_seqs: int, num_computed: int) -> Callable[[], Any] | None:
        """A decode step as the engine launches it as a graph; None where the device has none.

        In the dispatch form that can be recorded; each call fills the graph's inputs first.
        """
        batch = self._batch(num_seqs, num_computed, 1)
        num_blocks = batch.block_tables.size
        self.stage.allocate_cache(num_blocks + 1, BLOCK_SIZE)  # one for sequences of padding
        graphs = DecodeGraphs.of(
            self.stage,
            GraphLimits(num_seqs, num_computed + 1),
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            records_transfers=True,  # they are copies
            await_device=lambda event: event.synchronize(),
        )
        if graphs is None:
            return None
        arrived = None
        if not self.stage.mesh.is_first_stage:
            num_owned = len(partition(num_seqs, self.layout.tp)[self.stage.mesh.at.tp_rank])
            arrived = self.stage.empty_hidden(num_owned).fill_(0.01)
        num_tokens = [batch.num_tokens] * self.layout.dp

        def step() -> Any:
            part = graphs.padded(batch, num_tokens, self.form_of_graphs)
            assert part is not None, "it is not too large"
            return graphs.run(part, arrived)

        return step

    def _batch(self, num_seqs: int, num_computed: int, num_new: int) -> Batch:
        width = -(-(num_computed + num_new) // BLOCK_SIZE)
        tokens = np.random.default_rng(0).integers(0, self.model.vocab_size, num_seqs * num_new)
        return Batch(
            seq_ids=np.arange(num_seqs),
            num_scheduled_tokens=np.full(num_seqs, num_new),
            num_computed_tokens=np.full(num_seqs, num_computed),
            token_ids=tokens,
            block_tables=np.arange(num_seqs * width, dtype=np.int32).reshape(num_seqs, width),
            yields_token=np.ones(num_seqs, dtype=np.bool_),
        )

    def record(self, step: Callable[[], object]) -> RankRecord:
        """What the engine counts of a step."""
        self._recorder.begin_step(0, 1, record=True, count_idle=False, record_routing=True)
        step()
        record = self._recorder.end_step()
        assert record is not None, "it was asked for"
        return record

    @property
    def copied_bytes(self) -> int:
        """So far, in place of transfers."""
        return sum(link.copied_bytes for link in self._transport.links.values())


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of some calls, each with the device's work done, by the host's clock."""
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        work()
    finish()
    found: list[float] = []
    until = time.perf_counter() + MOST_S
    while len(found) < MOST_REPEATS and (time.perf_counter() < until or len(found) < 3):
        began = time.perf_counter()
        work()
        finish()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def kernel_seconds(work: Callable[[], object], device: torch.device) -> float | None:
    """What the kernels of a call take together, without gaps between them; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    repeats = 5
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
    taken = sum(event.self_device_time_total for event in found.key_averages())
    return taken / 1e6 / repeats
