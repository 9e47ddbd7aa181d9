"""Keys and values of the sequences a rank works on."""

import torch
from torch import Tensor

from expertlane.model.forward_batch import AttentionRun


class KVCache:
    """Of one layer: [num_slots, num_local_heads, max_len, key_dim or value_dim].

    With latent attention the one head's key is the latent and the rotated part; its value is the
    latent, a view of the key, so it is not stored again (`value_dim` 0).
    """

    def __init__(
        self,
        num_slots: int,
        num_local_heads: int,
        max_len: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_slots, num_local_heads, max_len)
        self.keys = torch.empty((*shape, key_dim), dtype=dtype, device=device)
        self.values = torch.empty((*shape, value_dim), dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def position_bytes(self) -> int:
        """Of one position of one sequence."""
        width = self.keys.shape[-1] + self.values.shape[-1]
        return int(self.keys.shape[1] * width * self.keys.itemsize)

    def update(self, run: AttentionRun, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a run's new keys and values, and give views of all it has so far.

        Args:
            keys, values: [num_seqs, num_local_heads, num_scheduled, key_dim or value_dim].

        Returns:
            Two views [num_seqs, num_local_heads, num_computed + num_scheduled, …].
        """
        slots = slice(run.first_slot, run.first_slot + run.num_seqs)
        end = run.num_computed + run.num_scheduled
        self.keys[slots, :, run.num_computed : end] = keys
        self.values[slots, :, run.num_computed : end] = values
        return self.keys[slots, :, :end], self.values[slots, :, :end]
