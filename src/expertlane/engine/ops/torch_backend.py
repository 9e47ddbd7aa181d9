"""The backend of torch's own operations: the reference, and the base of the other backends."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.engine.ops.bookkeeping import Bookkeeping, RowParts
from expertlane.engine.ops.device import CudaGraphs
from expertlane.engine.ops.float8 import RoundedLinear
from expertlane.engine.ops.kv_cache import AttentionGroup, AttentionParams, KVCache, PagedBatch
from expertlane.engine.ops.narrow import Float8Inputs, Weight
from expertlane.engine.ops.products import (
    Activation,
    Expert,
    Experts,
    GroupedExperts,
    HeadsLinear,
    Linear,
    LoopedExperts,
    OnednnLinear,
)
from expertlane.engine.ops.router import Router, RouterParams
from expertlane.engine.ops.step import (
    AttentionCall,
    AttentionWeights,
    HeadPart,
    LocalExperts,
    MlpCall,
    MlpWeights,
)


class TorchBackend(Bookkeeping):
    """Every operation in which backends differ; the others override what they do faster."""

    keeps_narrow = False  # whether products read weights of one byte
    keeps_mxfp4 = False  # whether products read weights of four bits
    reads_float8 = True  # whether attention reads a cache of float8
    multiplies_float8 = True  # whether products take inputs in float8
    instructions = ""  # the instruction set of our kernels, or the version of Triton
    adds_with_norm = False  # whether `add_rms_norm` is less work than a sum and a norm

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        """A linear with weight [out_features, in_features], packed where that is faster."""
        if isinstance(weight, Float8Inputs):
            return RoundedLinear(self.linear(weight.weight, bias))
        if not isinstance(weight, Tensor):
            weight = weight.widened()
        return (OnednnLinear if OnednnLinear.suits(weight) else Linear)(weight, bias)

    def experts(self, held: Sequence[Expert], activation: Activation) -> Experts:
        """A rank's experts, with grouped products if torch has them, else one after the other."""
        suits = GroupedExperts.suits(held)
        return (GroupedExperts if suits else LoopedExperts)(held, activation)

    def router(self, params: RouterParams) -> Router:
        """The norm before an MoE block, and its router."""
        return Router(params, self.rms_norm)

    def local_experts(
        self, router: Router, experts: Experts, dtype: torch.dtype
    ) -> LocalExperts | None:
        """An MoE block whose experts are all on this rank, in few calls; None without such calls.

        Args:
            dtype: dtype of hidden states.
        """
        return None

    def mlp_part(self, weights: MlpWeights, dtype: torch.dtype) -> MlpCall | None:
        """An MLP of all tokens in one call; None without such a call.

        Args:
            dtype: dtype of hidden states.
        """
        return None

    def attention_part(self, weights: AttentionWeights, dtype: torch.dtype) -> AttentionCall | None:
        """A layer's attention in one call; None without such a call.

        Args:
            dtype: dtype of hidden states.
        """
        return None

    def head_part(
        self, head: Linear, norm: Tensor | None, eps: float, dtype: torch.dtype
    ) -> HeadPart | None:
        """The output head in one call; None without such a call.

        Args:
            norm: weight of the final norm, made a part of the call, if given.
            dtype: dtype of hidden states.
        """
        return None

    def graphs(self) -> CudaGraphs | None:
        """The recorder of graphs; None where a step's operations bring values to the host."""
        return None

    def draw_tokens(
        self,
        scores: Tensor,
        temperature: Tensor,
        limits: tuple[Tensor | None, Tensor | None, Tensor | None],
        seeds: npt.NDArray[np.uint64],
        num_drawn: Tensor,
    ) -> Tensor | None:
        """Token ids drawn in one pass, the same ones as by `model.draw`; None without such a call.

        Args:
            scores: [num_rows, vocab_size] float32.
            temperature: [num_rows, 1] float32; above 0.
            limits: top-k, top-p and min-p, in the form that `keep_likeliest` takes.
            seeds: [num_rows].
            num_drawn: [num_rows] int64; tokens drawn so far; raised by one here.

        Returns:
            [num_rows]; -1 where the greatest score is not finite.
        """
        return None

    def heads_linear(self, weight: Tensor) -> HeadsLinear:
        """A linear with a matrix for each head: weight [num_heads, out_features, in_features]."""
        return HeadsLinear(weight)

    def paged_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: KVCache,
        batch: PagedBatch,
        params: AttentionParams,
    ) -> Tensor:
        """Store new tokens' keys and values; causal attention over their sequences.

        Args:
            query: [num_tokens, num_heads, key_dim].
            key, value: [num_tokens, num_kv_heads, …]; values are empty where they are a part of
                the keys.

        Returns:
            [num_tokens, num_heads, value_dim].
        """
        value_dim, scale, window, sinks = params
        cache.clear(batch.begun_blocks)
        key, value = cache.write(batch.slots, key, value)

        def attend(group: AttentionGroup, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if group.is_fresh:
                keys, values = group.by_head(key), group.by_head(value)
            else:
                keys, values = cache.read(group.block_tables, group.num_positions)
            if values.shape[-1] == 0:  # the latent is both
                values = keys[..., :value_dim]
            is_causal = group.is_causal(window)
            out = _attend(
                group.by_head(query),
                keys,
                values,
                mask=None if is_causal else group.mask(window, query.dtype),
                is_causal=is_causal,
                scale=scale,
                sinks=sinks,
            )
            return out.transpose(1, 2).flatten(0, 1)

        if len(batch.groups) == 1:  # all tokens, in their order
            return attend(batch.groups[0], query, key, value)
        out = query.new_empty((*query.shape[:2], value_dim))
        for group in batch.groups:
            of_group = (x.index_select(0, group.tokens) for x in (query, key, value))
            out[group.tokens] = attend(group, *of_group)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32.

        Args:
            x: [num_rows, size].
            weight: [size] float32.
        """
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, added: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """x + added, and the norm of that; both [num_rows, size]."""
        total = x + added
        return total, self.rms_norm(total, weight, eps)

    def rms_norm_heads_(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of every head, maybe in place.

        Args:
            x: [num_tokens, num_heads, head_dim]; not to be used afterwards.
            weight: [num_heads, head_dim] float32.
        """
        return (F.rms_norm(x.float(), x.shape[2:], None, eps) * weight).to(x.dtype)

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool) -> Tensor:
        """Turn the last `rotary_dim` values of each head by their angles, maybe in place.

        Args:
            x: [num_tokens, num_heads, head_dim]; not to be used afterwards.
            cos, sin: [num_tokens, 1, rotary_dim] float32; the first half of `sin` is negative.
            interleave: pairs are (2i, 2i + 1), and come out as (i, i + rotary_dim / 2): queries and
                keys may leave them in either order, as long as both do.
        """
        dim = cos.shape[-1]
        turning = x[..., x.shape[-1] - dim :].float()
        if interleave:
            turning = torch.cat([turning[..., 0::2], turning[..., 1::2]], dim=-1)
        swapped = turning.roll(dim // 2, dims=-1)
        turned = torch.addcmul(turning * cos, swapped, sin).to(x.dtype)
        if dim == x.shape[-1]:
            return turned
        return torch.cat([x[..., : x.shape[-1] - dim], turned], dim=-1)

    def gather_sum(
        self,
        values: Tensor | RowParts,
        places: Tensor,
        weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Weighted sums of rows of `values`, in float32 and in the order of `places`.

        Args:
            values: [num_values, H].
            places: [R, M] int64; rows of `values` in each sum, -1 for none; a sum of none is 0.
            weights: [R, M] float32; None for ones.
            out: [R, H]; filled and returned, if given.

        Returns:
            [R, H] in the dtype of `values`.
        """
        values = values.tensor() if isinstance(values, RowParts) else values
        total = values.new_zeros((len(places), values.shape[1]), dtype=torch.float32)
        # Absent rows are masked, not left out: a GPU's host would have to wait for their number.
        for number, column in enumerate(places.unbind(1) if len(values) else ()):
            rows = values.index_select(0, column.clamp(min=0)).float()
            if weights is not None:
                rows = rows * weights.narrow(1, number, 1)
            total = total + rows.masked_fill((column < 0).unsqueeze(1), 0)
        return total.to(values.dtype) if out is None else out.copy_(total)

    def sum_parts(self, rows: RowParts, num_parts: int) -> Tensor:
        """Sum of equal parts of rows [num_rows / num_parts, width], in float32 and in order."""
        whole = rows.tensor()
        parts = whole.view(num_parts, len(whole) // num_parts, rows.width)
        return parts.sum(dim=0, dtype=torch.float32).to(rows.dtype)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention of new tokens over the positions of their sequences.

    Args:
        query: [num_seqs, num_heads, num_scheduled, key_dim].
        keys, values: [num_seqs, num_kv_heads, num_positions, …].
        mask: [num_seqs or 1, 1, num_scheduled, num_positions]; addends to the logits.
        is_causal: query i sees positions 0 to i; without a mask.
        sinks: [num_heads] float32.

    Returns:
        [num_seqs, num_heads, num_scheduled, value_dim].
    """
    if sinks is None:
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    logits = (query @ keys.transpose(-1, -2)).float() * scale
    if is_causal:
        mask = logits.new_full(logits.shape[-2:], -torch.inf).triu(1)
    if mask is not None:
        logits = logits + mask
    sink = sinks[None, :, None, None].expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return weights.to(values.dtype) @ values
