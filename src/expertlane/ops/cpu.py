"""Our own CPU kernels in bfloat16, for tensors; `ops/backend.py` says where they are used."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_LANES = 16


class CpuKernels:
    """`products.cpp`, `attention.cpp` and `rows.cpp`.

    Every tensor is bfloat16, on the CPU, and contiguous unless a stride is named.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float}
        self._linear, self._experts = library.linear, library.experts
        self._attention, self._rotate = library.attention, library.rotate
        self._rms_norm = library.rms_norm
        self._weighted_sum, self._sum_parts = library.weighted_sum, library.sum_parts
        for function, signature in (
            (self._linear, "pnnpnnpp"),
            (self._experts, "pnpppnpppnnpp"),
            (self._attention, "pnpppnpppnnnnnnfnpp"),
            (self._rotate, "pnnnnnppn"),
            (self._rms_norm, "pnnnnpfpn"),
            (self._weighted_sum, "pppnnnp"),
            (self._sum_parts, "pnnp"),
        ):
            function.argtypes = [kinds[letter] for letter in signature]  # type: ignore[misc]
            function.restype = None

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """A matrix [n, k], k even, as the kernels read it: [n / 16, k / 2, 16, 2], n padded."""
        n, k = weight.shape
        missing = -n % _LANES
        if missing:
            weight = torch.cat([weight, weight.new_zeros(missing, k)])
        return weight.view(-1, _LANES, k // 2, 2).transpose(1, 2).contiguous()

    def linear(self, x: Tensor, packed: Tensor, n: int, bias: Tensor | None) -> Tensor:
        """[m, n] of x [m, k] and a packed [n, k].

        Args:
            x: rows may be apart.
            bias: [n] float32.
        """
        m, k = x.shape
        out = x.new_empty(m, n)
        if m:
            x = x if x.stride(1) == 1 else x.contiguous()
            shift = None if bias is None else bias.data_ptr()
            self._linear(
                x.data_ptr(), x.stride(0), m, packed.data_ptr(), n, k, shift, out.data_ptr()
            )
        return out

    def experts(
        self,
        rows: Tensor,
        row_of_pair: Tensor,
        result_of_pair: Tensor,
        ends: Sequence[int],
        gate: "Pointers | None",
        up: "Pointers",
        down: "Pointers",
        inner: int,
    ) -> Tensor:
        """MLPs side by side: SiLU(gate) · up, or GELU(up) without a gate; then down.

        Args:
            rows: [num_rows, hidden_size]; may be apart.
            row_of_pair, result_of_pair: [num_pairs] int64, grouped by expert; the row that each
                pair takes, and the one that it gives.
            ends: [num_experts]; where each expert's pairs end.
            gate, up, down: packed matrices of the experts, `inner` a multiple of 32.

        Returns:
            [num_pairs, hidden_size].
        """
        num_pairs, hidden = len(row_of_pair), rows.shape[1]
        out, scratch = rows.new_empty(num_pairs, hidden), rows.new_empty(num_pairs, inner)
        ends_array = (ctypes.c_int64 * len(ends))(*ends)
        if num_pairs:
            self._experts(
                *(rows.data_ptr(), rows.stride(0), row_of_pair.data_ptr()),
                *(result_of_pair.data_ptr(), ends_array, len(ends)),
                *(None if gate is None else gate.array, up.array, down.array),
                *(hidden, inner, scratch.data_ptr(), out.data_ptr()),
            )
        return out

    def attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor | None,
        sequences: "PagedSequences",
        *,
        value_dim: int,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Causal attention of new tokens over a paged cache that holds theirs already.

        Args:
            query: [num_tokens, num_heads, key_dim]; tokens may be apart. key_dim is a multiple
                of 32, value_dim of 16.
            keys, values: [num_blocks, block_size, num_kv_heads, …]; values None where they are
                the first `value_dim` of the keys.
            window: the latest positions seen; None for all.
            sinks: [num_heads] float32.

        Returns:
            [num_tokens, num_heads, value_dim].
        """
        num_tokens, num_heads, key_dim = query.shape
        out = query.new_empty(num_tokens, num_heads, value_dim)
        tables = sequences.block_tables
        self._attention(
            *(query.data_ptr(), query.stride(0), keys.data_ptr()),
            *(None if values is None else values.data_ptr(), tables.data_ptr(), tables.shape[1]),
            *(sequences.first_tokens.data_ptr(), sequences.num_scheduled.data_ptr()),
            *(sequences.lengths.data_ptr(), len(tables), num_heads, keys.shape[2]),
            *(key_dim, value_dim, keys.shape[1], scale, window or 0),
            *(None if sinks is None else sinks.data_ptr(), out.data_ptr()),
        )
        return out

    def rotate(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        interleave: bool,
    ) -> None:
        """Turn heads in place.

        Args:
            x: [num_tokens, num_heads, head_dim]; tokens may be apart.
            cos, sin: [num_tokens, 1, rotary_dim] float32.
            interleave: pairs are (2i, 2i + 1); they come out as (i, i + rotary_dim / 2).
        """
        num_tokens, num_heads, head_dim = x.shape
        self._rotate(
            *(x.data_ptr(), x.stride(0), num_tokens, num_heads, head_dim, cos.shape[-1]),
            *(cos.data_ptr(), sin.data_ptr(), interleave),
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[num_rows, size] of rows [num_rows, size]; size a multiple of 16, weight float32."""
        num_rows, size = x.shape
        out = x.new_empty(num_rows, size)
        self._rms_norm(
            *(x.data_ptr(), x.stride(0), num_rows, 1, size, weight.data_ptr(), eps),
            *(out.data_ptr(), size),
        )
        return out

    def rms_norm_heads(self, x: Tensor, weight: Tensor, eps: float) -> None:
        """Norm each head in place.

        Args:
            x: [num_tokens, num_heads, head_dim]; tokens may be apart, head_dim a multiple of 16.
            weight: [num_heads, head_dim] float32.
        """
        num_tokens, num_heads, head_dim = x.shape
        self._rms_norm(
            *(x.data_ptr(), x.stride(0), num_tokens, num_heads, head_dim),
            *(weight.data_ptr(), eps, x.data_ptr(), x.stride(0)),
        )

    def weighted_sum(self, rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
        """[num_sums, size]; the rows `places` of each sum, times their weights.

        Args:
            rows: [num_rows, size], size a multiple of 16.
            places: [num_sums, most_rows] int64; -1 for none.
            weights: [num_sums, most_rows] float32; None for ones.
        """
        num_sums, most_rows = places.shape
        out = rows.new_empty(num_sums, rows.shape[1])
        self._weighted_sum(
            *(rows.data_ptr(), places.data_ptr(), None if weights is None else weights.data_ptr()),
            *(num_sums, most_rows, rows.shape[1], out.data_ptr()),
        )
        return out

    def sum_parts(self, rows: Tensor, num_parts: int) -> Tensor:
        """[num_rows / num_parts, size]; the sum of equal parts of rows [num_rows, size]."""
        out = rows.new_empty(len(rows) // num_parts, rows.shape[1])
        self._sum_parts(rows.data_ptr(), num_parts, out.numel(), out.data_ptr())
        return out


class PagedSequences(NamedTuple):
    """Where sequences' new tokens are, and their blocks; all int64.

    Attributes:
        block_tables: [num_seqs, num_blocks_per_seq].
        first_tokens: [num_seqs]; where the new tokens of each begin.
        num_scheduled: [num_seqs]; how many new tokens each has.
        lengths: [num_seqs]; positions of each, the new ones included.
    """

    block_tables: Tensor
    first_tokens: Tensor
    num_scheduled: Tensor
    lengths: Tensor


class Pointers:
    """Where packed matrices lie; keeps them alive."""

    def __init__(self, packed: Sequence[Tensor]) -> None:
        self._packed = packed
        self.array = (ctypes.c_void_p * len(packed))(*(matrix.data_ptr() for matrix in packed))
