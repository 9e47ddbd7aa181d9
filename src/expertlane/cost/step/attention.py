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
from expertlane.cost.step.operation import Amounts, Ints, OpKind
from expertlane.cost.step.step_list import KernelSet, StepWriter
from expertlane.spec.mixers import (
    STATE_BYTES,
    CompressedAttention,
    Entries,
    Indexer,
    LatentAttention,
    Mixing,
    StateMixer,
    StreamBlock,
    num_mixing,
)
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage

_SQUARES_BYTES = 8  # of a token's query and key, one float32 each
_SUM_BYTES = 4  # of a head's log-sum-exp, a float32
_SCORE_BYTES = 4  # of the best score of a block, a float32, and of a chosen one's number


def mixer_steps(out: StepWriter, model: ModelConfig, mixing: Mixing, part: TokenSizes) -> None:
    """The mixer of a layer: from a rank's hidden states to the group's summed output."""
    hidden_bytes = model.hidden_size * out.types.activation_bytes
    join_streams(out, model, Stage.ATTENTION, "attention", out.held(part))
    if model.num_streams == 1:
        out.by_token(Stage.ATTENTION, part, hidden_bytes, 2, out.norm_kernels)
    out.gather_tokens(part.owned, hidden_bytes)
    if mixing.kind == "state":
        assert model.state is not None, "checked"
        _state(out, model, model.state, part)
    elif model.compressed is not None:
        _compressed(out, model, model.compressed, mixing, part)
    elif model.latent is None:
        _grouped_query(out, model, mixing, part)
    else:
        _latent(out, model, model.latent, mixing, part)
    out.sum_tokens(Stage.COLLECTIVES, "tp", part.owned, hidden_bytes)


