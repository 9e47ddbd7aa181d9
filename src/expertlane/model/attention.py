"""Multi-head attention over a key/value cache, for the heads one rank holds."""

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.model.forward_batch import AttentionRun, ForwardBatch
from expertlane.parallel.recorder import Recorder
from expertlane.spec.model import ModelConfig


class RotaryEmbedding:
    """Rotary positions (Su et al. 2021) in the rotate-half form: dimension i turns with i + d/2."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        half = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
        positions = torch.arange(model.max_position_embeddings, dtype=torch.float64)
        angles = positions[:, None] * model.rope_theta**-half
        self._cos = angles.cos().float().to(device)  # [positions, head_dim / 2]
        self._sin = angles.sin().float().to(device)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn queries or keys by their positions.

        Args:
            x: [num_tokens, num_heads, head_dim].
            positions: [num_tokens].
        """
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return turned.to(x.dtype)


class KVCache:
    """Keys and values of one layer: [num_slots, num_local_heads, max_len, head_dim] each."""

    def __init__(
        self,
        num_slots: int,
        num_local_heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_slots, num_local_heads, max_len, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def update(self, run: AttentionRun, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a run's new keys and values, and give views of all it has so far.

        Args:
            keys, values: [num_seqs, num_local_heads, num_scheduled, head_dim].

        Returns:
            Two views [num_seqs, num_local_heads, num_computed + num_scheduled, head_dim].
        """
        slots = slice(run.first_slot, run.first_slot + run.num_seqs)
        end = run.num_computed + run.num_scheduled
        self.keys[slots, :, run.num_computed : end] = keys
        self.values[slots, :, run.num_computed : end] = values
        return self.keys[slots, :, :end], self.values[slots, :, :end]


class Attention:
    """Causal attention of a rank's heads; its output is a partial sum over the TP group.

    Args:
        query_key_value: [3 · num_local_heads · head_dim, hidden_size].
        output: [hidden_size, num_local_heads · head_dim].
    """

    def __init__(
        self,
        query_key_value: Tensor,
        output: Tensor,
        head_dim: int,
        rotary: RotaryEmbedding,
        recorder: Recorder,
    ) -> None:
        self._query_key_value = query_key_value
        self._output = output
        self._head_dim = head_dim
        self._rotary = rotary
        self._recorder = recorder

    def forward(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Attend from the batch's new tokens to all positions up to each.

        Args:
            x: [num_tokens, hidden_size]; all tokens of the data-parallel rank's part.

        Returns:
            [num_tokens, hidden_size].
        """
        num_tokens = x.shape[0]
        num_heads = self._output.shape[1] // self._head_dim
        heads = F.linear(x, self._query_key_value).view(num_tokens, 3, num_heads, self._head_dim)
        query = self._rotary.rotate(heads[:, 0], batch.positions)
        key = self._rotary.rotate(heads[:, 1], batch.positions)
        attended = torch.empty_like(query)
        for run in batch.attention_runs:
            self._attend(run, query, key, heads[:, 2], cache, attended)
        self._count(batch)
        return F.linear(attended.flatten(1), self._output)

    def _attend(
        self,
        run: AttentionRun,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: KVCache,
        attended: Tensor,
    ) -> None:
        tokens = slice(run.first_token, run.first_token + run.num_seqs * run.num_scheduled)

        def by_head(x: Tensor) -> Tensor:  # [num_seqs, heads, num_scheduled, head_dim]
            shape = (run.num_seqs, run.num_scheduled, *x.shape[1:])
            return x[tokens].view(shape).transpose(1, 2)

        keys, values = cache.update(run, by_head(key), by_head(value))
        mask = None
        if run.num_computed and run.num_scheduled > 1:
            total = run.num_computed + run.num_scheduled
            mask = torch.ones(run.num_scheduled, total, dtype=torch.bool, device=query.device)
            mask = mask.tril(run.num_computed)
        out = F.scaled_dot_product_attention(
            by_head(query),
            keys,
            values,
            attn_mask=mask,
            is_causal=run.num_computed == 0 and run.num_scheduled > 1,
        )
        attended[tokens] = out.transpose(1, 2).flatten(0, 1)

    def _count(self, batch: ForwardBatch) -> None:
        """Linears as 2·m·n·k; attention as 4 × query-key pairs × heads × head_dim."""
        width, num_tokens = self._output.shape[1], batch.batch.num_tokens
        pairs = sum(run.num_query_key_pairs for run in batch.attention_runs)
        num_weights = self._query_key_value.numel() + self._output.numel()
        positions = sum(
            run.num_seqs * (run.num_computed + run.num_scheduled) for run in batch.attention_runs
        )
        self._recorder.count_compute(
            flops=2 * num_tokens * num_weights + 4 * pairs * width,
            weight_bytes=num_weights * self._output.itemsize if num_tokens else 0,
            kv_bytes=2 * positions * width * self._output.itemsize,
        )
