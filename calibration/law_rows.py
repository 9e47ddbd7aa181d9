"""Tables as rows of laws: which columns are the sizes that each kind is looked up by.

Laws interpolate between knots, by kernel; first and last knots become the tables' extremes.

Where routing is skewed, aiconfigurator draws the experts' loads from a power law (between 1 and 0.8
of the tokens), scales them to the pairs there are, and times the rank with the most. Which loads it
drew is not in its tables, so this draws some of its own and takes the mean. An expert's time then
follows from the law of balanced routing at that rank's pairs and experts with any.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from compute import Sizes, Source
from sheet import Generation
from tables import Array, Columns, Table

from expertlane.cost.step.batch_sizes import pairs_and_positions
from expertlane.spec.mixers import INDEX_SCALE_BYTES, StateKind, StateMixer

_NUM_DRAWS = 16
_SEED = 0
_MOST_OF_TOKENS = 0.8


def busiest_rank(columns: Columns) -> tuple[Array, Array]:
    """Pairs, and experts with any, on the busiest rank; [N] each."""
    names = ("num_tokens", "topk", "num_experts", "moe_ep_size", "alpha")
    cases = np.stack([columns[name] for name in names], axis=1)
    distinct, which = np.unique(cases, axis=0, return_inverse=True)
    random = np.random.default_rng(_SEED)
    busiest = np.array([_busiest(*case, random) for case in distinct.tolist()])
    return busiest[which.reshape(-1), 0], busiest[which.reshape(-1), 1]


def _busiest(
    tokens: float,
    topk: float,
    experts: float,
    ranks: float,
    alpha: float,
    random: np.random.Generator,
) -> tuple[float, float]:
    pairs = tokens * topk
    least, most = (1.0, tokens * _MOST_OF_TOKENS) if pairs > experts else (0.01, 2.0)
    power = 1 - alpha
    uniform = random.random((_NUM_DRAWS, int(experts)))
    drawn = ((most**power - least**power) * uniform + least**power) ** (1 / power)
    counts = np.minimum(np.rint(drawn / drawn.sum(axis=1, keepdims=True) * pairs), tokens)
    by_rank = counts.reshape(_NUM_DRAWS, int(ranks), -1)
    load = by_rank.sum(axis=2)
    rank = load.argmax(axis=1)
    draw = np.arange(_NUM_DRAWS)
    active = (by_rank[draw, rank] > 0).sum(axis=1)
    return max(load[draw, rank].mean(), 1.0), max(active.mean(), 1.0)


Axes = Mapping[str, Sequence[float]]

_KEYS_PER_QUERY = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
_QUERY_HEADS = (16, 128, 1024, 8192, 65536, 524288, 8388608)
_POSITIONS = (2, 64, 256, 1024, 4096, 16384, 131072)
_KEYS_SCORED = (1, 64, 256, 1024, 2048, 8192, 32768, 131072)
_WIDTHS = (32, 128, 512, 1024, 2048, 4096, 8192, 16384, 65536)
_COMMON: dict[str, Axes] = {
    "gemm": {
        "m": (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4352, 32768),
        "n": _WIDTHS,
        "k": _WIDTHS,
    },
    "experts": {
        "pairs_per_expert": (1, 2, 8, 32, 128, 512, 4096),
        "active": (1, 4, 16, 64, 512),
        "hidden": (2048, 4096, 7168),
        "inner": (16, 128, 512, 1024, 4096, 16384),
    },
    "latent_decode": {
        "positions_per_seq": _POSITIONS,
        "seqs": (1, 4, 16, 64, 256, 1024),
        "heads": (1, 4, 16, 64, 128),
        "key_dim": (576,),
    },
    "state_prefill": {
        "tokens_per_seq": (1, 16, 64, 256, 1024, 4096, 32768),
        "state_values": (2**15, 2**17, 2**20, 2**23, 2**26, 2**30),
    },
    "state_decode": {"state_values": tuple(2**power for power in range(15, 31))},
    "convolution": {
        "bytes": (1e3, 1e5, 1e6, 3e6, 1e7, 3e7, 1e8, 1e9),
        "tokens_per_seq": (1, 16, 256, 32768),
    },
    "index": {
        "tokens": (1, 16, 64, 256, 1024, 4096, 16384, 131072),
        "keys_per_query": _KEYS_SCORED,
    },
    "index_decode": {
        "tokens": (1, 4, 16, 64, 256, 1024),
        "keys_per_query": (1, 64, 256, 1024, 4096, 16384, 65536, 262144),
    },
    "choose": {
        "tokens": (1, 16, 64, 256, 1024, 4096, 16384, 131072),
        "keys_per_query": _KEYS_SCORED[4:],
    },
    "sparse": {
        "tokens": (1, 16, 64, 256, 1024, 4096, 16384, 131072),
        "keys_per_query": (1, 32, 128, 512, 1024, 2048),
        "heads": (64, 128),
    },
    "compressed": {
        "tokens": (1, 16, 64, 256, 1024, 4096, 16384, 131072),
        "keys_per_query": (1, 32, 128, 256, 512, 1024, 2048),
    },
}
# Where a cache's bandwidth ends, and how wide heads are that were timed.
_HOPPERS_BYTES = (1e2, 1e5, 1e6, 3e6, 1e7, 3e7, 4e7, 5e7, 1e9)
_BYTES = (1e2, 1e5, 1e6, 3e6, 1e7, 3e7, 6e7, 1e8, 1.5e8, 1e9)
_HEAD_DIMS = (64, 128, 256, 512)


def axes_of(generation: Generation) -> dict[str, Axes]:
    """By kernel, the knots of each axis."""
    is_hopper, is_blackwell = (
        generation is each for each in (Generation.HOPPER, Generation.BLACKWELL)
    )
    return {
        **_COMMON,
        "memory": {"bytes": _HOPPERS_BYTES if is_hopper else _BYTES},
        "prefill": {
            "keys_per_query": _KEYS_PER_QUERY,
            "query_heads": _QUERY_HEADS,
            "group": (1, 4, 16, 64),
            "head_dim": _HEAD_DIMS if is_blackwell else _HEAD_DIMS[:-1],
        },
        "decode": {
            "positions_per_seq": _POSITIONS,
            "seq_kv_heads": (1, 8, 64, 256, 1024, 4096, 16384),
            "group": (1, 4, 8, 16, 64),
            "head_dim": _HEAD_DIMS,
        },
        "latent_prefill": {
            "keys_per_query": _KEYS_PER_QUERY,
            "query_heads": _QUERY_HEADS,
            "key_dim": (192, 576) if is_hopper else (192,),
        },
    }


ATTENTION = "{}/attention/{}/{}_attention_perf.parquet"
_HEADS = ("num_heads", "num_key_value_heads", "head_dim")
LATENT = {"key_dim": 576.0, "value_dim": 512.0}  # DeepSeek's rank 512 and rotated 64
WIDENED = {"key_dim": 192.0, "value_dim": 128.0}  # the same, keys and values of every head apart


def gemm_rows(path: str, where: Mapping[str, object]) -> Source:
    """Products."""
    return Source(
        Table(path, where, lambda c: c["m"] * c["n"] * c["k"]),
        lambda c: {"m": c["m"], "n": c["n"], "k": c["k"]},
        shape=("n", "k"),
        along=("m",),
    )


def _pairs(c: Columns) -> Array:
    """Token-expert pairs on one rank: `num_tokens` counts those of all `moe_ep_size` ranks."""
    return np.maximum(c["num_tokens"] * c["topk"] / c["moe_ep_size"], 1)


def _expert_sizes(c: Columns) -> Sizes:
    pairs = _pairs(c)
    active = np.minimum(c["num_experts"] / c["moe_ep_size"], pairs)
    if "alpha" in c:
        pairs, active = busiest_rank(c)
    return {
        "pairs": pairs,
        "active": active,
        "hidden": c["hidden_size"],
        "inner": c["inter_size"] / c["moe_tp_size"],
        "matrices": 3.0,
    }


def expert_rows(
    path: str,
    where: Mapping[str, object],
    shape: tuple[str, ...] = ("hidden_size", "inter_size", "topk", "num_experts"),
) -> Source:
    """Experts, gated: of three matrices each."""
    return Source(
        Table(
            path, where, lambda c: _pairs(c) * c["hidden_size"] * c["inter_size"] / c["moe_tp_size"]
        ),
        _expert_sizes,
        shape=shape,
        along=("num_tokens", "-moe_tp_size"),
    )


def _causal(c: Columns) -> dict[str, Array]:
    tokens = c["batch_size"] * c["isl"]
    return {
        "seqs": c["batch_size"],
        "query_key_pairs": tokens * (c["isl"] + 1) / 2,
        "tokens": tokens,
        "positions": tokens,
        "heads": c["num_heads"],
    }


def _one_token(c: Columns) -> dict[str, Array]:
    return {
        "seqs": c["batch_size"],
        "positions": c["batch_size"] * (c["step"] + 1),
        "heads": c["num_heads"],
    }


def _grouped(c: Columns) -> dict[str, Array]:
    return {"kv_heads": c["num_key_value_heads"], "head_dim": c["head_dim"]}


def prefill_rows(path: str, where: Mapping[str, object]) -> Source:
    """Prompts, causal."""
    return Source(
        Table(
            path,
            where,
            lambda c: _causal(c)["query_key_pairs"] * c["num_heads"] * c["head_dim"],
        ),
        lambda c: {**_causal(c), **_grouped(c)},
        shape=_HEADS,
        along=("isl",),
    )


def decode_rows(path: str, where: Mapping[str, object]) -> Source:
    """One token a sequence."""
    return Source(
        Table(path, where, lambda c: _one_token(c)["positions"] * c["num_heads"] * c["head_dim"]),
        lambda c: {**_one_token(c), **_grouped(c)},
        shape=_HEADS,
        along=("step",),
    )


def latent_prefill_rows(path: str, cache: str, dims: dict[str, float]) -> Source:
    """Prompts of latent attention."""
    return Source(
        Table(
            path,
            {"kv_cache_dtype": cache},
            lambda c: _causal(c)["query_key_pairs"] * c["num_heads"],
        ),
        lambda c: {**_causal(c), **dims},
        shape=("num_heads", "batch_size"),
        along=("isl",),
    )


def latent_decode_rows(path: str, cache: str) -> Source:
    """One token a sequence, in the latent."""
    return Source(
        Table(
            path,
            {"kv_cache_dtype": cache},
            lambda c: _one_token(c)["positions"] * c["num_heads"],
        ),
        lambda c: {**_one_token(c), **LATENT},
        shape=("num_heads", "batch_size"),
        along=("step",),
    )


def scaling_rows(path: str) -> Source:
    """Rows that are read as bfloat16 and written as float8."""
    return Source(
        Table(path, {}, lambda c: c["m"] * c["k"]),
        lambda c: {"bytes": 3 * c["m"] * c["k"]},
        shape=("k",),
        along=("m",),
    )


def state_rows(kind: StateKind, path: str, kernel: str, *, is_prefill: bool) -> Source:
    """New tokens through states, float32: prompts in chunks, or one token a sequence."""

    def sizes(c: Columns) -> Sizes:
        values = c["num_v_heads"] * c["head_v_dim"]
        return {
            **_batch(c),
            "state_values": values * c["head_k_dim"],
            "token_flops": _token_flops(kind, c, in_chunks=is_prefill),
            "token_values": _channels(c) + values + 2 * c["num_v_heads"],
        }

    return Source(
        Table(
            path,
            {"kernel_source": kernel},
            lambda c: c["batch_size"] * c["seq_len"] * c["num_v_heads"],
            without=("num_tokens",),
        ),
        sizes,
        shape=("num_k_heads", "num_v_heads"),
        along=("seq_len", "batch_size"),
    )


def convolution_rows(path: str, kernel: str, lengths: tuple[int, ...]) -> Source:
    """Short convolutions by channel of queries, keys and values, and the activation.

    Args:
        lengths: new tokens of a sequence.
    """
    return Source(
        Table(
            path,
            {"kernel_source": kernel, "seq_len": lengths},
            lambda c: c["batch_size"] * c["seq_len"] * _channels(c),
            without=("num_tokens",),
        ),
        lambda c: {**_batch(c), "channels": _channels(c), "kernel": c["d_conv"]},
        shape=("num_k_heads", "num_v_heads"),
        along=("seq_len", "batch_size"),
    )


def _batch(c: Columns) -> dict[str, Array]:
    return {"seqs": c["batch_size"], "tokens": c["batch_size"] * c["seq_len"]}


def _channels(c: Columns) -> Array:
    return 2 * c["num_k_heads"] * c["head_k_dim"] + c["num_v_heads"] * c["head_v_dim"]


def _token_flops(kind: StateKind, c: Columns, *, in_chunks: bool) -> Array:
    names = ("num_v_heads", "num_k_heads", "head_k_dim", "head_v_dim")
    shapes = np.stack([c[name] for name in names], axis=1).astype(int)
    distinct, which = np.unique(shapes, axis=0, return_inverse=True)
    mixers = [StateMixer(kind, *shape) for shape in distinct.tolist()]
    flops = [mixer.token_flops(mixer.num_heads, in_chunks=in_chunks) for mixer in mixers]
    return np.array(flops, dtype=np.float64)[which.reshape(-1)]


_V4_POSITIONS = 4  # that share a key in DeepSeek-V4's indexer
_V4_WINDOW, _V4_ENTRY = 128, 128  # positions of its window, and of an entry that all tokens see
TOPK = 2048.0  # positions that the indexers of DeepSeek-V3.2 and GLM-5 choose


def index_rows(path: str) -> Source:
    """Scores of positions by a prompt's tokens, from keys in float8, of GLM-5's 32 heads of 128.

    Tables name the heads of its attention.
    """
    return _of_indexer(path, lambda c: _index_sizes(_scored(c), 32.0))


def index_decode_rows(path: str) -> Source:
    """Scores by one token a sequence, over pages; of DeepSeek-V4-Flash, whose 64 heads of 128 score
    a key for every four positions.
    """

    def sizes(c: Columns) -> Sizes:
        positions = c["batch_size"] * np.maximum((c["step"] + 1) // _V4_POSITIONS, 1)
        both = {"query_key_pairs": positions, "positions": positions}
        return _index_sizes({**both, "tokens": c["batch_size"]}, c["num_heads"])

    return _of_indexer(path, sizes, where={"isl": 1}, shape=("batch_size",))


def _index_sizes(scored: dict[str, Array], heads: Array | float) -> Sizes:
    """Of index heads of 128 over keys in float8, whose scores are summed."""
    pairs, tokens = scored["query_key_pairs"], scored["tokens"]
    return {
        "query_key_pairs": pairs,
        "tokens": tokens,
        "heads": heads,
        "head_dim": 128.0,
        "read_bytes": scored["positions"] * (128 + INDEX_SCALE_BYTES) + tokens * heads * 128,
        "scores": pairs,
    }


def choose_rows(path: str) -> Source:
    """The best of these scores, where there are more than are chosen; the latest score best."""
    where = {"score_mode": "top_last"}
    return _of_indexer(
        path,
        lambda c: {**{k: v for k, v in _scored(c).items() if k != "positions"}, "topk": TOPK},
        where=where,
        at_least=1e-3,
    )


def sparse_rows(path: str, heads: float) -> Source:
    """Attention of prompts to chosen positions, in the latent.

    Args:
        heads: that the kernel computes; 64 were asked for.
    """

    def sizes(c: Columns) -> Sizes:
        chosen = np.minimum(c["step"] + (c["isl"] + 1) / 2, TOPK)
        tokens = c["batch_size"] * c["isl"]
        positions = c["batch_size"] * np.minimum(c["step"] + c["isl"], c["isl"] * TOPK)
        pairs = tokens * chosen
        return {
            "seqs": c["batch_size"],
            "query_key_pairs": pairs,
            "tokens": tokens,
            "positions": np.minimum(positions, pairs),
            "heads": heads,
            **LATENT,
        }

    return _of_indexer(path, sizes)


def compressed_rows(path: str) -> Source:
    """Compressed attention of prompts to a window and to all entries, DeepSeek-V4-Flash's."""

    def sizes(c: Columns) -> Sizes:
        new, cached = (c[name].astype(np.int64) for name in ("isl", "step"))
        window, entries = (
            pairs_and_positions(new, cached, window, rate=rate)
            for window, rate in ((_V4_WINDOW, 1), (None, _V4_ENTRY))
        )
        pairs, positions = (
            c["batch_size"] * (one + other) for one, other in zip(window, entries, strict=True)
        )
        return {
            "seqs": c["batch_size"],
            "query_key_pairs": pairs,
            "tokens": c["batch_size"] * c["isl"],
            "positions": positions,
            "heads": c["num_heads"],
            "key_dim": 512.0,
            "value_dim": 512.0,
        }

    lengths = tuple(times << power for power in range(14) for times in (3, 4))
    return _of_indexer(path, sizes, where={"isl": lengths})


def _of_indexer(
    path: str,
    sizes: Callable[[Columns], Sizes],
    *,
    where: Mapping[str, object] | None = None,
    at_least: float = 0.0,
    shape: tuple[str, ...] = ("batch_size", "isl"),
) -> Source:
    table = Table(
        path,
        where or {},
        lambda c: _scored(c)["query_key_pairs"],
        without=("tp_size", "compress_ratio"),
        at_least=at_least,
    )
    return Source(table, sizes, shape=shape, along=("step",))


def _scored(c: Columns) -> dict[str, Array]:
    tokens = c["batch_size"] * c["isl"]
    return {
        "query_key_pairs": tokens * (c["step"] + (c["isl"] + 1) / 2),
        "tokens": tokens,
        "positions": c["batch_size"] * (c["step"] + c["isl"]),
    }
