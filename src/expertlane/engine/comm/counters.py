"""The counts of a rank: FLOPs, bytes, tokens of experts and fan-out of a step; running totals.

Unlike the counters of a recorded step, the meter is cheap enough for every step of a server, and
lets layers run in one C++ call, which adds to the same memory.
"""

from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.engine.comm.progress import NO_LAYER
from expertlane.results.step_record import RankRecord, RankTotals
from expertlane.spec.names import Link, Stage, Traffic

# Cells that C++ adds to: the time when the current stage began, the stage, nanoseconds by stage.
_STAGE, _SPENT = 1, 2
_OWN = len(Link)  # in place of a link: rows that stay on the rank

Sent = tuple[int, ...]  # bytes by link


def links_of(nodes: Sequence[int], rank: int) -> list[int]:
    """The kind of link [size] from one place in a group to each, for `Meter.sent`.

    Args:
        nodes: [size]; node of each member.
        rank: the sender's place in the group.
    """
    links = [Link.INTRA_NODE if node == nodes[rank] else Link.INTER_NODE for node in nodes]
    return [_OWN if place == rank else int(link) for place, link in enumerate(links)]


class Meter:
    """Totals since the meter was made; see `RankTotals`.

    Attributes:
        num_steps: steps; counted by the recorder.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_steps = 0
        self._cells = array("q", [monotonic_ns(), Stage.IDLE, *[0] * len(Stage)])
        self._waited = [0] * len(Stage)
        self._sent = [0] * (len(Link) + 1)
        self._overlapped = self._exposed = 0
        self._tokens = np.zeros((num_layers, num_experts), dtype=np.int64)
        # By layer: the experts held now, and tokens of each since they are held.
        self._held: dict[int, tuple[Sequence[int], Tensor]] = {}

    @property
    def address(self) -> int:
        """Address of the cells that C++ adds to, int64 each."""
        return self._cells.buffer_info()[0]

    def enter(self, stage: Stage, now_ns: int) -> None:
        """End the current stage at `now_ns`, and begin another."""
        cells = self._cells
        cells[2 + cells[1]] += now_ns - cells[0]  # hot: names would cost a third more
        cells[0], cells[1] = now_ns, stage

    def waited(self, begun_ns: int) -> None:
        """Add a wait for other ranks, which ends now, to the current stage."""
        waited_ns = monotonic_ns() - begun_ns
        self._waited[self._cells[_STAGE]] += waited_ns

    def transferred(self, posted_ns: int, needed_ns: int) -> None:
        """Add a transfer that ends now: hidden until `needed_ns`, exposed from then on."""
        self._overlapped += needed_ns - posted_ns
        self._exposed += monotonic_ns() - needed_ns

    def sent(self, links: Sequence[int], num_rows: Sequence[int], row_bytes: int) -> None:
        """Add rows that are sent to the members of a group.

        Args:
            links: [size]; of `links_of`.
            num_rows: [size].
        """
        sent = self._sent
        for link, num in zip(links, num_rows, strict=True):
            sent[link] += num * row_bytes

    def sent_by(self, run: Callable[[], None]) -> Sent:
        """Bytes that a call sends, by link; they are not added to the totals.

        A graph that records the call adds them with `add_sent` each time it is launched.
        """
        before, self._sent = self._sent, [0] * len(self._sent)
        run()
        sent, self._sent = tuple(self._sent), before
        return sent

    def add_sent(self, sent: Sent) -> None:
        """Add the bytes that a launched graph sends, as no Python counts them."""
        self._sent = [total + more for total, more in zip(self._sent, sent, strict=True)]

    def counts(self, layer: int, experts: Sequence[int], device: torch.device) -> Tensor:
        """Counts [num_held] int64 of tokens of each expert held in a layer; callers add to them.

        Args:
            experts: [num_held]; logical ids. The same object as long as they do not change.
        """
        held = self._held.get(layer)
        if held is None or held[0] is not experts:
            self._take(layer)
            held = experts, torch.zeros(len(experts), dtype=torch.int64, device=device)
            self._held[layer] = held
        return held[1]

    def _take(self, layer: int) -> None:
        if layer in self._held:
            experts, counts = self._held[layer]
            np.add.at(self._tokens[layer], list(experts), counts.cpu().numpy())
            counts.zero_()

    def totals(self) -> RankTotals:
        """The totals so far, the current stage included."""
        now_ns = monotonic_ns()
        self.enter(Stage(self._cells[_STAGE]), now_ns)
        for layer in self._held:
            self._take(layer)
        experts = np.flatnonzero(self._tokens.any(axis=0))
        return RankTotals(
            num_steps=self.num_steps,
            spent_ns=_whole(self._cells[_SPENT:]),
            waited_ns=_whole(self._waited),
            experts=experts.astype(np.int64),
            num_tokens=np.ascontiguousarray(self._tokens[:, experts]),
            sent_bytes=_whole(self._sent[:_OWN]),
            overlapped_ns=self._overlapped,
            exposed_ns=self._exposed,
        )


def _whole(numbers: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


_NUM_STAGES = len(Stage)


class StepCounters:
    """Adds up the counts of a step's call sites, by the current stage or layer.

    Args:
        rank: global rank.
        world_size: ranks of the layout, replicas included.

    Attributes:
        stage, layer: the current ones.
        is_recording: this step is counted.
        meter: running totals, of steps without a record too; None until they are asked for.
    """

    def __init__(self, rank: int, num_layers: int, num_experts: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._num_layers = num_layers
        self._num_experts = num_experts
        self.stage = Stage.IDLE
        self.layer = NO_LAYER
        self.is_recording = self._recording_routing = False
        self.meter: Meter | None = None
        self._clear_counts()

    def _clear_counts(self) -> None:
        self._flops = [0] * _NUM_STAGES
        self._weight_bytes = [0] * _NUM_STAGES
        self._num_collectives = [0] * _NUM_STAGES
        self._kv_bytes = 0
        self._sent_bytes: defaultdict[tuple[Stage, Traffic], list[int]] = defaultdict(
            lambda: [0] * self._world_size
        )
        self._tokens = np.zeros((self._num_layers, self._num_experts), dtype=np.int64)
        self._by_ranks_reached, self._by_nodes_reached = np.zeros(
            (2, self._world_size + 1), dtype=np.int64
        )
        self._num_remote_rank_copies = self._num_remote_node_copies = 0
        self._payload_squares = np.zeros(2)
        self._topk_ids: defaultdict[int, list[Tensor]] = defaultdict(list)  # by layer

    def count_compute(self, flops: int, weight_bytes: int, kv_bytes: int = 0) -> None:
        """Add FLOPs, and bytes read of weights and of the KV cache, to the current stage."""
        if self.is_recording:
            self._flops[self.stage] += flops
            self._weight_bytes[self.stage] += weight_bytes
            self._kv_bytes += kv_bytes

    def count_expert_tokens(self, experts: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Add token-expert pairs of the current layer.

        Args:
            experts: [n]; logical experts, no expert twice.
            num_tokens: [n]; pairs of each.
        """
        if self.is_recording:
            self._tokens[self.layer, list(experts)] += num_tokens

    def record_topk_ids(self, topk_ids: Tensor) -> None:
        """Keep the top-k ids of the current layer, if the plan asks for routing.

        Args:
            topk_ids: [T, K]; logical experts of this rank's own tokens.
        """
        if self._recording_routing:
            self._topk_ids[self.layer].append(topk_ids.to("cpu", torch.int32, copy=True))

    def count_fan_out(
        self,
        ranks_reached: Tensor,
        nodes_reached: Tensor,
        num_remote_rank_copies: int,
        num_remote_node_copies: int,
    ) -> None:
        """Add the fan-out of one layer's tokens.

        Args:
            ranks_reached, nodes_reached: [T] whole numbers; ranks and nodes that each token
                reaches, this one included if it computes experts of the token.
            num_remote_rank_copies: (token, rank on another node) pairs.
            num_remote_node_copies: (token, other node) pairs.
        """
        if self.is_recording:
            num = self._world_size + 1
            self._by_ranks_reached += np.bincount(ranks_reached.cpu().numpy(), minlength=num)
            self._by_nodes_reached += np.bincount(nodes_reached.cpu().numpy(), minlength=num)
            self._num_remote_rank_copies += num_remote_rank_copies
            self._num_remote_node_copies += num_remote_node_copies

    def count_payload_error(self, error_squares: float, squares: float) -> None:
        """Add the rounding error of hidden states that are sent in a narrower type.

        Args:
            error_squares: sum of the squared errors.
            squares: sum of the squared hidden states.
        """
        if self.is_recording:
            self._payload_squares += (error_squares, squares)

    def _count_sent(
        self,
        to: Sequence[int],
        num_rows: Sequence[int],
        row_bytes: int,
        metadata_bytes: int,
        num_real: Sequence[int] | None,
    ) -> None:
        """Add a collective or send; for its arguments see `Recorder.post`."""
        self._num_collectives[self.stage] += 1
        real = num_rows if num_real is None else num_real
        counted = [
            (Traffic.PAYLOAD, real, row_bytes - metadata_bytes),
            (Traffic.METADATA, real, metadata_bytes),
        ]
        if num_real is not None:
            padding = [a - b for a, b in zip(num_rows, num_real, strict=True)]
            counted.append((Traffic.PADDING, padding, row_bytes))
        for traffic, rows, num_bytes in counted:
            if num_bytes:
                of_rank = self._sent_bytes[self.stage, traffic]
                for rank, num in zip(to, rows, strict=True):
                    of_rank[rank] += num * num_bytes

    def _counted(self, **times: Any) -> RankRecord:
        """The record of the step, of these counts and the fields given."""
        sent_bytes = np.zeros((_NUM_STAGES, len(Traffic), self._world_size), dtype=np.int64)
        for (stage, traffic), of_rank in self._sent_bytes.items():
            sent_bytes[stage, traffic] = of_rank
        sent_bytes[..., self._rank] = 0
        return RankRecord(
            rank=self._rank,
            flops=np.array(self._flops, dtype=np.int64),
            weight_bytes=np.array(self._weight_bytes, dtype=np.int64),
            kv_bytes=self._kv_bytes,
            sent_bytes=sent_bytes,
            num_collectives=np.array(self._num_collectives, dtype=np.int64),
            num_tokens_per_expert=self._tokens,
            tokens_by_ranks_reached=self._by_ranks_reached,
            tokens_by_nodes_reached=self._by_nodes_reached,
            num_remote_rank_copies=self._num_remote_rank_copies,
            num_remote_node_copies=self._num_remote_node_copies,
            payload_squares=self._payload_squares,
            topk_ids={layer: torch.cat(ids).numpy() for layer, ids in self._topk_ids.items()},
            **times,
        )
