"""Keys and values on their way from the pool that prefilled to the one that decodes."""

import numpy as np

from expertlane.balance.holding import Slices
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.step.operation import Floats
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig


class KVTransfers:
    """Seconds of a request's KV transfer from the prefill pool to the decode pool.

    The ranks of the data-parallel rank that prefilled send equal parts of what each pipeline stage
    holds; each rank that will decode gets all that it has to hold, copies of shared heads too, and
    with decode context parallelism only its share of the positions.

    Args:
        prefill, decode: the layouts of both pools.
        remote: the pools are on different nodes.
    """

    def __init__(
        self,
        model: ModelConfig,
        types: NumberTypes,
        prefill: Layout,
        decode: Layout,
        links: LinkModel,
        *,
        remote: bool = True,
    ) -> None:
        self._links = links
        self._remote = remote
        whole = held_kv_bytes(model, types, 1)
        held = held_kv_bytes(model, types, decode.tp) / decode.dcp
        self._sent_bytes = np.repeat(_num_layers(model, prefill) * whole / prefill.tp, prefill.tp)
        self._received_bytes = np.repeat(_num_layers(model, decode) * held, decode.tp)

    def seconds(self, num_tokens: int) -> Floats:
        """[B]; seconds to transfer a prompt's keys and values."""
        sent, received = num_tokens * self._sent_bytes, num_tokens * self._received_bytes
        return self._links.kv_transfer(sent, received, self._remote).bounds[:, 0]


def _num_layers(model: ModelConfig, layout: Layout) -> Floats:
    """[pp]; layers of each stage."""
    layers = [layout.layers_of_stage(model.num_hidden_layers, rank) for rank in range(layout.pp)]
    return np.array([len(each) for each in layers], dtype=np.float64)


def held_kv_width(model: ModelConfig, tp: int) -> int:
    """Values of a position in a layer's cache that a rank holds: a head at least, a whole latent.

    Args:
        tp: ranks that share the heads; 1 for all of them.
    """
    num_rows, dim = _held_rows(model, tp)
    return num_rows * dim


def held_kv_bytes(model: ModelConfig, types: NumberTypes, tp: int) -> int:
    """Bytes of the values that `held_kv_width` counts, with their scales."""
    num_rows, dim = _held_rows(model, tp)
    return types.cached_bytes(num_rows * dim, num_rows)


def _held_rows(model: ModelConfig, tp: int) -> tuple[int, int]:
    """Number of keys and values (or latents) of a position that a rank holds, and their width."""
    if model.latent is not None:
        return 1, model.latent.kv_lora_rank + model.latent.qk_rope_head_dim
    return 2 * len(Slices(tp).kv_heads(model)), model.head_dim
