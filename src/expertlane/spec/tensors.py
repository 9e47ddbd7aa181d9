"""A model's logical tensors: their names, shapes and cuts, and how many parameters they are.

Matrices are [out_features, in_features]. In the names, N is a layer and E an expert:

- `embedding`, `final_norm`, `final_norm_bias`, `head`, `head_bias`;
- `layers.N.` and, for attention: `attention_norm`; `query`, `key`, `value`, `output`, each with a
  `…_bias`; `query_norm`, `key_norm`; `sinks`; `head_gate`. With latent attention or latent queries
  `query` or else `query_a`, `query_a_norm`, `query_b`; with latent attention then `kv_a`,
  `kv_a_norm`, `kv_b`, `output`;
- `layers.N.window.` and the same, where layers with a window have heads of their own;
- `layers.N.state.`, or `layers.N.index_…`: mixers beside attention (`spec.mixers`);
- compressed attention's, and `…_streams` of several residual streams: `spec.mixers`;
- `layers.N.` and, for the MLP: `moe_norm` in every layer that has one (layer norms have a
  `…_norm_bias` too); `router`, `router_bias`, `correction_bias`, `experts_of_token`,
  `shared_gate`; `latent_in`, `latent_out`; `experts.E.`, `shared.` or `dense.` with `gate`, `up`,
  `down`, and for experts `gate_bias`, `up_bias`, `down_bias`.
"""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from math import prod

from expertlane.spec.mixers import Mixing, Shape, stream_shapes
from expertlane.spec.model import LayerKind, ModelConfig

EMBEDDING = "embedding"
FINAL_NORM = "final_norm"
HEAD = "head"
HEAD_BIAS = "head_bias"
_CUT_BY_INPUT = ("output", "output_b", "down", "select")


def layer_name(layer: int, part: str) -> str:
    """The name of a layer's tensor, such as `query` or `shared.gate`."""
    return f"layers.{layer}.{part}"


def expert_name(layer: int, expert: int, part: str) -> str:
    """The name of an expert's tensor, such as `up` or `up_bias`."""
    return f"layers.{layer}.experts.{expert}.{part}"


def cut_dim(name: str) -> int:
    """The dimension that layouts cut: input features of some matrices, else the first."""
    return 1 if name.rsplit(".", 1)[-1] in _CUT_BY_INPUT else 0


_WITHOUT_PRODUCT = {
    *("router", "kv_b", "shared_gate", "head_gate", "sinks", "decay_log", "skip"),
    *("entry", "entry_gate", "index_entry", "index_entry_gate", "experts_of_token"),
}


def is_matrix(name: str) -> bool:
    """True for the weight of a product, which may be kept in one byte.

    Routers are not, nor `kv_b`, which is taken apart by heads, nor gates of a value for each head
    or for a shared expert, nor what makes entries of compressed attention or mixes streams.
    """
    part = name.rpartition(".")[2]
    ends = "_norm", "_bias", "_conv", "_streams", "_streams_scale"
    return not (part in _WITHOUT_PRODUCT or name == EMBEDDING or part.endswith(ends))


def tensor_shape(model: ModelConfig, name: str) -> Shape:
    """The logical shape of a tensor.

    Raises:
        KeyError: the model has no tensor of that name.
    """
    return _shapes(model)[".".join(word for word in name.split(".") if not word.isdigit())]


def tensor_names(model: ModelConfig) -> Iterator[str]:
    """All tensors of a model, layer by layer; a tied head is none."""
    yield EMBEDDING
    expert = expert_shapes(model)
    for layer in range(model.num_hidden_layers):
        kind = model.kind_of_layer(layer)
        yield from (layer_name(layer, part) for part in layer_shapes(model, kind))
        for index in range(model.num_experts if kind.mlp == "experts" else 0):
            yield from (expert_name(layer, index, part) for part in expert)
    for name in outside_shapes(model):
        if name != EMBEDDING and not (name == HEAD and model.tie_word_embeddings):
            yield name


