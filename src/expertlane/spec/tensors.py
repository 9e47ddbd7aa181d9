"""The logical tensors of a model: their names, shapes, and the dimension that layouts cut.

Matrices are [out_features, in_features]. In the names, N is a layer and E an expert:

- `embedding`, `final_norm`, `head`;
- `layers.N.` and, for attention: `attention_norm`; `query`, `key`, `value`, `output`, each with a
  `…_bias`; `query_norm`, `key_norm`; `sinks`. With latent attention `query` or else `query_a`,
  `query_a_norm`, `query_b`; then `kv_a`, `kv_a_norm`, `kv_b`, `output`;
- `layers.N.` and, for the MLP: `moe_norm` in every layer; `router`, `router_bias`,
  `correction_bias`, `shared_gate`; `experts.E.`, `shared.` or `dense.` with `gate`, `up`, `down`,
  and for experts `gate_bias`, `up_bias`, `down_bias`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a model counts its parameters by its tensors
    from expertlane.spec.model import ModelConfig

EMBEDDING = "embedding"
FINAL_NORM = "final_norm"
HEAD = "head"
_CUT_BY_INPUT = ("output", "down")

Shape = tuple[int, ...]


def layer_name(layer: int, part: str) -> str:
    """The name of a layer's tensor, such as `query` or `shared.gate`."""
    return f"layers.{layer}.{part}"


def expert_name(layer: int, expert: int, part: str) -> str:
    """The name of an expert's tensor, such as `up` or `up_bias`."""
    return f"layers.{layer}.experts.{expert}.{part}"


def cut_dim(name: str) -> int:
    """The dimension that layouts cut: input features of `output` and `down`, else the first."""
    return 1 if name.rsplit(".", 1)[-1] in _CUT_BY_INPUT else 0


_WITHOUT_PRODUCT = {"router", "kv_b", "shared_gate", "sinks"}


def is_matrix(name: str) -> bool:
    """Whether it is the weight of a product, which may be kept in one byte.

    Routers are not, nor `kv_b`, which is taken apart by heads, nor the gate of a shared expert.
    """
    part = name.rpartition(".")[2]
    return not (part in _WITHOUT_PRODUCT or name == EMBEDDING or part.endswith(("_norm", "_bias")))


def tensor_shape(model: ModelConfig, name: str) -> Shape:
    """The logical shape of a tensor.

    Raises:
        KeyError: the model has no tensor of that name.
    """
    return _shapes(model)[".".join(word for word in name.split(".") if not word.isdigit())]


def tensor_names(model: ModelConfig) -> Iterator[str]:
    """All tensors of a model, layer by layer; a tied head is none."""
    yield EMBEDDING
    of_kinds = [layer_shapes(model, is_dense) for is_dense in (False, True)]
    expert = expert_shapes(model)
    for layer in range(model.num_hidden_layers):
        is_dense = model.is_dense(layer)
        yield from (layer_name(layer, part) for part in of_kinds[is_dense])
        for index in range(0 if is_dense else model.num_experts):
            yield from (expert_name(layer, index, part) for part in expert)
    yield FINAL_NORM
    if not model.tie_word_embeddings:
        yield HEAD


def layer_shapes(model: ModelConfig, is_dense: bool) -> dict[str, Shape]:
    """Shapes of a layer's tensors, its experts aside, by name without the layer."""
    if is_dense:
        return _attention_shapes(model) | _mlp_shapes(model, "dense", model.intermediate_size)
    return _attention_shapes(model) | _moe_shapes(model)


def num_params(model: ModelConfig) -> int:
    """All parameters of a model."""

    def total(shapes: dict[str, Shape]) -> int:
        return sum(map(prod, shapes.values()))

    num_dense, hidden = len(model.dense_layers), model.hidden_size
    moe_layer = total(layer_shapes(model, False)) + model.num_experts * total(expert_shapes(model))
    return (
        num_dense * total(layer_shapes(model, True))
        + (model.num_hidden_layers - num_dense) * moe_layer
        + (1 if model.tie_word_embeddings else 2) * model.vocab_size * hidden
        + hidden
    )


