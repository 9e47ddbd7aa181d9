"""CPU kernels for the bookkeeping of dispatch; `ops/backend.py` says where they are used."""

import ctypes

import torch
from torch import Tensor


class DispatchKernels:
    """`dispatch.cpp`; every tensor is on the CPU. Results are those of `moe/grouping.py`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int32}
        self._choose_copies, self._rows_by_peer = library.choose_copies, library.rows_by_peer
        self._group_pairs = library.group_pairs
        for function, signature, result in (
            (self._choose_copies, "pnpnpnnp", None),
            (self._rows_by_peer, "pnnninpppp", ctypes.c_int64),
            (self._group_pairs, "pnnniinpppp", ctypes.c_int64),
        ):
            function.argtypes = [kinds[letter] for letter in signature]  # type: ignore[misc]
            function.restype = result

    def choose_copies(
        self, topk_ids: Tensor, table: Tensor, num_copies: Tensor, first: int
    ) -> Tensor:
        """[T, K] int32; physical ids of logical experts [T, K] int64, copies taking turns.

        Args:
            table: [num_experts, most copies] int64; physical ids.
            num_copies: [num_experts] int64.
            first: the turn to begin with.
        """
        topk_ids = topk_ids.contiguous()
        physical = torch.empty(topk_ids.shape, dtype=torch.int32)
        self._choose_copies(
            *(topk_ids.data_ptr(), topk_ids.numel(), table.data_ptr(), table.shape[1]),
            *(num_copies.data_ptr(), len(num_copies), first, physical.data_ptr()),
        )
        return physical

    def rows_by_peer(
        self, ids: Tensor, divisor: int, num_peers: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Counts [num_peers], tokens [R], ids there [R, K] int32, places [T, num_peers].

        Args:
            ids: [T, K] int32, rows may be apart; -1 for none.
        """
        num_tokens, top_k = ids.shape
        most = num_tokens * min(top_k, num_peers)
        counts, tokens = (torch.empty(num, dtype=torch.int64) for num in (num_peers, most))
        ids_there = torch.empty(most, top_k, dtype=torch.int32)
        places = torch.empty(num_tokens, num_peers, dtype=torch.int64)
        num_rows = self._rows_by_peer(
            *(ids.data_ptr(), ids.stride(0), num_tokens, top_k, divisor, num_peers),
            *(counts.data_ptr(), tokens.data_ptr(), ids_there.data_ptr(), places.data_ptr()),
        )
        return counts, tokens[:num_rows], ids_there[:num_rows], places

    def group_pairs(
        self, ids: Tensor, first: int, divisor: int, num_groups: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Counts [num_groups], rows [P], numbers of pairs [P], and by row and choice [R, K].

        Args:
            ids: [R, K] int32, rows may be apart.
        """
        num_rows, top_k = ids.shape
        counts = torch.empty(num_groups, dtype=torch.int64)
        rows, order = torch.empty(2, num_rows * top_k, dtype=torch.int64)
        numbers = torch.empty(num_rows, top_k, dtype=torch.int64)
        num_pairs = self._group_pairs(
            *(ids.data_ptr(), ids.stride(0), num_rows, top_k, first, divisor, num_groups),
            *(counts.data_ptr(), rows.data_ptr(), order.data_ptr(), numbers.data_ptr()),
        )
        return counts, rows[:num_pairs], order[:num_pairs], numbers
