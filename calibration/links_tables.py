"""What the laws of a card's transfers are fitted to: NCCL and a serving engine's own all-reduce
inside a node, DeepEP, and TensorRT-LLM's all-to-all over an NVLink domain.

`message_size` counts elements, of the gathered or scattered total: were they a rank's part, 8 ranks
would move bytes five times faster than their links.
"""

from collections.abc import Mapping

import numpy as np
from deepep import COUNTS, counts, forwarded, low_latency
from loads import Source
from nvlink_exchange import exchange_sources
from sheet import Card
from tables import Table

_COLLECTIVES = {
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all": "alltoall",
}


def sources_of_laws(card: Card) -> dict[str, list[Source]]:
    """By law, what it is fitted to."""
    nccl = f"{card.folder}/comm/nccl/{card.nccl}/nccl_perf.parquet"
    laws = {
        f"{kind}.intra_node": [
            _inside_node(nccl, {"op_name": name, "nccl_dtype": dtype}, ranks, item_bytes)
            for dtype, item_bytes in (("half", 2), ("int8", 1))
            for ranks in card.measured_ranks
        ]
        for kind, name in _COLLECTIVES.items()
    }
    for library, (engine, version) in card.all_reduces.items():
        path = f"{card.folder}/comm/{engine}/{version}/custom_allreduce_perf.parquet"
        where = {"op_name": "all_reduce", "backend": f"{engine}_graph"}
        laws[f"all_reduce.{library}.intra_node"] = [
            _inside_node(path, where, ranks, 2) for ranks in card.measured_ranks
        ]
    over_nodes = card.deepep_nodes[1:]
    for span, numbers in (("intra_node", card.deepep_nodes[:1]), ("inter_node", over_nodes)):
        for stage in ("dispatch", "combine") if numbers else ():
            laws[f"{stage}.low_latency.{span}"] = [low_latency(card, stage, n) for n in numbers]
            laws[f"{stage}.forwarded.{span}"] = [forwarded(card, stage, n) for n in numbers]
    if over_nodes:
        laws[COUNTS] = [counts(card, nodes) for nodes in over_nodes]
    return laws | (exchange_sources(card) if card.has_nvlink_exchange else {})


def _inside_node(path: str, where: Mapping[str, object], ranks: int, item_bytes: int) -> Source:
    share = item_bytes * (ranks - 1) / ranks * (2 if where["op_name"] == "all_reduce" else 1)
    return Source(
        Table(path, {**where, "num_gpus": ranks}, lambda columns: columns["message_size"]),
        size="message_size",
        ranks=ranks,
        nodes=1,
        bytes_of=lambda elements: (np.zeros_like(elements), elements * share),
        shape_unit=item_bytes,
    )
