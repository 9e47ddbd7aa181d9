"""How large a paged cache the ranks of a layout have memory for."""

from collections.abc import Sequence
from dataclasses import replace

from expertlane.balance.placement_file import Placements
from expertlane.cost.number_types import NumberTypes
from expertlane.engine.commands import RankMachine
from expertlane.errors import CapacityError
from expertlane.memory import fit_cache
from expertlane.schedule.limits import Limits
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import RANGES

_FREE_SHARE = 0.9  # of free memory; the rest is for what is not counted
_CPU_CACHE_SHARE = 0.5  # of what is left beside the weights; other programs live there too


def fit_to_machine(
    model: ModelConfig,
    layout: Layout,
    limits: Limits,
    seen: Sequence[RankMachine],
    cpu_cache_share: float = 1.0,
    placements: Placements | None = None,
) -> Limits:
    """The limits with as many blocks, up to `num_blocks`, as every rank has room for.

    Args:
        seen: [num_ranks]; those of the layout first.
        placements: [num_hidden_layers]; linear ones without copies if not given.
        cpu_cache_share: as `fit_cache`'s `cache_share`, where ranks compute on a CPU.

    Raises:
        CapacityError: not even one sequence fits; with both numbers.
    """
    tightest = min(seen[: layout.world_size], key=lambda each: each.free_bytes)
    num_sharing = 1 if tightest.on_gpu else min(layout.world_size, tightest.ranks_per_node)
    free_bytes = _FREE_SHARE * tightest.free_bytes / num_sharing
    share = 1.0 if tightest.on_gpu else cpu_cache_share
    return fit_cache(
        model, layout, limits, NumberTypes.all_of(tightest.dtype), free_bytes, share, placements
    )


def with_blocks(
    wanted: Limits,
    num_blocks: int | None,
    model: ModelConfig,
    layout: Layout,
    placements: Placements,
    seen: Sequence[RankMachine],
) -> Limits:
    """The limits with `num_blocks`; with None as many as serve, or as there is room for.

    Raises:
        CapacityError: there is no room for the model and one sequence, or for `num_blocks`.
    """
    if num_blocks is None:
        enough = wanted.max_num_seqs * -(-wanted.max_model_len // wanted.block_size)
        wanted = replace(wanted, num_blocks=min(enough, int(RANGES["num_blocks"].high)))
        return fit_to_machine(model, layout, wanted, seen, _CPU_CACHE_SHARE, placements)
    fitting = fit_to_machine(model, layout, wanted, seen, placements=placements)
    if fitting.num_blocks < num_blocks:
        raise CapacityError(
            f"num_blocks is {num_blocks} but there is memory for {fitting.num_blocks}"
        )
    return fitting
