"""How a model is served, and whether a cluster can do so."""

from dataclasses import dataclass, field

from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.multi_token import MultiToken
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import RoutingSource
from expertlane.errors import SpecError
from expertlane.spec.deployment import DISPATCH_FORMS, Options
from expertlane.spec.layout import Layout


@dataclass(frozen=True)
class ServingSetup:
    """How a model is served.

    Attributes:
        prefill_layout: of a pool for prompts alone, on devices of its own.
        routing: which experts tokens choose.
        max_num_seqs, max_num_batched_tokens: of a data-parallel rank.

    Raises:
        SpecError: one of the sizes is under 1.
    """

    layout: Layout
    prefill_layout: Layout | None
    options: Options
    types: NumberTypes
    execution: Execution
    routing: RoutingSource
    multi_token: MultiToken = field(default_factory=MultiToken)
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    @property
    def layouts(self) -> list[Layout]:
        """Of all pools, the one that prefills first."""
        first = [] if self.prefill_layout is None else [self.prefill_layout]
        return [*first, self.layout]


def check_devices(cluster: ModelledCluster, setup: ServingSetup) -> None:
    """Check that a cluster has the devices, and the nodes that hierarchical dispatch is for.

    Raises:
        SpecError: it has too few.
    """
    needed = sum(layout.world_size for layout in setup.layouts)
    if needed > cluster.num_devices:
        if len(setup.layouts) == 1:
            need = f"layout {setup.layout} needs {needed} devices"
        else:
            each = " and ".join(f"{layout} with {layout.world_size}" for layout in setup.layouts)
            need = f"layouts {each} need {needed} devices"
        raise SpecError(f"{need} but {cluster} has {cluster.num_devices}")
    if not setup.options.is_by_node:
        return
    per_node = cluster.profile.ranks_per_node
    for layout in setup.layouts:
        if layout.ep_ranks_per_node(per_node) == layout.ep:
            raise SpecError(
                f"layout {layout}: {setup.options.dispatch} dispatch is for experts on several "
                f"nodes, but each group of ep={layout.ep} is on one node of {per_node}; valid: "
                f"{', '.join(form for form, of in DISPATCH_FORMS.items() if not of.by_node)}"
            )


def are_apart(cluster: ModelledCluster, setup: ServingSetup) -> bool:
    """Whether two pools are on different nodes."""
    needed = sum(layout.world_size for layout in setup.layouts)
    return needed > cluster.profile.ranks_per_node