def outside_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Shapes of the tensors outside layers, a tied head among them; the embedding is first."""
    hidden, vocab = model.hidden_size, model.vocab_size
    shapes: dict[str, Shape] = {EMBEDDING: (vocab, hidden), FINAL_NORM: (hidden,)}
    if "norm" in model.further_biases:
        shapes[f"{FINAL_NORM}_bias"] = (hidden,)
    shapes |= stream_shapes("head", model.num_streams, hidden)
    shapes[HEAD] = (vocab, hidden)
    return shapes | ({HEAD_BIAS: (vocab,)} if "head" in model.further_biases else {})


def layer_shapes(model: ModelConfig, kind: LayerKind) -> dict[str, Shape]:
    """Shapes of a layer's tensors, its experts aside, by name without the layer."""
    hidden = model.hidden_size
    shapes: dict[str, Shape] = {}
    if kind.mixing is not None:
        shapes |= _norm_shapes(model, "attention_norm")
        shapes |= stream_shapes("attention", model.num_streams, hidden)
        if kind.mixing.kind == "attention":
            has_window = kind.mixing.window is not None
            own = _attention_shapes(model, kind.mixing)
            prefix = "window." if has_window and model.window_heads is not None else ""
            shapes |= {f"{prefix}{part}": shape for part, shape in own.items()}
        else:
            assert model.state is not None, "checked"
            own = model.state.shapes(hidden)
            shapes |= {f"state.{part}": shape for part, shape in own.items()}
    if kind.mlp != "none":
        shapes |= _norm_shapes(model, "moe_norm")
        shapes |= stream_shapes("moe", model.num_streams, hidden)
    if kind.mlp == "dense":
        shapes |= _mlp_shapes(model, "dense", model.intermediate_size)
    elif kind.mlp == "experts":
        shapes |= _moe_shapes(model, is_hashed=kind.is_hashed)
    return shapes


def kinds_of_layers(model: ModelConfig) -> Counter[LayerKind]:
    """How many layers of each kind a model has."""
    return Counter(map(model.kind_of_layer, range(model.num_hidden_layers)))


def num_params(model: ModelConfig) -> int:
    """All parameters of a model."""

    return _num_params(model, model.num_experts)


def num_active_params(model: ModelConfig, num_experts: int | None = None) -> int:
    """Parameters of a token's step: all but the experts it does not go to.

    Some model cards leave the embedding out, or the output head too.

    Args:
        num_experts: those of a layer that compute for it; None for all that it chooses.
    """
    return _num_params(model, model.num_experts_per_tok if num_experts is None else num_experts)


def _num_params(model: ModelConfig, num_experts: int) -> int:
    """Parameters with so many experts in each layer that has any."""

    def total(shapes: dict[str, Shape]) -> int:
        return sum(map(prod, shapes.values()))

    kinds, outside = kinds_of_layers(model), total(outside_shapes(model))
    num_sparse = sum(num for kind, num in kinds.items() if kind.mlp == "experts")
    return (
        sum(num * total(layer_shapes(model, kind)) for kind, num in kinds.items())
        + num_sparse * num_experts * total(expert_shapes(model))
        + outside
        - (model.vocab_size * model.hidden_size if model.tie_word_embeddings else 0)
    )


@lru_cache(maxsize=16)
def _shapes(model: ModelConfig) -> dict[str, Shape]:
    """Shapes by name, without the numbers of layer and expert."""
    in_layers = {f"experts.{part}": shape for part, shape in expert_shapes(model).items()}
    for kind in kinds_of_layers(model):
        in_layers |= layer_shapes(model, kind)
    in_layers = {f"layers.{part}": shape for part, shape in in_layers.items()}
    return outside_shapes(model) | in_layers


def _norm_shapes(model: ModelConfig, name: str) -> dict[str, Shape]:
    """Shapes of a norm of hidden states."""
    shapes: dict[str, Shape] = {name: (model.hidden_size,)}
    if "norm" in model.further_biases:
        shapes[f"{name}_bias"] = (model.hidden_size,)
    return shapes


