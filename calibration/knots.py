"""Between which sizes laws of computation interpolate, by kernel; first and last knots become the
tables' extremes."""

from collections.abc import Mapping, Sequence

from sheet import Generation

Axes = Mapping[str, Sequence[float]]

_KEYS_PER_QUERY = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
_QUERY_HEADS = (16, 128, 1024, 8192, 65536, 524288, 8388608)
_POSITIONS = (2, 64, 256, 1024, 4096, 16384, 131072)
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
