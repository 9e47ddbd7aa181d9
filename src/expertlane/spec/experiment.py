"""An experiment: one model, one workload, one seed, one cluster; several deployments."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from expertlane.errors import SpecError
from expertlane.spec.deployment import Deployment
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import take_fields
from expertlane.spec.workload import Workload


@dataclass(frozen=True)
class Cluster:
    """How ranks sit on nodes.

    Attributes:
        ranks_per_node: consecutive ranks that share a node; 0 takes what the launcher knows
            (all local ranks on one node). Declaring 8 lets 16 local ranks count their traffic
            as two nodes of 8.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    ranks_per_node: int = 0

    def __post_init__(self) -> None:
        take_fields(self, "cluster: {}".format)


@dataclass(frozen=True)
class Experiment:
    """Deployments that differ in nothing but layout and options.

    Attributes:
        deployments: the first one is the baseline that factors are given against.
        scaling: layouts of one family, run beside the deployments, from which the scaling of
            the last deployment is shown.
        seed: of the model's weights, where they come from no checkpoint.
        checkpoint: the folder the weights are in; None for seeded ones.

    Raises:
        SpecError: a seed out of its range, no deployment, a name or a scaling size given twice, or
            a layout or workload that the model cannot take.
    """

    name: str
    model: ModelConfig
    workload: Workload
    deployments: tuple[Deployment, ...]
    scaling: tuple[Deployment, ...] = ()
    cluster: Cluster = field(default_factory=Cluster)
    seed: int = 0
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        take_fields(self)
        if not self.deployments:
            raise SpecError(
                f"experiment {self.name} has no deployment; add a [[deployments]] table"
            )
        names = [deployment.name for deployment in self.deployments + self.scaling]
        for name in names:
            if names.count(name) > 1:
                raise SpecError(f"experiment {self.name}: two deployments are named {name!r}")
        sizes = [deployment.layout.ep for deployment in self.scaling]
        for size in sizes:
            if sizes.count(size) > 1:
                raise SpecError(f"experiment {self.name}: two scaling layouts have ep={size}")
        self.workload.check_model(self.model)
        self.workload.check_size()
        for deployment in self.deployments + self.scaling:
            try:
                deployment.layout.check_model(self.model)
            except SpecError as error:
                raise SpecError(f"deployment {deployment.name!r}: {error}") from None

    @property
    def num_ranks(self) -> int:
        """Ranks of the largest deployment."""
        return max(deployment.layout.world_size for deployment in self.deployments + self.scaling)
