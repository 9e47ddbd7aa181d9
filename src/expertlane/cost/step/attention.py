"""The mixer of one layer as steps: norm, projections, the core over what is kept, the output.

With decode context parallelism the ranks of a `dcp` group hold every `dcp`-th position. To decode,
each gathers the queries of all their heads, attends to its own positions, and they add up what they
found, weighted by its log-sum-exp (as vLLM's `ag_rs`: arXiv:2507.07120 has the exchange in one
all-to-all). A chunk of a prompt gathers the positions that came before it.
"""

from dataclasses import replace

import numpy as np

from expertlane.balance.holding import Slices
from expertlane.cost.step.batch_sizes import AttentionSizes, TokenSizes
from expertlane.cost.step.operation import Ints, OpKind
from expertlane.cost.step.step_list import KernelSet, StepWriter
from expertlane.spec.mixers import STATE_BYTES, Indexer, LatentAttention, Mixing, StateMixer
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage

_SQUARES_BYTES = 8  # of a token's query and key, one float32 each
_SUM_BYTES = 4  # of a head's log-sum-exp, a float32


def mixer_steps(out: StepWriter, model: ModelConfig, mixing: Mixing, part: TokenSizes) -> None:
    """The mixer of a layer: from a rank's hidden states to the group's summed output."""
    hidden_bytes = model.hidden_size * out.types.activation_bytes
    out.by_token(Stage.ATTENTION, part, hidden_bytes, 2, out.norm_kernels)
    out.gather_tokens(part.owned, hidden_bytes)
    if mixing.kind == "state":
        assert model.state is not None, "checked"
        _state(out, model, model.state, part)
    elif model.latent is None:
        _grouped_query(out, model, mixing.window, part)
    else:
        _latent(out, model, model.latent, part)
    out.sum_tokens(Stage.COLLECTIVES, "tp", part.owned, hidden_bytes)


