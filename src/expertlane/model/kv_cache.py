"""Paged keys and values of the sequences a data-parallel rank works on."""

from math import prod

import numpy as np
import torch
from torch import Tensor

from expertlane.model.forward_batch import ForwardBatch
from expertlane.ops.backend import arithmetic_for


class KVCache:
    """Of one layer: blocks of `block_size` positions, [num_blocks, block_size, heads, dim].

    A slot is a position's place in it, block × block_size + offset. With latent attention the one
    head's key is the latent and the rotated part; its value is the latent, a part of the key, so
    it is not stored again (`value_dim` 0).

    Attributes:
        kernels: our own for one new token a sequence; None where torch's operations serve.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_local_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, block_size, num_local_heads)
        # Zeros: a padded place is masked, but what is masked must still be a number.
        self.keys = _zeros((*shape, key_dim), dtype, device)
        self.values = _zeros((*shape, value_dim), dtype, device)
        fits = key_dim % 32 == 0 and value_dim % 16 == 0
        self.kernels = arithmetic_for(self.keys) if fits else None

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def position_bytes(self) -> int:
        """Of one position of one sequence."""
        width = self.keys.shape[-1] + self.values.shape[-1]
        return int(self.keys.shape[2] * width * self.keys.itemsize)

    def write(self, batch: ForwardBatch, keys: Tensor, values: Tensor) -> None:
        """Store new tokens' keys and values.

        Args:
            keys, values: [num_tokens, num_local_heads, key_dim or value_dim].
        """
        if self.kernels is None and len(batch.begun_blocks):
            self.keys.index_fill_(0, batch.begun_blocks, 0)
            self.values.index_fill_(0, batch.begun_blocks, 0)
        slots = batch.slots
        self.keys.flatten(0, 1).index_copy_(0, slots, keys)
        if values.shape[-1]:
            self.values.flatten(0, 1).index_copy_(0, slots, values)

    def read(self, block_tables: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
        """Gather the first positions of some sequences.

        Args:
            block_tables: [num_seqs, num_blocks_per_seq].

        Returns:
            keys, values: [num_seqs, num_local_heads, num_positions, key_dim or value_dim].
        """

        num_seqs, width = block_tables.shape

        def gather(paged: Tensor) -> Tensor:
            blocks = paged.index_select(0, block_tables.flatten())
            of_seqs = blocks.view(num_seqs, width * paged.shape[1], *paged.shape[2:])
            return of_seqs[:, :num_positions].transpose(1, 2)

        return gather(self.keys), gather(self.values)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU, pages that take no memory until something is written to them."""
    if device.type != "cpu" or not prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)
