"""TensorRT-LLM's all-to-all over an NVLink domain of many hosts, on 2 … 64 ranks.

The table says 8 of 256 experts, hidden size 7168, balanced. That a token is sent once to each rank
that has any of its experts follows from its times: from 8 to 64 ranks they grow by a fifth, as the
ranks reached do, not as bytes to 56 more ranks would. `prepare` tells counts before every dispatch
that is not one-sided. Combine returns one row for each of those ranks; its bytes are counted here
as the flat form has them, a row for every pair, so that the law holds for what it is looked up by.
"""

import math
from collections.abc import Callable
from functools import partial

from loads import Source
from sheet import Card
from tables import Array, Table

_RANKS = {"two_sided": (2, 4, 8, 16, 32, 64), "one_sided": (2, 4, 8, 16, 32)}
_KERNELS = {"two_sided": "NVLinkTwoSided", "one_sided": "NVLinkOneSided"}
_DTYPES = {"two_sided": ("bfloat16", "fp8", "nvfp4"), "one_sided": ("nvfp4",)}
_HIDDEN, _TOP_K, _NUM_EXPERTS = 7168, 8, 256
_COMBINED_BYTES = 2 * _HIDDEN
_ROW_BYTES = {"bfloat16": 2 * _HIDDEN, "fp8": _HIDDEN, "nvfp4": _HIDDEN // 2 + _HIDDEN // 16}


def exchange_sources(card: Card) -> dict[str, list[Source]]:
    """By law, what it is fitted to."""
    return {
        f"{stage}.{variant}.intra_node": [
            _source(card, stage, variant, dtype, ranks)
            for dtype in (dtypes if stage == "dispatch" else dtypes[:1])
            for ranks in _RANKS[variant]
        ]
        for variant, dtypes in _DTYPES.items()
        for stage in ("dispatch", "combine")
    }


def ranks_reached(ranks: int) -> float:
    """Ranks that have any of a token's experts, on average."""
    elsewhere = _NUM_EXPERTS - _NUM_EXPERTS // ranks
    return ranks * (1 - math.comb(elsewhere, _TOP_K) / math.comb(_NUM_EXPERTS, _TOP_K))


def _source(card: Card, stage: str, variant: str, dtype: str, ranks: int) -> Source:
    rows, row_bytes = ranks_reached(ranks), _ROW_BYTES[dtype]
    if stage == "combine":
        rows, row_bytes = _TOP_K, _COMBINED_BYTES
    near_bytes = rows * row_bytes * (ranks - 1) / ranks
    table = partial(_table, card, variant, dtype, ranks)
    has_counts = stage == "dispatch" and variant == "two_sided"
    return Source(
        table(stage),
        size="num_tokens",
        ranks=ranks,
        nodes=1,
        bytes_of=_of_tokens(near_bytes),
        added=table("prepare") if has_counts else None,
    )


def _table(card: Card, variant: str, dtype: str, ranks: int, stage: str) -> Table:
    return Table(
        f"{card.folder}/comm/trtllm/1.3.0rc10/trtllm_alltoall_perf.parquet",
        {
            "op_name": f"alltoall_{stage}",
            "kernel_source": _KERNELS[variant],
            "moe_dtype": dtype,
            "moe_ep_size": ranks,
        },
        lambda columns: columns["num_tokens"],
    )


def _of_tokens(near_bytes: float) -> Callable[[Array], tuple[Array, Array]]:
    return lambda tokens: (0 * tokens, tokens * near_bytes)