def _grouped_query(
    out: StepWriter, model: ModelConfig, window: int | None, part: TokenSizes
) -> None:
    own, dim, item = Slices(out.mesh.layout.tp), model.head_dim, out.types.activation_bytes
    has_window, value_dim = window is not None, model.value_dim
    heads = len(own.heads(model, has_window=has_window))
    kv_heads = len(own.kv_heads(model, has_window=has_window))
    kv_width = kv_heads * (dim + value_dim)
    gates = {None: 0, "head": heads, "sigmoid": heads * dim}[model.attention_gate]
    if (rank := model.query_rank) is None:
        out.gemm(Stage.ATTENTION, part.tokens, heads * dim + gates + kv_width, model.hidden_size)
    else:  # every rank computes the latent of all heads
        out.gemm(Stage.ATTENTION, part.tokens, rank + gates + kv_width, model.hidden_size)
        out.memory(Stage.ATTENTION, 2 * part.tokens * (rank * item), out.norm_kernels)
        out.gemm(Stage.ATTENTION, part.tokens, heads * dim, rank)
    turned_bytes = part.tokens * ((heads + kv_heads) * dim * item)
    kernels = out.kernels
    num_passes, num_kernels = 2, kernels.rotate + kernels.write
    if model.qk_norm == "full":
        out.memory(Stage.ATTENTION, turned_bytes, kernels.squares)
        out.all_gather(Stage.COLLECTIVES, "tp", part.tokens, 0, _SQUARES_BYTES)
        num_passes, num_kernels = num_passes + 2, num_kernels + kernels.scale
    elif model.qk_norm is not None:
        num_passes, num_kernels = num_passes + 2, num_kernels + kernels.head_norm
    position_bytes = out.types.cached_bytes(kv_width, 2 * kv_heads)
    stored_bytes = part.tokens * (kv_width * item + position_bytes)
    out.memory(Stage.ATTENTION, num_passes * turned_bytes + stored_bytes, num_kernels)
    _core(
        out,
        part.attention(window),
        # The mean of keys' and values' widths: products and bytes are sums of both.
        {"heads": heads, "kv_heads": kv_heads, "head_dim": (dim + value_dim) // 2},
        position_bytes=position_bytes,
        query_bytes=heads * dim * item,
        value_bytes=heads * value_dim * item,
    )
    _gate(out, model, part, heads * value_dim)
    out.gemm(Stage.ATTENTION, part.tokens, model.hidden_size, heads * value_dim)


def _gate(out: StepWriter, model: ModelConfig, part: TokenSizes, width: int) -> None:
    """The product of attention's output with the sigmoid of its gate, if it has one."""
    if model.attention_gate is not None:
        num_bytes = 3 * part.tokens * (width * out.types.activation_bytes)
        out.memory(Stage.ATTENTION, num_bytes, out.kernels.gate)


def _latent(out: StepWriter, model: ModelConfig, latent: LatentAttention, part: TokenSizes) -> None:
    types, tokens = out.types, part.tokens
    item, heads = types.activation_bytes, len(Slices(out.mesh.layout.tp).heads(model))
    rank, rope = latent.kv_lora_rank, latent.qk_rope_head_dim
    query_in, key_width = model.hidden_size, rank + rope
    if latent.q_lora_rank is not None:
        merged = key_width if out.kernels.merges_products else 0
        out.gemm(Stage.ATTENTION, tokens, latent.q_lora_rank + merged, query_in)
        query_in, key_width = latent.q_lora_rank, key_width - merged
        out.memory(Stage.ATTENTION, 2 * tokens * (query_in * item), out.norm_kernels)
    out.gemm(Stage.ATTENTION, tokens, heads * model.head_dim, query_in)
    if key_width:
        out.gemm(Stage.ATTENTION, tokens, key_width, model.hidden_size)
    if model.indexer is not None:
        _index(out, model, model.indexer, part)
    in_latent, expanded = _latent_sizes(out, model, latent, part)
    absorbed = in_latent.decode_seqs * in_latent.num_queries
    if in_latent.num_prefill_groups:
        absorbed = absorbed + in_latent.prefill_tokens
    # Queries are turned and put together with their part in the latent; so is the one key.
    position_bytes = types.cached_bytes(rank + rope, 1)
    moved = (2 * heads * model.head_dim + 4 * (rank + rope)) * item + position_bytes
    is_apart = out.kernels.expands_all and model.indexer is None
    put_together = 0 if is_apart else absorbed * (2 * heads * (rank + rope) * item)
    kernels = out.kernels
    num_kernels = 2 * kernels.rotate + out.norm_kernels + kernels.write + kernels.latent
    out.memory(Stage.ATTENTION, tokens * moved + put_together, num_kernels)
    if expanded.num_prefill_groups:
        _expanded(out, model, latent, heads, expanded, position_bytes)
    if (
        not expanded.num_prefill_groups
        or in_latent.num_decode_groups + in_latent.num_prefill_groups
    ):
        out.gemm(Stage.ATTENTION, absorbed, heads * rank, latent.qk_nope_head_dim, dtype=types.kept)
        widths: dict[str, Ints | int] = {"heads": heads, "key_dim": rank + rope, "value_dim": rank}
        if model.indexer is not None:
            _chosen(out, in_latent, widths, position_bytes)
        else:
            _core(
                out,
                in_latent,
                widths,
                position_bytes=position_bytes,
                query_bytes=heads * (rank + rope) * item,
                value_bytes=heads * rank * item,
            )
        out.gemm(Stage.ATTENTION, absorbed, heads * latent.v_head_dim, rank, dtype=types.kept)
    if model.attention_gate == "head":
        out.gemm(Stage.ATTENTION, tokens, heads, model.hidden_size)
    _gate(out, model, part, heads * latent.v_head_dim)
    out.gemm(Stage.ATTENTION, tokens, model.hidden_size, heads * latent.v_head_dim)


def _latent_sizes(
    out: StepWriter, model: ModelConfig, latent: LatentAttention, part: TokenSizes
) -> tuple[AttentionSizes, AttentionSizes]:
    """Sizes of attention in the latent, and of prompts with keys and values expanded per head.

    Where an indexer chooses what a token sees, it stays in the latent.
    """
    if model.indexer is not None:
        scored, chosen, dense = part.indexed_attention(model.indexer.topk)
        # Tokens choose different positions: any may be read.
        positions = np.minimum(chosen.prefill_pairs, scored.prefill_positions)
        return replace(chosen, prefill_positions=positions), dense
    if not out.kernels.expands_all:
        return part.latent_attention(latent)
    sizes = part.attention(None)
    return replace(sizes, num_prefill_groups=0), replace(sizes, num_decode_groups=0)


def _index(out: StepWriter, model: ModelConfig, indexer: Indexer, part: TokenSizes) -> None:
    """An indexer's queries, keys and scores of all positions, and the choice of the best."""
    query_in = model.latent.q_lora_rank if model.latent is not None else None
    assert query_in is not None, "checked"
    tokens, item = part.tokens, out.types.activation_bytes
    width = indexer.num_heads * indexer.head_dim
    out.gemm(Stage.ATTENTION, tokens, width, query_in)
    out.gemm(Stage.ATTENTION, tokens, indexer.head_dim + indexer.num_heads, model.hidden_size)
    moved = 2 * (width + indexer.head_dim) * item + indexer.position_bytes
    out.memory(Stage.ATTENTION, tokens * moved, out.kernels.rotate + out.kernels.write)
    sizes = part.indexed_attention(indexer.topk).scored
    for kind, num_groups, new, pairs, positions in (
        (
            OpKind.INDEX,
            sizes.num_prefill_groups,
            sizes.prefill_tokens,
            sizes.prefill_pairs,
            sizes.prefill_positions,
        ),
        (
            OpKind.INDEX_DECODE,
            sizes.num_decode_groups,
            sizes.decode_seqs * sizes.num_queries,
            sizes.decode_positions * sizes.num_queries,
            sizes.decode_positions,
        ),
    ):
        if not num_groups:
            continue
        scored: dict[str, Ints | int] = {"query_key_pairs": pairs, "tokens": new}
        out.operation(
            kind,
            Stage.ATTENTION,
            {
                **scored,
                "positions": positions,
                "heads": indexer.num_heads,
                "head_dim": indexer.head_dim,
            },
            kv_bytes=positions * indexer.position_bytes,
            dtype=out.types.index_type,
        )
        out.operation(OpKind.CHOOSE, Stage.ATTENTION, {**scored, "topk": indexer.topk})


def _chosen(
    out: StepWriter, sizes: AttentionSizes, widths: dict[str, Ints | int], position_bytes: int
) -> None:
    """Attention in the latent to the positions that an indexer chose.

    Decodes take the kernels of latent attention, over a table of chosen positions in place of
    pages.
    """
    heads = widths["heads"]
    if sizes.num_prefill_groups:
        out.operation(
            OpKind.SPARSE,
            Stage.ATTENTION,
            {
                "seqs": sizes.prefill_seqs,
                "query_key_pairs": sizes.prefill_pairs,
                "tokens": sizes.prefill_tokens,
                "positions": sizes.prefill_positions,
                **widths,
                "heads": np.maximum(heads, out.kernels.least_sparse_heads),
            },
            kv_bytes=sizes.prefill_positions * position_bytes,
        )
    if sizes.num_decode_groups:
        out.operation(
            OpKind.LATENT_DECODE,
            Stage.ATTENTION,
            {
                "seqs": sizes.decode_seqs,
                "positions": sizes.decode_positions,
                **widths,
                "heads": sizes.num_queries * heads,
            },
            kv_bytes=sizes.decode_positions * position_bytes,
        )


def _state(out: StepWriter, model: ModelConfig, state: StateMixer, part: TokenSizes) -> None:
    """A mixer with a state: projections, convolutions, the state, norm and gate, the output."""
    tokens, types, tp = part.tokens, out.types, out.mesh.layout.tp
    item = types.activation_bytes
    heads, _ = state.heads_of(tp)
    values, channels = heads * state.value_dim, state.conv_channels(tp)
    for k, n in _products(state, model.hidden_size, tp):
        out.gemm(Stage.ATTENTION, tokens, n, k)
    sizes = part.attention(None)
    if not state.conv_kernel:  # queries and keys are normed and turned
        turned = 2 * heads * state.key_dim * item
        num_passes = 4 if state.qk_norm else 2
        out.memory(Stage.ATTENTION, num_passes * tokens * turned, out.kernels.rotate)
    if state.kind == "mamba1":
        _selection(out, state, part, values)
    widths: dict[str, Ints | int] = {
        "state_values": heads * state.key_dim * state.value_dim,
        "token_values": state.token_values(tp),
    }
    for phase, num_groups, seqs, new in (
        ("prefill", sizes.num_prefill_groups, sizes.prefill_seqs, sizes.prefill_tokens),
        (
            "decode",
            sizes.num_decode_groups,
            sizes.decode_seqs,
            sizes.decode_seqs * sizes.num_queries,
        ),
    ):
        if not num_groups:
            continue
        both: dict[str, Ints | int] = {"seqs": seqs, "tokens": new}
        if state.conv_kernel:
            convolved = {**both, "channels": channels, "kernel": state.conv_kernel}
            out.operation(OpKind.CONVOLUTION, Stage.ATTENTION, convolved, dtype=types.activations)
        token_flops = state.token_flops(heads, in_chunks=phase == "prefill")
        out.operation(
            OpKind(f"{state.kind}_{phase}"),
            Stage.ATTENTION,
            {**both, "token_flops": token_flops, **widths},
            kv_bytes=(seqs + (seqs if phase == "prefill" else new))
            * (heads * state.key_dim * state.value_dim * STATE_BYTES),
            # Mamba-1 has no products of matrices: it takes each value by itself.
            dtype="float32" if state.kind == "mamba1" else types.activations,
        )
    out.memory(Stage.ATTENTION, 3 * tokens * (values * item), out.norm_kernels)
    out.gemm(Stage.ATTENTION, tokens, model.hidden_size, values)


def _selection(out: StepWriter, state: StateMixer, part: TokenSizes, values: int) -> None:
    """Mamba-1's time step, key and query, from convolved values that are cut over `tp`."""
    tokens, item, selected = part.tokens, out.types.activation_bytes, state.num_selected
    out.gemm(Stage.ATTENTION, tokens, selected, values)
    out.all_reduce(Stage.COLLECTIVES, "tp", part.owned, selected * item)
    out.memory(Stage.ATTENTION, 2 * tokens * (selected * item), 3 * out.norm_kernels)
    out.gemm(Stage.ATTENTION, tokens, values, state.step_rank)


def _products(state: StateMixer, hidden: int, tp: int) -> list[tuple[int, int]]:
    """Inputs and outputs of a rank's products into a state mixer; those of one input are one."""
    shapes = state.shapes(hidden)
    parts = ("query", "key", "value", "gate", "beta", "decay", "gate_a", "decay_a")
    own = {
        part: len(state.cut(part, shapes[part][0], tp, 0))
        for part in (*parts, "gate_b", "decay_b")
        if part in shapes
    }
    joined = [(hidden, sum(own.get(part, 0) for part in parts))]
    if state.kind == "mamba1":
        return joined  # the others take what is convolved
    return joined + [(state.key_dim, own[part]) for part in ("gate_b", "decay_b") if part in own]


def _expanded(
    out: StepWriter,
    model: ModelConfig,
    latent: LatentAttention,
    heads: int,
    sizes: AttentionSizes,
    position_bytes: int,
) -> None:
    """Attention of prompts over keys and values of each head, expanded from every latent."""
    width = heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    positions = sizes.prefill_positions
    out.gemm(Stage.ATTENTION, positions, width, latent.kv_lora_rank, dtype=out.types.kept)
    _core(
        out,
        sizes,
        {"heads": heads, "key_dim": model.head_dim, "value_dim": latent.v_head_dim},
        position_bytes=position_bytes,
        query_bytes=0,  # no decode
        value_bytes=0,
    )


def _core(
    out: StepWriter,
    sizes: AttentionSizes,
    widths: dict[str, Ints | int],
    *,
    position_bytes: int,
    query_bytes: int,
    value_bytes: int,
) -> None:
    """Prefill and decode attention over the cache, each where any rank has such a sequence.

    Several queries of a decode read the cache once, as more heads would.

    Args:
        position_bytes: bytes of a position in the cache.
        query_bytes, value_bytes: bytes of a token's queries and outputs, all heads of the rank.
    """
    prefill, decode = OpKind.PREFILL_ATTENTION, OpKind.DECODE_ATTENTION
    if "key_dim" in widths:
        prefill, decode = OpKind.LATENT_PREFILL, OpKind.LATENT_DECODE
    kernels, dcp = out.kernels, out.mesh.layout.dcp
    if sizes.num_prefill_groups:
        if dcp > 1:
            before = sizes.prefill_positions - sizes.prefill_tokens
            out.all_gather(Stage.COLLECTIVES, "dcp", -(-before // dcp), position_bytes)
        out.operation(
            prefill,
            Stage.ATTENTION,
            {
                "seqs": sizes.prefill_seqs,
                "query_key_pairs": sizes.prefill_pairs,
                "tokens": sizes.prefill_tokens,
                "positions": sizes.prefill_positions,
                **widths,
            },
            kv_bytes=sizes.prefill_positions * position_bytes,
            num_kernels=_calls(sizes.num_prefill_groups, kernels) * kernels.prefill_group,
        )
    if sizes.num_decode_groups:
        heads, tokens = widths["heads"], sizes.decode_seqs * sizes.num_queries
        if dcp > 1:
            out.all_gather(Stage.COLLECTIVES, "dcp", tokens, query_bytes)
            positions = -(-sizes.decode_positions // dcp)
            sizes, heads = replace(sizes, decode_positions=positions), heads * dcp
        out.operation(
            decode,
            Stage.ATTENTION,
            {
                "seqs": sizes.decode_seqs,
                "positions": sizes.decode_positions,
                **widths,
                "heads": sizes.num_queries * heads,
            },
            kv_bytes=sizes.decode_positions * position_bytes,
            num_kernels=_calls(sizes.num_decode_groups, kernels) * kernels.decode_group,
        )
        if dcp > 1:
            out.all_gather(Stage.COLLECTIVES, "dcp", tokens, 0, heads * _SUM_BYTES)
            out.memory(Stage.ATTENTION, 2 * dcp * tokens * value_bytes)
            out.reduce_scatter(Stage.COLLECTIVES, "dcp", tokens, value_bytes)


def _calls(num_groups: int, kernels: KernelSet) -> int:
    return num_groups if kernels.is_grouped else 1
