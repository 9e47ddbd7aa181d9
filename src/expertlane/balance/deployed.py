"""The placement that a deployment begins with."""

from pathlib import Path

from expertlane.balance.placement import Placement
from expertlane.balance.placement_file import read_placement
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig

Placements = tuple[Placement | None, ...]


def placements_of(model: ModelConfig, layout: Layout, options: Options) -> Placements:
    """[num_hidden_layers]; None for a dense layer.

    Raises:
        UserError: the placement file is damaged or for another model or number of ranks, or there
            are more redundant experts than ranks could hold.
    """
    layers = [not model.is_dense(layer) for layer in range(model.num_hidden_layers)]
    if options.placement_file is not None:
        path = Path(options.placement_file)
        placed = read_placement(path)
        moe_layers = [layer for layer, is_moe in enumerate(layers) if is_moe]
        placed.check(path, num_experts=model.num_experts, layers=moe_layers, ep=layout.ep)
        return tuple(placed.layers.get(layer) for layer in range(len(layers)))
    make = Placement.linear if options.placement == "linear" else Placement.round_robin
    placement = make(model.num_experts, layout.ep, options.num_redundant_experts)
    return tuple(placement if is_moe else None for is_moe in layers)
