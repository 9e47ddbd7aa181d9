"""Mixers of tokens: attention over pages, states of fixed size, and an indexer.

A layer mixes tokens by attention, whose tensors `spec.model` has, or by a `StateMixer`, which keeps
one state for each sequence. An `Indexer` chooses the positions that attention sees, and keeps a
key of its own for each.

Tensors of a state mixer are `layers.N.state.` and: `query`, `key`, `value`, `gate`, `output`;
`beta` (how strongly a delta rule corrects) and `decay` (of Mamba-2: its time step), with
`decay_a`, `decay_b`, `gate_a`, `gate_b` where they are of low rank; `query_conv`, `key_conv`,
`value_conv`, each a short causal convolution by channel, with `…_conv_bias`; `step_bias`,
`decay_log`, `skip`; `state_norm`. Mamba-1 has `select`, from the convolved values to a time step of
low rank (`decay_b` widens it), a key and a query, with `step_norm`, `key_norm` and `query_norm`.
Published checkpoints join some of them. Those of an indexer are
`index_query`, `index_key`, `index_norm` (of keys), and `index_weights` and `index_norm_bias`, or
else `index_query_norm`.

Compressed attention (DeepSeek-AI 2026, DeepSeek-V4): a token attends to the latest positions, its
window, and to entries that each stand for several positions before it. One vector of a position, or
of an entry, is key and value of all heads. An entry is the sum of its positions' vectors, weighted
by a softmax over them for each value. Layers differ in their entries:

- `chosen`: of a few positions each; an indexer with entries of its own chooses which a token sees.
  An entry also takes a second vector of each position of the entry before it.
- `all`: of many positions each; a token sees all.
- None: it sees the window alone.

Its tensors are, beside `query_a`, `query_a_norm`, `query_b` and `sinks`: `latent`, `latent_norm`;
for entries `entry`, `entry_gate`, `entry_bias` (of a position in its entry) and `entry_norm`;
`index_query`, `index_weights`, and the same four with `index_`; `output_a`, in groups of heads,
and `output_b`. Those of residual streams are `attention_streams`, `moe_streams` and, outside
layers, `head_streams`, each with a `…_bias` and a `…_scale`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from expertlane.spec.ranges import Strict

Shape = tuple[int, ...]
StateKind = Literal["gated_delta", "kimi_delta", "lightning", "mamba1", "mamba2"]
Entries = Literal["chosen", "all"]

STATE_BYTES = 4  # of a value of a state: float32, as serving engines keep it
INDEX_SCALE_BYTES = 4  # latent attention's index keys are in float8, each with a float32 scale

_TITLES: dict[StateKind, str] = {
    "gated_delta": "Gated DeltaNet",
    "kimi_delta": "Kimi Delta Attention",
    "lightning": "Lightning Attention",
    "mamba1": "Mamba-1",
    "mamba2": "Mamba-2",
}
_OF_KEY_HEADS = ("query", "key")


class Mixing(NamedTuple):
    """How a layer mixes tokens.

    Attributes:
        window: of attention, latest positions that a token sees, its own included; None for all.
        choice: of attention, whose indexer chooses the positions that a token sees: the layer's
            `own`, or an earlier layer's (`shared`); None where it sees all.
        entries: of compressed attention, which entries a token sees beside its window.
    """

    kind: Literal["attention", "state"] = "attention"
    window: int | None = None
    choice: Literal["own", "shared"] | None = None
    entries: Entries | None = None


@dataclass(frozen=True)
class RopeScaling(Strict):
    """Scaling of rotary frequencies beyond the length a model was trained at.

    `linear` divides all frequencies by `factor`. `llama3` (Llama 3.1) divides those whose
    wavelength exceeds original_max_position_embeddings / low_freq_factor, keeps those under
    original_max_position_embeddings / high_freq_factor, and blends between. `yarn` (Peng et al.
    2023) blends between the dimensions that turn `beta_fast` and `beta_slow` times over the
    original length. `longrope` (Ding et al. 2024) divides each frequency by a factor of its own,
    of two lists: for contexts up to the original length, and beyond.

    Attributes:
        truncate: yarn; whether the blend begins and ends at whole dimensions.
        attention_factor: yarn, longrope; cosines and sines are multiplied by it.
    """

    rope_type: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class LatentAttention(Strict):
    """Multi-head latent attention (DeepSeek-AI 2024): keys and values come from a short latent.

    A head's query and key are `qk_nope_head_dim` values without positions, then
    `qk_rope_head_dim` rotated ones; the rotated part of the key is common to all heads.

    Attributes:
        q_lora_rank: width of the queries' latent; None where queries have none.
        mscale: the softmax scale is head_dim^-0.5 · mscale².
        norm_eps: epsilon of the latents' norms; they do not take the model's rms_norm_eps.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    mscale: float = 1.0
    norm_eps: float = 1e-6

    def shapes(self, hidden: int, num_heads: int) -> dict[str, Shape]:
        """Shapes of its tensors, the output projection aside."""
        queries = num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        rank, kv_rank = self.q_lora_rank, self.kv_lora_rank
        shapes: dict[str, Shape] = {"query": (queries, hidden)}
        if rank is not None:
            shapes = {"query_a": (rank, hidden), "query_a_norm": (rank,)}
            shapes["query_b"] = (queries, rank)
        shapes["kv_a"] = (kv_rank + self.qk_rope_head_dim, hidden)
        shapes["kv_a_norm"] = (kv_rank,)
        shapes["kv_b"] = (num_heads * (self.qk_nope_head_dim + self.v_head_dim), kv_rank)
        return shapes