@lru_cache(maxsize=16)
def _shapes(model: ModelConfig) -> dict[str, Shape]:
    """Shapes by name, without the numbers of layer and expert."""
    in_layers = layer_shapes(model, False) | {
        f"experts.{part}": shape for part, shape in expert_shapes(model).items()
    }
    if model.dense_layers:
        in_layers |= layer_shapes(model, True)
    outside = {
        EMBEDDING: (model.vocab_size, model.hidden_size),
        FINAL_NORM: (model.hidden_size,),
        HEAD: (model.vocab_size, model.hidden_size),
    }
    return outside | {f"layers.{part}": shape for part, shape in in_layers.items()}


def _attention_shapes(model: ModelConfig) -> dict[str, Shape]:
    hidden, latent = model.hidden_size, model.latent
    shapes: dict[str, Shape] = {"attention_norm": (hidden,)}
    if latent is None:
        widths = {"query": model.attention_size, "key": model.kv_size, "value": model.kv_size}
        for part, width in widths.items():
            shapes[part] = (width, hidden)
            if model.qkv_bias:
                shapes[f"{part}_bias"] = (width,)
        if model.qk_norm is not None:
            per_head = model.qk_norm == "head"
            shapes["query_norm"] = (model.head_dim if per_head else model.attention_size,)
            shapes["key_norm"] = (model.head_dim if per_head else model.kv_size,)
        if model.attention_sinks:
            shapes["sinks"] = (model.num_attention_heads,)
    else:
        rank, kv_rank = latent.q_lora_rank, latent.kv_lora_rank
        if rank is None:
            shapes["query"] = (model.attention_size, hidden)
        else:
            shapes["query_a"] = (rank, hidden)
            shapes["query_a_norm"] = (rank,)
            shapes["query_b"] = (model.attention_size, rank)
        shapes["kv_a"] = (kv_rank + latent.qk_rope_head_dim, hidden)
        shapes["kv_a_norm"] = (kv_rank,)
        width = model.num_attention_heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        shapes["kv_b"] = (width, kv_rank)
    shapes["output"] = (hidden, model.attention_output_size)
    if model.output_bias:
        shapes["output_bias"] = (hidden,)
    return shapes | {"moe_norm": (hidden,)}


def _moe_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Shapes of an MoE layer's tensors, its experts aside."""
    hidden, num_experts = model.hidden_size, model.num_experts
    shapes: dict[str, Shape] = {"router": (num_experts, hidden)}
    if model.routing.router_bias:
        shapes["router_bias"] = (num_experts,)
    if model.routing.correction_bias:
        shapes["correction_bias"] = (num_experts,)
    if model.shared_expert_intermediate_size:
        shapes |= _mlp_shapes(model, "shared", model.shared_expert_intermediate_size)
    if model.shared_expert_gate:
        shapes["shared_gate"] = (1, hidden)
    return shapes


def _mlp_shapes(model: ModelConfig, prefix: str, inner: int) -> dict[str, Shape]:
    return {f"{prefix}.{part}": shape for part, shape in _matrices(model, inner).items()}


def expert_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Shapes of an expert's tensors, such as `up` or `up_bias`."""
    shapes = _matrices(model, model.moe_intermediate_size)
    if model.expert_bias:
        shapes |= {f"{part}_bias": shape[:1] for part, shape in shapes.items()}
    return shapes


def _matrices(model: ModelConfig, inner: int) -> dict[str, Shape]:
    hidden = model.hidden_size
    gate: dict[str, Shape] = {"gate": (inner, hidden)} if model.gated_mlp else {}
    return gate | {"up": (inner, hidden), "down": (hidden, inner)}