def _grouped_query(out: StepWriter, model: ModelConfig, mixing: Mixing, part: TokenSizes) -> None:
    own, dim, item = Slices(out.mesh.layout.tp), model.head_dim, out.types.activation_bytes
    has_window, value_dim = mixing.window is not None, model.value_dim
    indexer = model.indexer if mixing.choice == "own" else None
    index_width = 0 if indexer is None else (indexer.heads_of(own.tp) + 1) * indexer.head_dim
    heads = len(own.heads(model, has_window=has_window))
    kv_heads = len(own.kv_heads(model, has_window=has_window))
    kv_width = kv_heads * (dim + value_dim)
    gates = {None: 0, "head": heads, "sigmoid": heads * dim}[model.attention_gate]
    if (rank := model.query_rank) is None:
        width = heads * dim + gates + kv_width + index_width
        out.gemm(Stage.ATTENTION, part.tokens, width, model.hidden_size)
    else:  # every rank computes the latent of all heads
        width = rank + gates + kv_width + index_width
        out.gemm(Stage.ATTENTION, part.tokens, width, model.hidden_size)
        out.memory(Stage.ATTENTION, 2 * part.tokens * (rank * item), out.norm_kernels)
        out.gemm(Stage.ATTENTION, part.tokens, heads * dim, rank)
    # Index queries and keys are normed and turned as the others are.
    turned_bytes = part.tokens * (((heads + kv_heads) * dim + index_width) * item)
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
    if indexer is not None:
        stored_bytes = stored_bytes + part.tokens * indexer.position_bytes(item)
    out.memory(Stage.ATTENTION, num_passes * turned_bytes + stored_bytes, num_kernels)
    # The mean of keys' and values' widths: products and bytes are sums of both.
    widths: dict[str, Ints | int]
    widths = {"heads": heads, "kv_heads": kv_heads, "head_dim": (dim + value_dim) // 2}
    if mixing.choice is not None:
        assert model.indexer is not None, "checked"
        if indexer is not None:
            _scores(out, indexer, part.indexed_attention(indexer).scored)
        chosen, _ = _chosen_sizes(model.indexer, part)
        _chosen(out, chosen, widths, position_bytes)
    else:
        _core(
            out,
            part.attention(mixing.window),
            widths,
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


def _latent(
    out: StepWriter, model: ModelConfig, latent: LatentAttention, mixing: Mixing, part: TokenSizes
) -> None:
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
    indexer = model.indexer if mixing.choice is not None else None
    if indexer is not None and mixing.choice == "own":
        _index(out, model, indexer, part)
        _scores(out, indexer, part.indexed_attention(indexer).scored)
    in_latent, expanded = _latent_sizes(out, indexer, latent, part)
    absorbed = in_latent.decode_seqs * in_latent.num_queries
    if in_latent.num_prefill_groups:
        absorbed = absorbed + in_latent.prefill_tokens
    # Queries are turned and put together with their part in the latent; so is the one key.
    position_bytes = types.cached_bytes(rank + rope, 1)
    moved = (2 * heads * model.head_dim + 4 * (rank + rope)) * item + position_bytes
    is_apart = out.kernels.expands_all and indexer is None
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
        if indexer is not None:
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
    out: StepWriter, indexer: Indexer | None, latent: LatentAttention, part: TokenSizes
) -> tuple[AttentionSizes, AttentionSizes]:
    """Sizes of attention in the latent, and of prompts with keys and values expanded per head.

    Where an indexer chooses what a token sees, it stays in the latent.
    """
    if indexer is not None:
        return _chosen_sizes(indexer, part)
    if not out.kernels.expands_all:
        return part.latent_attention(latent)
    sizes = part.attention(None)
    return replace(sizes, num_prefill_groups=0), replace(sizes, num_decode_groups=0)


def _chosen_sizes(indexer: Indexer, part: TokenSizes) -> tuple[AttentionSizes, AttentionSizes]:
    """Sizes of attention to chosen positions, and of dense prompts, which see all positions."""
    scored, chosen, dense = part.indexed_attention(indexer)
    # Tokens choose different positions: any may be read.
    positions = np.minimum(chosen.prefill_pairs, scored.prefill_positions)
    return replace(chosen, prefill_positions=positions), dense


def _index(out: StepWriter, model: ModelConfig, indexer: Indexer, part: TokenSizes) -> None:
    """The queries and keys of an indexer of latent attention."""
    query_in = model.latent.q_lora_rank if model.latent is not None else None
    assert query_in is not None, "checked"
    tokens, item = part.tokens, out.types.activation_bytes
    width = indexer.num_heads * indexer.head_dim
    out.gemm(Stage.ATTENTION, tokens, width, query_in)
    out.gemm(Stage.ATTENTION, tokens, indexer.head_dim + indexer.num_heads, model.hidden_size)
    moved = 2 * (width + indexer.head_dim) * item + indexer.position_bytes(item)
    out.memory(Stage.ATTENTION, tokens * moved, out.kernels.rotate + out.kernels.write)


def _scores(out: StepWriter, indexer: Indexer, sizes: AttentionSizes) -> None:
    """An indexer's scores of positions or entries, and the choice of the best.

    A score is summed over the index heads; by groups, each head has one for each block, its best.
    """
    heads, types = indexer.heads_of(out.mesh.layout.tp), out.types
    position_bytes = indexer.position_bytes(types.activation_bytes)
    of_query = heads * indexer.head_dim * (types.activation_bytes if indexer.by_group else 1)
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
        of_blocks = -(-pairs * heads // indexer.block_size)
        scores = of_blocks if indexer.by_group else pairs
        out.operation(
            kind,
            Stage.ATTENTION,
            {
                "query_key_pairs": pairs,
                "tokens": new,
                "heads": heads,
                "head_dim": indexer.head_dim,
                "read_bytes": positions * position_bytes + new * of_query,
                "scores": scores,
            },
            kv_bytes=positions * position_bytes,
            dtype=types.activations if indexer.by_group else types.index_type,
        )
        if indexer.by_group:  # few scores: the choice is priced as reading them
            chosen = heads * indexer.topk // indexer.block_size
            out.memory(Stage.ATTENTION, _SCORE_BYTES * (scores + new * chosen))
        else:
            chosen_of = {"query_key_pairs": pairs, "tokens": new, "topk": indexer.topk}
            out.operation(OpKind.CHOOSE, Stage.ATTENTION, chosen_of)


def _chosen(
    out: StepWriter,
    sizes: AttentionSizes,
    widths: dict[str, Ints | int],
    position_bytes: int,
    of_prompts: OpKind = OpKind.SPARSE,
) -> None:
    """Attention to the positions that an indexer chose, in the latent or by grouped queries.

    Decodes take the kernels of attention to all positions, over a table of chosen ones in place of
    pages.
    """
    heads, in_latent = widths["heads"], "key_dim" in widths
    if sizes.num_prefill_groups:
        least = out.kernels.least_sparse_heads if in_latent else 1
        out.operation(
            of_prompts if in_latent else OpKind.SPARSE_GROUPED,
            Stage.ATTENTION,
            {
                "seqs": sizes.prefill_seqs,
                "query_key_pairs": sizes.prefill_pairs,
                "tokens": sizes.prefill_tokens,
                "positions": sizes.prefill_positions,
                **widths,
                "heads": np.maximum(heads, least),
            },
            kv_bytes=sizes.prefill_positions * position_bytes,
        )
    if sizes.num_decode_groups:
        out.operation(
            OpKind.LATENT_DECODE if in_latent else OpKind.DECODE_ATTENTION,
            Stage.ATTENTION,
            {
                "seqs": sizes.decode_seqs,
                "positions": sizes.decode_positions,
                **widths,
                "heads": sizes.num_queries * heads,
            },
            kv_bytes=sizes.decode_positions * position_bytes,
        )


def _compressed(
    out: StepWriter,
    model: ModelConfig,
    compressed: CompressedAttention,
    mixing: Mixing,
    part: TokenSizes,
) -> None:
    """Attention to a window and to entries, by the kernels that take chosen positions.

    Every rank makes all entries and index queries; `tp` cuts heads and the output's groups.
    """
    tokens, types, tp = part.tokens, out.types, out.mesh.layout.tp
    item, dim, heads = types.activation_bytes, model.head_dim, len(Slices(tp).heads(model))
    rank, num_groups = compressed.q_lora_rank, compressed.o_groups // tp
    out.gemm(Stage.ATTENTION, tokens, rank + dim, model.hidden_size)
    out.memory(Stage.ATTENTION, 2 * tokens * (rank * item), out.norm_kernels)
    out.gemm(Stage.ATTENTION, tokens, heads * dim, rank)
    sizes, vector_bytes = part.attention(mixing.window), types.cached_bytes(dim, 1)
    if (entries := mixing.entries) is not None:
        _make_entries(out, model, compressed, entries, part)
        sizes = _with_entries(sizes, _entry_sizes(out, model, compressed, entries, part))
    # Queries and the one key are normed and turned; the rotated part of the output is turned back.
    turned = 2 * (heads * (dim + model.rotary_dim) + dim) * item + vector_bytes
    num_kernels = 2 * out.kernels.rotate + out.kernels.head_norm + out.kernels.write
    out.memory(Stage.ATTENTION, tokens * turned, num_kernels)
    widths: dict[str, Ints | int] = {"heads": heads, "key_dim": dim, "value_dim": dim}
    _chosen(out, sizes, widths, vector_bytes, types.of_compressed)
    # Each group of heads has a product of its own: together one of as many rows.
    latent = num_groups * compressed.o_lora_rank
    out.gemm(Stage.ATTENTION, tokens, latent, model.attention_size // compressed.o_groups)
    out.gemm(Stage.ATTENTION, tokens, model.hidden_size, latent)


def _make_entries(
    out: StepWriter,
    model: ModelConfig,
    compressed: CompressedAttention,
    entries: Entries,
    part: TokenSizes,
) -> None:
    """Vectors and gates of all tokens, and the entries that they fill."""
    types, widths = out.types, [model.head_dim]
    entry_bytes = types.cached_bytes(model.head_dim, 1)
    if entries == "chosen":
        assert model.indexer is not None, "checked"
        widths.append(model.indexer.head_dim)
        entry_bytes += model.indexer.position_bytes(types.activation_bytes)
    made = 2 * sum(compressed.entry_width(entries, width) for width in widths)
    out.gemm(Stage.ATTENTION, part.tokens, made, model.hidden_size, dtype=types.kept)
    sizes = part.attention(None)
    # A decode writes its own to the state, and the entry's last token reads them.
    num_bytes = part.tokens * (made * types.activation_bytes)
    num_bytes = num_bytes + part.tokens * entry_bytes // compressed.rate(entries)
    num_bytes = num_bytes + sizes.decode_seqs * sizes.num_queries * (2 * made * STATE_BYTES)
    num_kernels = len(widths) * (out.kernels.write + out.kernels.rotate)
    out.memory(Stage.ATTENTION, num_bytes, num_kernels)


def _entry_sizes(
    out: StepWriter,
    model: ModelConfig,
    compressed: CompressedAttention,
    entries: Entries,
    part: TokenSizes,
) -> AttentionSizes:
    """Sizes of attention to entries; emits an indexer's steps where it chooses them."""
    every = part.attention(None, compressed.rate(entries))
    if entries == "all":
        return every
    indexer, tokens = model.indexer, part.tokens
    assert indexer is not None, "checked"
    width = indexer.num_heads * indexer.head_dim
    out.gemm(Stage.ATTENTION, tokens, width, compressed.q_lora_rank)
    out.gemm(Stage.ATTENTION, tokens, indexer.num_heads, model.hidden_size, dtype=out.types.kept)
    out.memory(
        Stage.ATTENTION, 2 * tokens * (width * out.types.activation_bytes), out.kernels.rotate
    )
    _scores(out, indexer, every)
    chosen = part.attention(indexer.topk, compressed.rate(entries))
    # Tokens choose different entries: any may be read.
    positions = np.minimum(chosen.prefill_pairs, every.prefill_positions)
    return replace(chosen, prefill_positions=positions)


def _with_entries(window: AttentionSizes, entries: AttentionSizes) -> AttentionSizes:
    """Sizes of attention to a window and entries together."""
    return replace(
        window,
        decode_positions=window.decode_positions + entries.decode_positions,
        prefill_pairs=window.prefill_pairs + entries.prefill_pairs,
        prefill_positions=window.prefill_positions + entries.prefill_positions,
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


_MIXING_TYPE = "float32"


def join_streams(
    out: StepWriter, model: ModelConfig, stage: Stage, block: StreamBlock, rows: Amounts
) -> None:
    """A block's normed input from all streams, and the weights that mix them after it.

    The same kernel makes these weights from their logits; that is not counted.

    Args:
        rows: tokens whose streams a rank has.
    """
    num, hidden = model.num_streams, model.hidden_size
    if num == 1:
        return
    out.gemm(stage, rows, num_mixing(block, num), num * hidden, dtype=_MIXING_TYPE)
    out.memory(stage, rows * ((num + 1) * hidden * out.types.activation_bytes))


def spread_over_streams(
    out: StepWriter, model: ModelConfig, stage: Stage, part: TokenSizes
) -> None:
    """Mix the streams with each other, and add a block's output to each."""
    if model.num_streams > 1:
        num_passes = 2 * model.num_streams + 1
        row_bytes = model.hidden_size * out.types.activation_bytes
        out.memory(stage, out.held(part) * (num_passes * row_bytes))