@dataclass(frozen=True)
class WindowHeads(Strict):
    """Attention of the layers with a window, where it has other heads than that of the others.

    Attributes:
        sinks: every head has a logit that takes part in the softmax's sum alone.
    """

    num_heads: int
    num_key_value_heads: int
    sinks: bool = False


@dataclass(frozen=True)
class StateMixer(Strict):
    """A mixer that keeps a state [num_heads, key_dim, value_dim] for each sequence.

    A token decays the state, adds the outer product of its key and value, and reads it with its
    query. `gated_delta` (Yang et al. 2024, Gated Delta Networks) first subtracts what the state
    has under the key already; `kimi_delta` (Kimi Team 2025, Kimi Linear) does so with a decay of
    its own for each of a key's values; `mamba2` (Dao and Gu 2024, Mamba-2) does not. `mamba1` (Gu
    and Dao 2023, Mamba) does not either; its heads are channels one value wide that share one
    query and key, and its decays differ by channel and by value of the key. `lightning` (Qin et al.
    2024, Lightning Attention-2) decays by a constant of each head.

    Attributes:
        num_heads: heads of values, each with a state; Mamba-1's channels.
        num_key_heads: heads of queries and keys, each for equally many of values; Mamba-2's groups.
        key_dim, value_dim: widths of a head; Mamba-2's state size and head size.
        conv_kernel: tokens that the convolutions see, the latest included; 0 without any.
        conv_bias: the convolutions have biases.
        proj_bias: the projections have biases.
        chunk_size: tokens of a prompt that are computed together; Mamba-1 takes one by one.
        step_rank: rank of Mamba-1's time step; 0 for the others.
        full_rank: Kimi Delta Attention's gate and decay are projections of full rank.
        qk_norm: Lightning Attention norms each head's query and key.
        norm_groups: groups of heads that are normed together, which no layout cuts; None: each
            head is by itself.
    """

    kind: StateKind
    num_heads: int
    num_key_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int = 4
    conv_bias: bool = False
    proj_bias: bool = False
    chunk_size: int = 64
    step_rank: int = 0
    full_rank: bool = False
    qk_norm: bool = False
    norm_groups: int | None = None

    @property
    def title(self) -> str:
        """The kind, as its authors call it."""
        return _TITLES[self.kind]

    def shapes(self, hidden: int) -> dict[str, Shape]:
        """Shapes of its tensors, by name without `state.`."""
        keys, values = self.num_key_heads * self.key_dim, self.num_heads * self.value_dim
        heads = self.num_heads
        widths = {"query": keys, "key": keys, "value": values}
        if self.kind == "mamba1":
            widths = {"value": values}
        shapes: dict[str, Shape] = {part: (width, hidden) for part, width in widths.items()}
        match self.kind:
            case "gated_delta":
                shapes |= {"gate": (values, hidden), "beta": (heads, hidden)}
                shapes |= {"decay": (heads, hidden), "step_bias": (heads,)}
                shapes["state_norm"] = (self.value_dim,)
            case "kimi_delta":
                for part, width in (("gate", values), ("decay", keys)):
                    if self.full_rank:
                        shapes[part] = (width, hidden)
                        continue
                    shapes[f"{part}_a"] = (self.key_dim, hidden)
                    shapes[f"{part}_b"] = (width, self.key_dim)
                shapes |= {"beta": (heads, hidden), "step_bias": (keys,)}
                shapes["state_norm"] = (self.value_dim,)
            case "mamba2":
                shapes |= {"gate": (values, hidden), "decay": (heads, hidden)}
                shapes |= {"step_bias": (heads,), "skip": (heads,), "state_norm": (values,)}
            case "lightning":
                shapes |= {"gate": (values, hidden), "state_norm": (values,)}
                if self.qk_norm:
                    shapes |= {"query_norm": (self.key_dim,), "key_norm": (self.key_dim,)}
            case "mamba1":
                shapes |= {"gate": (values, hidden), "select": (self.num_selected, values)}
                shapes |= {"decay_b": (values, self.step_rank), "step_bias": (values,)}
                shapes |= {"skip": (values,), "step_norm": (self.step_rank,)}
                shapes |= {"key_norm": (keys,), "query_norm": (keys,)}
        if self.kind != "lightning":
            shapes["decay_log"] = (heads, self.key_dim) if self.kind == "mamba1" else (heads,)
        for part, width in widths.items() if self.conv_kernel else ():
            shapes[f"{part}_conv"] = (width, self.conv_kernel)
            if self.conv_bias:
                shapes[f"{part}_conv_bias"] = (width,)
        shapes["output"] = (hidden, values)
        if self.proj_bias:
            named = [part for part in ("query", "key", "value", "gate", "decay") if part in shapes]
            shapes |= {f"{part}_bias": (shapes[part][0],) for part in named}
            shapes["output_bias"] = (hidden,)
        return shapes

    @property
    def num_cuts(self) -> int:
        """Parts that `tp` has to divide: heads, or the groups that are normed together."""
        return self.num_heads if self.norm_groups is None else self.norm_groups

    @property
    def num_selected(self) -> int:
        """Width of Mamba-1's `select`: a time step of low rank, a key and a query."""
        return self.step_rank + 2 * self.key_dim

    def heads_of(self, tp: int) -> tuple[int, int]:
        """Heads of values, and of queries and keys, of a rank; those fewer than `tp` are copied."""
        return self.num_heads // tp, max(1, self.num_key_heads // tp)

    def cut(self, part: str, size: int, tp: int, tp_rank: int) -> range:
        """The slice of a tensor that a rank holds, in the dimension that is cut: by heads.

        Args:
            size: of that dimension.
        """
        if part in ("gate_a", "decay_a", "step_norm", "query_norm", "key_norm") or (
            part == "state_norm" and size == self.value_dim
        ):
            return range(size)
        if part == "output_bias":  # added once
            return range(size if tp_rank == 0 else 0)
        if part.partition("_")[0] in _OF_KEY_HEADS and tp > self.num_key_heads:
            width = size // self.num_key_heads
            first = tp_rank * self.num_key_heads // tp * width
            return range(first, first + width)
        return range(size * tp_rank // tp, size * (tp_rank + 1) // tp)

    def conv_channels(self, tp: int) -> int:
        """Channels of a rank's convolutions: of queries, keys and values."""
        if not self.conv_kernel:
            return 0
        heads, key_heads = self.heads_of(tp)
        keys = 0 if self.kind == "mamba1" else 2 * key_heads * self.key_dim
        return keys + heads * self.value_dim

    def token_values(self, tp: int) -> int:
        """Values of a token that a rank reads and writes beside the state.

        Queries, keys and values, the result, and what is as many as heads: the strength of a delta
        rule, the decay or time step.
        """
        heads, key_heads = self.heads_of(tp)
        num_of_heads = {"lightning": 0, "mamba1": 1}.get(self.kind, 2)
        return 2 * key_heads * self.key_dim + heads * (2 * self.value_dim + num_of_heads)

    def state_bytes(self, tp: int, activation_bytes: int) -> int:
        """Bytes that a rank keeps of a sequence in a layer: the state, and the latest inputs of
        the convolutions."""
        heads, _ = self.heads_of(tp)
        latest = max(self.conv_kernel - 1, 0) * self.conv_channels(tp)
        return heads * self.key_dim * self.value_dim * STATE_BYTES + latest * activation_bytes

    def token_flops(self, heads: int, *, in_chunks: bool) -> int:
        """FLOPs of a token in `heads` heads, without projections and convolutions.

        One by one, as Mamba-1 always, a token reads the state with its query, adds an outer
        product, and with a delta rule reads it with its key. In chunks of C tokens (Yang et al.
        2024, section 3.3; Dao and Gu 2024, section 6) it also takes products inside the chunk: of
        queries and keys, and of those with values; with a delta rule of keys with keys, and two
        triangular systems.

        Args:
            in_chunks: of a prompt; else of one token at a time.
        """
        key, value, chunk = self.key_dim, self.value_dim, self.chunk_size
        state, has_delta = key * value, self.kind in ("gated_delta", "kimi_delta")
        if not in_chunks or self.kind == "mamba1":
            return heads * 2 * state * (3 if has_delta else 2)
        if has_delta:  # a triangular system takes half of a product
            inside = 2 * key + value + (key + value) / 2
            return round(heads * 2 * (chunk * inside + 3 * state))
        groups = self.num_key_heads / self.num_heads  # share their queries and keys
        return round(heads * 2 * (chunk * (groups * key + value) + 2 * state))


@dataclass(frozen=True)
class Indexer(Strict):
    """Chooses the positions that a token attends to, by index queries and a key of each position.

    That of latent attention (DeepSeek-AI 2025, DeepSeek-V3.2) chooses for all heads at once: a
    position's score is the sum over the index heads of weight · relu(query · key). Its queries come
    from the latent of attention's queries, and every rank of a `tp` group computes all of it. That
    of grouped queries (Lai et al. 2026, MiniMax Sparse Attention) has an index head for each
    key/value head, and chooses for that head and its queries; a score is query · key.

    Attributes:
        num_heads, head_dim: of index queries; the key is common to all index heads.
        topk: positions that a token sees at most.
        block_size: positions of a block, which are chosen together, by the best score among them;
            a token's own block is always chosen.
        by_group: it belongs to grouped queries.
    """

    num_heads: int
    head_dim: int
    topk: int
    block_size: int = 1
    by_group: bool = False

    def shapes(self, hidden: int, query_in: int) -> dict[str, Shape]:
        """Shapes of its tensors.

        Args:
            query_in: width of the input of index queries.
        """
        shapes: dict[str, Shape] = {
            "index_query": (self.num_heads * self.head_dim, query_in),
            "index_key": (self.head_dim, hidden),
            "index_norm": (self.head_dim,),
        }
        if self.by_group:
            return shapes | {"index_query_norm": (self.head_dim,)}
        return shapes | {
            "index_norm_bias": (self.head_dim,),
            "index_weights": (self.num_heads, hidden),
        }

    def heads_of(self, tp: int) -> int:
        """Index heads that a rank computes."""
        return max(1, self.num_heads // tp) if self.by_group else self.num_heads

    def position_bytes(self, activation_bytes: int) -> int:
        """Bytes of a position in the index cache of a layer.

        By default serving engines keep index keys of grouped queries in the type of activations.
        """
        if self.by_group:
            return self.head_dim * activation_bytes
        return self.head_dim + INDEX_SCALE_BYTES


StreamBlock = Literal["attention", "moe", "head"]
STREAMED: dict[StreamBlock, int] = {"attention": 3, "moe": 3, "head": 1}  # kinds of mixing weights


@dataclass(frozen=True)
class CompressedAttention(Strict):
    """Sizes of compressed attention, beside its heads, window and indexer.

    Attributes:
        q_lora_rank: width of the queries' latent.
        o_groups: groups of heads whose outputs go through a latent of their own.
        o_lora_rank: width of each group's latent.
        chosen_rate, all_rate: positions of an entry.
        layers: the entries of each layer.
    """

    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    layers: tuple[Entries | None, ...]
    chosen_rate: int = 4
    all_rate: int = 128

    def rate(self, entries: Entries) -> int:
        """Positions of an entry."""
        return self.chosen_rate if entries == "chosen" else self.all_rate

    def entry_width(self, entries: Entries, head_dim: int) -> int:
        """Values of a position that entries are made from: two vectors where they overlap."""
        return head_dim * (2 if entries == "chosen" else 1)

    def shapes(
        self,
        hidden: int,
        num_heads: int,
        head_dim: int,
        entries: Entries | None,
        indexer: Indexer | None,
    ) -> dict[str, Shape]:
        """Shapes of a layer's tensors."""
        rank, groups = self.q_lora_rank, self.o_groups
        shapes: dict[str, Shape] = {"query_a": (rank, hidden), "query_a_norm": (rank,)}
        shapes["query_b"] = (num_heads * head_dim, rank)
        shapes |= {"latent": (head_dim, hidden), "latent_norm": (head_dim,), "sinks": (num_heads,)}
        if entries is not None:
            shapes |= self._entry_shapes("", hidden, head_dim, entries)
        if entries == "chosen":
            assert indexer is not None, "checked"
            shapes |= self._entry_shapes("index_", hidden, indexer.head_dim, entries)
            shapes["index_query"] = (indexer.num_heads * indexer.head_dim, rank)
            shapes["index_weights"] = (indexer.num_heads, hidden)
        shapes["output_a"] = (groups * self.o_lora_rank, num_heads * head_dim // groups)
        shapes["output_b"] = (hidden, groups * self.o_lora_rank)
        return shapes

    def _entry_shapes(
        self, prefix: str, hidden: int, head_dim: int, entries: Entries
    ) -> dict[str, Shape]:
        width = self.entry_width(entries, head_dim)
        return {
            f"{prefix}entry": (width, hidden),
            f"{prefix}entry_gate": (width, hidden),
            f"{prefix}entry_bias": (self.rate(entries), width),
            f"{prefix}entry_norm": (head_dim,),
        }

    def state_bytes(self, entries: Entries, head_dim: int, indexer: Indexer | None) -> int:
        """Bytes that a rank keeps of a sequence, in a layer, to make the next entry from.

        Vectors and gates of an entry's positions in float32; where entries overlap, also the
        second vectors and gates of the entry before.
        """
        widths = [head_dim]
        if entries == "chosen":
            assert indexer is not None, "checked"
            widths.append(indexer.head_dim)
        values = sum(
            self.entry_width(entries, width) + (width if entries == "chosen" else 0)
            for width in widths
        )
        return 2 * self.rate(entries) * values * STATE_BYTES


def stream_shapes(block: StreamBlock, num_streams: int, hidden: int) -> dict[str, Shape]:
    """Shapes of the tensors that mix residual streams around a block (Xie et al. 2026, mHC).

    From all streams of a token they make the weights that join the streams into the block's input,
    spread its output over them, and mix them with each other; before the head they only join. A
    single stream has none.
    """
    if num_streams == 1:
        return {}
    num_weights = num_mixing(block, num_streams)
    return {
        f"{block}_streams": (num_weights, num_streams * hidden),
        f"{block}_streams_bias": (num_weights,),
        f"{block}_streams_scale": (STREAMED[block],),
    }


def num_mixing(block: StreamBlock, num_streams: int) -> int:
    """Number of weights that mix a token's streams around a block."""
    return num_streams if block == "head" else num_streams * (2 + num_streams)
