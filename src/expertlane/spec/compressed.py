"""Compressed attention (DeepSeek-AI 2026, DeepSeek-V4), and the residual streams around it.

A token attends to the latest positions, its window, and to entries that each stand for several
positions before it. One vector of a position, or of an entry, is key and value of all heads. An
entry is the sum of its positions' vectors, weighted by a softmax over them for each value. Layers
differ in their entries:

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
from typing import Literal

from expertlane.spec.mixers import STATE_BYTES, Entries, Indexer, Shape
from expertlane.spec.ranges import Strict

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
