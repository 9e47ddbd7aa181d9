"""Pools of a model that is served on a modelled cluster, and their settings."""

from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any

from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.frameworks import find_framework
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.memory import RANK_STEP_TOKENS
from expertlane.cost.multi_token import MultiToken
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import Traffic
from expertlane.errors import SpecError
from expertlane.results.record import PoolRole
from expertlane.spec.deployment import Options
from expertlane.spec.dispatch import DISPATCH_FORMS
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase
from expertlane.spec.ranges import take_fields


@dataclass(frozen=True)
class ServingSetup:
    """A model's pools and settings.

    Attributes:
        prefill_layout: layout of a prefill pool, on devices of its own; None without one.
        routing: source of the experts that tokens choose.
        max_num_seqs, max_num_batched_tokens: of a data-parallel rank. One of a pool for prompts
            alone holds as many more as a step has tokens for.
        prompt_wait_steps, phases_apart: see `Limits`.
        prefill_options: options of a prefill pool; None for `options`.

    Raises:
        SpecError: a size is out of its range.
    """

    layout: Layout
    prefill_layout: Layout | None
    options: Options
    types: NumberTypes
    execution: Execution
    routing: Traffic
    multi_token: MultiToken = field(default_factory=MultiToken)
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    prompt_wait_steps: int = 0
    phases_apart: bool = False
    prefill_options: Options | None = None

    def __post_init__(self) -> None:
        take_fields(self)

    @property
    def pools(self) -> dict[PoolRole, Layout]:
        """The layout of each pool, the one that prefills first."""
        if self.prefill_layout is None:
            return {"both": self.layout}
        return {"prefill": self.prefill_layout, "decode": self.layout}

    def options_of(self, role: PoolRole) -> Options:
        """Options of a pool; one with a single phase has that phase's dispatch."""
        if role == "both":
            return self.options
        options = self.options
        if role == "prefill" and self.prefill_options is not None:
            options = self.prefill_options
        return options.of_phase(Phase(role))

    @property
    def num_devices(self) -> int:
        """Devices of all pools."""
        return sum(layout.world_size for layout in self.pools.values())

    @property
    def num_parts(self) -> int:
        """Parts that serve alike and apart: groups of replicas, with their share of each pool."""
        return gcd(*(layout.replicas for layout in self.pools.values()))

    def part(self, num_parts: int) -> "ServingSetup":
        """One of `num_parts` equal parts."""

        def of(layout: Layout) -> Layout:
            return replace(layout, replicas=layout.replicas // num_parts)

        prefill = None if self.prefill_layout is None else of(self.prefill_layout)
        return replace(self, layout=of(self.layout), prefill_layout=prefill)

    def are_pools_apart(self, ranks_per_node: int) -> bool:
        """True if the pools are on different nodes."""
        return self.num_devices > ranks_per_node


def scheduling_of(
    framework: str | None, step_tokens: int | None, max_num_seqs: int
) -> dict[str, Any]:
    """Limits of a scheduler's step, as fields of `ServingSetup`.

    Args:
        framework: framework whose defaults are taken; None for ours.
        step_tokens: tokens of a data-parallel rank's step; None for the default.
    """
    found = find_framework(framework) if framework else None
    tokens = step_tokens or (found.max_num_batched_tokens if found else RANK_STEP_TOKENS)
    return {
        "max_num_batched_tokens": max(tokens, max_num_seqs),
        "prompt_wait_steps": found.prompt_wait_steps if found else 0,
        "phases_apart": found.phases_apart if found else False,
    }


def check_fits_cluster(cluster: ModelledCluster, setup: ServingSetup) -> None:
    """Check that a cluster has the devices, and the nodes that hierarchical dispatch is for.

    Raises:
        SpecError: it has too few.
    """
    needed, layouts = setup.num_devices, setup.pools.values()
    if needed > cluster.num_devices:
        if len(layouts) == 1:
            need = f"layout {setup.layout} needs {needed} devices"
        else:
            each = " and ".join(f"{layout} with {layout.world_size}" for layout in layouts)
            need = f"layouts {each} need {needed} devices"
        raise SpecError(f"{need} but {cluster} has {cluster.num_devices}")
    per_node = cluster.profile.ranks_per_node
    for role, layout in setup.pools.items():
        options = setup.options_of(role)
        if options.is_by_node and layout.ep_ranks_per_node(per_node) == layout.ep:
            raise SpecError(
                f"layout {layout}: hierarchical dispatch is for experts on several "
                f"nodes, but each group of ep={layout.ep} is on one node of {per_node}; valid: "
                f"{', '.join(form for form, of in DISPATCH_FORMS.items() if not of.by_node)}"
            )
