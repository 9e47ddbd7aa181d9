"""The backend with our C++ for any CPU: bookkeeping of dispatch, and sums.

Only `engine/ops/backend.py` chooses it.
"""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from expertlane.balance.copies import PATHS_OF_RANK, BalancedCopies
from expertlane.engine.ops.bookkeeping import Outgoing, PeerRows
from expertlane.engine.ops.library import function_of
from expertlane.engine.ops.products import PairGroups
from expertlane.engine.ops.row_parts import RowParts
from expertlane.engine.ops.torch_backend import TorchBackend

_SUMMED = (torch.float32, torch.bfloat16)


class CpuBackend(TorchBackend):
    """The bookkeeping of dispatch (`dispatch.cpp`) and sums (`sums.cpp`), for any CPU.

    Attributes:
        baseline: the library that every CPU can use.
        instructions: the name of the instruction set that computes.
    """

    instructions = "baseline"

    def __init__(self, baseline: ctypes.CDLL) -> None:
        self.baseline = baseline
        self._choose_copies = function_of(baseline, "choose_copies", "pnpnpnnp")
        self._rows_by_peer = function_of(baseline, "rows_by_peer", "pnnninipppp", "n")
        self._group_pairs = function_of(baseline, "group_pairs", "pnnniinnppppp", "n")
        self._outgoing = function_of(baseline, "outgoing", "pnnpnpnninppppp", "n")
        self._leaving = function_of(baseline, "leaving", "pnninpppp", "n")
        self._balance_copies = function_of(baseline, "balance_copies", "ppnnnnnppppnpp")
        self._rows_and_pairs = function_of(baseline, "rows_and_pairs", "ppnninp")
        self._fan_out = function_of(baseline, "fan_out", "pnninpnppp")
        self._pack_rows = function_of(baseline, "pack_rows", "pnnnpppp")
        self._take_sums(baseline)

    def _take_sums(self, library: ctypes.CDLL) -> None:
        self._gather_sum = function_of(library, "gather_sum", "ippnppnnnp")
        self._sum_parts = function_of(library, "sum_parts", "ipnnp")

    def choose_copies(
        self, topk_ids: Tensor, table: Tensor, num_copies: Tensor, first: int
    ) -> Tensor:
        assert topk_ids.dtype is torch.int64, "kernels take its memory as it is"
        topk_ids = topk_ids.contiguous()
        physical = torch.empty(topk_ids.shape, dtype=torch.int32)
        self._choose_copies(
            *(topk_ids.data_ptr(), topk_ids.numel(), table.data_ptr(), table.shape[1]),
            *(num_copies.data_ptr(), num_copies.shape[0], first, physical.data_ptr()),
        )
        return physical

    def rows_by_peer(
        self, ids: Tensor, divisor: int, num_peers: int, *, padded: bool = False
    ) -> PeerRows:
        num_tokens, top_k = ids.shape
        most = num_tokens * (num_peers if padded else min(top_k, num_peers))
        counts, tokens = (torch.empty(num, dtype=torch.int64) for num in (num_peers, most))
        ids_there = torch.empty(most, top_k, dtype=torch.int32)
        places = torch.empty(num_tokens, num_peers, dtype=torch.int64)
        num_rows = self._rows_by_peer(
            *(ids.data_ptr(), ids.stride(0), num_tokens, top_k, divisor, num_peers, padded),
            *(counts.data_ptr(), tokens.data_ptr(), ids_there.data_ptr(), places.data_ptr()),
        )
        return PeerRows(counts, tokens[:num_rows], ids_there[:num_rows], places)

    def fan_out(
        self, ids: Tensor, divisor: int, nodes: Tensor, node: int
    ) -> tuple[Tensor, Tensor, int, int]:
        num_tokens, top_k = ids.shape
        ranks, num_nodes = torch.empty(2, num_tokens, dtype=torch.int64).unbind()
        remote = array("q", [0, 0])
        self._fan_out(
            *(ids.data_ptr(), num_tokens, top_k, divisor, nodes.shape[0], nodes.data_ptr(), node),
            *(ranks.data_ptr(), num_nodes.data_ptr(), remote.buffer_info()[0]),
        )
        return ranks, num_nodes, remote[0], remote[1]

    def group_pairs(
        self, ids: Tensor, first: int, divisor: int, num_groups: int, num_pairs: int | None = None
    ) -> PairGroups:
        num_rows, top_k = ids.shape
        counts, ends = (torch.empty(num_groups, dtype=torch.int64) for _ in range(2))
        rows, order = (torch.empty(num_rows * top_k, dtype=torch.int64) for _ in range(2))
        numbers = torch.empty(num_rows, top_k, dtype=torch.int64)
        num_found = self._group_pairs(
            *(ids.data_ptr(), ids.stride(0), num_rows, top_k, first, divisor, num_groups),
            *(-1 if num_pairs is None else num_pairs, counts.data_ptr(), ends.data_ptr()),
            *(rows.data_ptr(), order.data_ptr(), numbers.data_ptr()),
        )
        num_pairs = num_found if num_pairs is None else num_pairs
        assert num_found <= num_pairs, "what was told is wrong"
        if num_pairs < num_rows * top_k:
            rows, order = rows[:num_pairs], order[:num_pairs]
        pairs = PairGroups(counts, rows, order, numbers)
        pairs.__dict__["ends"] = ends  # known already
        return pairs

    def outgoing(
        self,
        topk_ids: Tensor,
        table: Tensor,
        num_copies: Tensor,
        first: int,
        divisor: int,
        num_peers: int,
    ) -> Outgoing:
        assert topk_ids.dtype is torch.int64, "kernels take its memory as it is"
        num_tokens, top_k = topk_ids.shape
        topk_ids, most = topk_ids.contiguous(), num_tokens * min(top_k, num_peers)
        counts, tokens = (torch.empty(num, dtype=torch.int64) for num in (2 * num_peers, most))
        ids, ids_there = (torch.empty(num, top_k, dtype=torch.int32) for num in (num_tokens, most))
        places = torch.empty(num_tokens, top_k, dtype=torch.int64)
        num_rows = self._outgoing(
            *(topk_ids.data_ptr(), num_tokens, top_k, table.data_ptr(), table.shape[1]),
            *(num_copies.data_ptr(), num_copies.shape[0], first, divisor, num_peers),
            *(ids.data_ptr(), counts.data_ptr(), tokens.data_ptr(), ids_there.data_ptr()),
            places.data_ptr(),
        )
        if num_rows < most:
            tokens, ids_there = tokens[:num_rows], ids_there[:num_rows]
        return Outgoing(ids, counts, tokens, ids_there, places)

    def leaving(self, ids: Tensor, divisor: int, num_peers: int) -> Outgoing:
        num_tokens, top_k = ids.shape
        most = num_tokens * min(top_k, num_peers)
        counts, tokens = (torch.empty(num, dtype=torch.int64) for num in (2 * num_peers, most))
        ids_there = torch.empty(most, top_k, dtype=torch.int32)
        places = torch.empty(num_tokens, top_k, dtype=torch.int64)
        num_rows = self._leaving(
            *(ids.data_ptr(), num_tokens, top_k, divisor, num_peers, counts.data_ptr()),
            *(tokens.data_ptr(), ids_there.data_ptr(), places.data_ptr()),
        )
        return Outgoing(ids, counts, tokens[:num_rows], ids_there[:num_rows], places)

    def balance_copies(
        self, topk_ids: Tensor, num_tokens_of: Sequence[int], copies: BalancedCopies, slots: Tensor
    ) -> tuple[Tensor, int]:
        topk_ids = topk_ids.contiguous()
        physical = torch.empty_like(topk_ids)
        owned, told = array("q", num_tokens_of), array("q", [0] * 4)
        of_copies = copies.holders, copies.num_held, copies.distance
        self._balance_copies(
            *(topk_ids.data_ptr(), owned.buffer_info()[0], len(owned), topk_ids.shape[1]),
            *(copies.num_experts, copies.distance.shape[1], copies.holders.shape[1]),
            *(each.ctypes.data for each in of_copies),
            *(slots.data_ptr(), PATHS_OF_RANK, physical.data_ptr(), told.buffer_info()[0]),
        )
        return physical, told[0] - told[1]

    def rows_and_pairs(
        self, ids: Tensor, num_tokens_of: Sequence[int], divisor: int, num_peers: int
    ) -> Tensor:
        owned = array("q", num_tokens_of)
        counts = torch.empty(len(owned), 2, num_peers, dtype=torch.int64)
        self._rows_and_pairs(
            *(ids.data_ptr(), owned.buffer_info()[0], len(owned), ids.shape[1], divisor),
            *(num_peers, counts.data_ptr()),
        )
        return counts

    def pack(self, parts: Sequence[tuple[Tensor, Tensor | None]], packed: Tensor) -> None:
        from_, stride, num_bytes, index = (array("q", [0] * len(parts)) for _ in range(4))
        for i, (part, rows) in enumerate(parts):
            assert part.stride(1) == 1 or part.shape[1] == 1, "rows lie in one piece each"
            from_[i], stride[i] = part.data_ptr(), part.stride(0) * part.itemsize
            num_bytes[i] = part.shape[1] * part.itemsize
            index[i] = 0 if rows is None else rows.data_ptr()
        self._pack_rows(
            *(packed.data_ptr(), *packed.shape, len(parts)),
            *(each.buffer_info()[0] for each in (from_, stride, num_bytes, index)),
        )

    def gather_sum(
        self,
        values: Tensor | RowParts,
        places: Tensor,
        weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if values.dtype not in _SUMMED:
            return super().gather_sum(values, places, weights, out)
        parts = values if isinstance(values, RowParts) else RowParts.of(values.contiguous())
        places, weights = places.contiguous(), None if weights is None else weights.contiguous()
        if out is None:
            out = torch.empty(places.shape[0], parts.width, dtype=parts.dtype)
        num_rows = array("q", parts.num_rows)
        self._gather_sum(
            *(parts.dtype is torch.bfloat16, parts.pointers.buffer_info()[0]),
            *(num_rows.buffer_info()[0], len(num_rows), places.data_ptr()),
            *(None if weights is None else weights.data_ptr(), *places.shape, parts.width),
            out.data_ptr(),
        )
        return out

    def sum_parts(self, rows: RowParts, num_parts: int) -> Tensor:
        if rows.dtype not in _SUMMED:
            return super().sum_parts(rows, num_parts)
        if len(rows.num_rows) != num_parts:
            rows = RowParts.of(rows.tensor(), num_parts)
        out = torch.empty(rows.num_rows[0], rows.width, dtype=rows.dtype)
        self._sum_parts(
            *(rows.dtype is torch.bfloat16, rows.pointers.buffer_info()[0], num_parts),
            *(out.numel(), out.data_ptr()),
        )
        return out
