"""The model in plain single-process torch: no cache, no batching tricks, no parallelism.

It shares nothing with the parallel model but the logical weights, so that it can judge it. Every
dispatch form is judged by its dense MoE block: all experts for all tokens, masked.
Legend: N sequences, L positions, H heads, D head_dim, E experts.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import gelu

from expertlane.engine.model.weights import draw
from expertlane.spec.model import ModelConfig
from expertlane.spec.tensors import EMBEDDING, FINAL_NORM, HEAD, expert_name, layer_name

_LAYER_PARTS = ("attention_norm", "query", "key", "value", "output", "moe_norm", "router")


@dataclass(frozen=True, eq=False)
class ReferenceRun:
    """A greedy generation.

    Attributes:
        tokens: [num_seqs, output_len].
        logits: [num_seqs, output_len, vocab_size]; each token is the first largest of its row.
        router_margins: [num_seqs, output_len]; the least gap between the last chosen and the first
            unchosen expert, over all layers and over all positions up to the one that was fed.
    """

    tokens: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    router_margins: npt.NDArray[np.float32]


def rounded_to_int8(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Each 128 inputs of a row to -127 … 127 times a scale, the largest magnitude / 127."""
    out = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        for begin in range(0, weight.shape[1], 128):
            part = weight[row, begin : begin + 128]
            scale = np.abs(part).max() / np.float32(127)
            if scale:
                out[row, begin : begin + 128] = np.rint(part / scale) * scale
    return out


def rounded_to_float8(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], float]:
    """Each row [..., dim] to e4m3 times the least power of two that keeps it within 448.

    Returns:
        The rows; and how near any value is to being rounded the other way, over its row's largest.
    """
    rows = rows.astype(np.float64)
    largest = np.abs(rows).max(axis=-1, keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(np.where(largest > 0, largest, 1.0) / 448))
    scaled = rows / scale
    _, exponent = np.frexp(scaled)  # of a value from 1/2 to 1
    steps = 2.0 ** (np.maximum(exponent - 1, -6) - 3)
    rounded = np.rint(scaled / steps) * steps
    margins = (0.5 - np.abs(scaled / steps - rounded / steps)) * steps * scale
    return (rounded * scale).astype(np.float32), float((margins / largest).min())