def _attention_shapes(model: ModelConfig, mixing: Mixing) -> dict[str, Shape]:
    hidden, latent, index_query_in = model.hidden_size, model.latent, model.hidden_size
    heads = model.heads_of(has_window=mixing.window is not None)
    has_indexer = mixing.choice == "own"
    if model.compressed is not None:
        return model.compressed.shapes(
            *(hidden, heads.num, model.head_dim, mixing.entries, model.indexer)
        )
    shapes: dict[str, Shape] = {}
    if latent is None:
        query_size, key_size = heads.num * model.head_dim, heads.num_kv * model.head_dim
        queries = query_size * (2 if model.attention_gate == "sigmoid" else 1)
        widths = {"query": queries, "key": key_size, "value": heads.num_kv * model.value_dim}
        for part, width in widths.items():
            shapes[part] = (width, hidden)
            if model.qkv_bias:
                shapes[f"{part}_bias"] = (width,)
        if model.query_rank is not None:
            del shapes["query"]
            shapes |= {"query_a": (model.query_rank, hidden), "query_a_norm": (model.query_rank,)}
            shapes["query_b"] = (queries, model.query_rank)
        if model.qk_norm is not None:
            per_head = model.qk_norm != "full"
            shapes["query_norm"] = (model.head_dim if per_head else query_size,)
            shapes["key_norm"] = (model.head_dim if per_head else key_size,)
        if heads.have_sinks:
            shapes["sinks"] = (heads.num,)
    else:
        shapes |= latent.shapes(hidden, model.num_attention_heads)
        index_query_in = latent.q_lora_rank or hidden
    if has_indexer:
        assert model.indexer is not None, "checked"
        shapes |= model.indexer.shapes(hidden, index_query_in)
    if model.attention_gate == "head":
        shapes["head_gate"] = (heads.num, hidden)
    shapes["output"] = (hidden, heads.num * model.value_dim)
    if model.output_bias:
        shapes["output_bias"] = (hidden,)
    return shapes


def _moe_shapes(model: ModelConfig, *, is_hashed: bool) -> dict[str, Shape]:
    """Shapes of an MoE layer's tensors, its experts aside."""
    hidden, num_experts = model.hidden_size, model.num_routed_experts
    shapes: dict[str, Shape] = {"router": (num_experts, hidden)}
    if model.routing.router_bias:
        shapes["router_bias"] = (num_experts,)
    if is_hashed:
        shapes["experts_of_token"] = (model.vocab_size, model.num_experts_per_tok)
    elif model.routing.correction_bias:
        shapes["correction_bias"] = (num_experts,)
    if model.moe_latent_size is not None:
        shapes["latent_in"] = (model.moe_latent_size, hidden)
        shapes["latent_out"] = (hidden, model.moe_latent_size)
    if model.shared_expert_intermediate_size:
        shapes |= _mlp_shapes(model, "shared", model.shared_expert_intermediate_size)
    if model.shared_expert_gate:
        shapes["shared_gate"] = (1, hidden)
    return shapes


def _mlp_shapes(model: ModelConfig, prefix: str, inner: int) -> dict[str, Shape]:
    matrices = _matrices(model, inner, model.hidden_size)
    return {f"{prefix}.{part}": shape for part, shape in matrices.items()}


def expert_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Shapes of an expert's tensors, such as `up` or `up_bias`."""
    shapes = _matrices(model, model.moe_intermediate_size, model.expert_hidden_size)
    if model.expert_bias:
        shapes |= {f"{part}_bias": shape[:1] for part, shape in shapes.items()}
    return shapes


def _matrices(model: ModelConfig, inner: int, hidden: int) -> dict[str, Shape]:
    gate: dict[str, Shape] = {"gate": (inner, hidden)} if model.gated_mlp else {}
    return gate | {"up": (inner, hidden), "down": (hidden, inner)}