class ReferenceModel:
    """The whole model in float32 on the CPU; weights are those of `seed`.

    Args:
        rounded: matrices but router and embedding are what int8 with a scale for every 128 inputs
            makes of them.
        float8_cache: keys, once rotated, and values are what `rounded_to_float8` makes of them.

    Attributes:
        cache_margin: the least that it has told so far.
    """

    cache_margin = np.inf

    def __init__(
        self, model: ModelConfig, seed: int, *, rounded: bool = False, float8_cache: bool = False
    ) -> None:
        def weight(name: str) -> Tensor:
            drawn = draw(model, seed, name)
            if rounded and name != EMBEDDING and not name.endswith(("norm", "router", "bias")):
                drawn = rounded_to_int8(drawn)
            return torch.from_numpy(drawn)

        self._model, self._float8_cache = model, float8_cache
        self._embedding = weight(EMBEDDING)
        self._final_norm = weight(FINAL_NORM)
        self._head = weight(HEAD)
        self._layers: list[dict[str, Tensor]] = []
        for layer in range(model.num_hidden_layers):
            bias = ("router_bias",) if model.routing.router_bias else ()
            tensors = {part: weight(layer_name(layer, part)) for part in _LAYER_PARTS + bias}
            for part in ("up", "down"):
                experts = range(model.num_experts)
                tensors[part] = torch.stack([weight(expert_name(layer, e, part)) for e in experts])
            self._layers.append(tensors)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits after every position.

        Args:
            token_ids: [num_seqs, len], integers; at least one position.

        Returns:
            logits: [num_seqs, len, vocab_size].
            router_margin: [num_seqs, len]; the least over all layers and all positions up to
                this one, since attention mixes earlier positions in.
        """
        x, margin = self._hidden_states(token_ids)
        return x @ self._head.T, margin

    @torch.inference_mode()
    def generate(self, prompts: npt.NDArray[np.int64], output_len: int) -> ReferenceRun:
        """Continue every prompt greedily, computing all positions anew for each token.

        Args:
            prompts: [num_seqs, prompt_len]; at least one position.
        """
        token_ids = torch.as_tensor(prompts)
        prompt_len = token_ids.shape[1]
        logits, margins = [], []
        for _ in range(output_len):
            x, margin = self._hidden_states(token_ids)
            logits.append(x[:, -1] @ self._head.T)
            margins.append(margin[:, -1])
            token_ids = torch.cat([token_ids, logits[-1].argmax(dim=-1, keepdim=True)], dim=1)
        return ReferenceRun(
            tokens=token_ids[:, prompt_len:].numpy(),
            logits=torch.stack(logits, dim=1).numpy(),
            router_margins=torch.stack(margins, dim=1).numpy(),
        )

    def _hidden_states(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """After the final norm [N, L, hidden_size], and the margin upstream [N, L]."""
        top_k, eps = self._model.num_experts_per_tok, self._model.rms_norm_eps
        x = self._embedding[token_ids]
        margin = torch.full(token_ids.shape, torch.inf)
        for layer in self._layers:
            x = x + self._attention(layer, _rms_norm(x, layer["attention_norm"], eps))
            flat = _rms_norm(x, layer["moe_norm"], eps).flatten(0, 1)
            router, bias = layer["router"], layer.get("router_bias")
            of_layer = router_margin(flat, router, top_k, bias).view(token_ids.shape)
            margin = torch.minimum(margin, of_layer)
            out = moe_block(flat, router, layer["up"], layer["down"], top_k, bias)
            x = x + out.view(x.shape)
        return _rms_norm(x, self._final_norm, eps), margin.cummin(dim=1).values

    def _attention(self, layer: dict[str, Tensor], x: Tensor) -> Tensor:
        """Causal multi-head attention of x [N, L, hidden_size] with rotary positions."""
        num_heads, head_dim = self._model.num_attention_heads, self._model.head_dim
        num_seqs, length = x.shape[:2]

        def heads(part: str) -> Tensor:  # [N, H, L, D]
            return (x @ layer[part].T).view(num_seqs, length, num_heads, head_dim).transpose(1, 2)

        cos, sin = self._rotary(length)
        query, key = _rotate(heads("query"), cos, sin), _rotate(heads("key"), cos, sin)
        key, value = self._cached(key), self._cached(heads("value"))
        scores = query @ key.transpose(-1, -2) * head_dim**-0.5  # [N, H, L, L]
        future = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
        probabilities = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        mixed: Tensor = (probabilities @ value).transpose(1, 2).flatten(-2)
        return mixed @ layer["output"].T

    def _cached(self, rows: Tensor) -> Tensor:
        if not self._float8_cache:
            return rows
        rounded, margin = rounded_to_float8(rows.numpy())
        self.cache_margin = min(self.cache_margin, margin)
        return torch.from_numpy(rounded)

    def _rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [L, D / 2] of position × theta^(-2i / D) (Su et al. 2021)."""
        head_dim = self._model.head_dim
        exponents = -torch.arange(0, head_dim, 2).double() / head_dim
        inv_freq = torch.pow(self._model.rope_theta, exponents)
        angles = torch.outer(torch.arange(length).double(), inv_freq)
        return angles.cos().float(), angles.sin().float()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D / 2) of x [..., L, D]; the rotate-half convention of GPT-NeoX."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def router_logits(x: Tensor, router: Tensor, bias: Tensor | None = None) -> Tensor:
    """[num_tokens, num_experts]; x and router have hidden_size columns, bias [num_experts]."""
    logits = x.float() @ router.float().T
    return logits if bias is None else logits + bias.float()


def moe_block(
    x: Tensor,
    router: Tensor,
    up: Tensor,
    down: Tensor,
    top_k: int,
    router_bias: Tensor | None = None,
) -> Tensor:
    """The sum of each token's `top_k` experts, weighted by a softmax over their logits.

    Args:
        x: [num_tokens, hidden_size]; there may be no token.
        router: [num_experts, hidden_size]; its bias [num_experts].
        up: [num_experts, moe_intermediate_size, hidden_size].
        down: [num_experts, hidden_size, moe_intermediate_size].

    Returns:
        [num_tokens, hidden_size], float32 whatever the inputs' type.
    """
    logits = router_logits(x, router, router_bias)
    topk_logits, topk_ids = logits.topk(top_k, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, topk_ids, topk_logits.softmax(dim=-1))
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert, weight in enumerate(weights.unbind(dim=-1)):
        inner = gelu(x.float() @ up[expert].float().T)
        out += weight[:, None] * (inner @ down[expert].float().T)
    return out


def router_margin(
    x: Tensor, router: Tensor, top_k: int, router_bias: Tensor | None = None
) -> Tensor:
    """How near each token is to another choice of experts: k-th less (k+1)-th largest logit.

    Returns:
        [num_tokens], float32; infinite where every expert is chosen.
    """
    logits = router_logits(x, router, router_bias)
    if top_k == logits.shape[-1]:
        return logits.new_full(logits.shape[:1], torch.inf)
    ordered = logits.sort(dim=-1, descending=True).values
    return ordered[:, top_k - 1] - ordered[:, top_k]
