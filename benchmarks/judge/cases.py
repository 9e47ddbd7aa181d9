"""The deployments whose decode steps are measured, and on which links.

Speeds of links are as if each rank had a core of its own. In a dilated case, where each rank has a
share of a core, links are slowed by that share too, so all times are 1/share times as long.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import Cluster, Experiment
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.workload import Workload

PROMPT_LEN, NUM_SKIPPED, NUM_STEPS = 2, 1, 8  # decode steps that are not counted, and that are


@dataclass(frozen=True)
class LinkSpeed:
    """Bandwidth of a node's NIC in each direction, and the latency of a packet."""

    bytes_per_s: float
    latency_s: float

    def slowed(self, share: float) -> "LinkSpeed":
        """The link for ranks that have this share of a core."""
        return LinkSpeed(self.bytes_per_s * share, self.latency_s / share)


LINKS = {"fast": LinkSpeed(100e6, 0.5e-3), "slow": LinkSpeed(16e6, 0.5e-3)}


@dataclass(frozen=True)
class Case:
    """One deployment on one network.

    Attributes:
        bound: what most of the step's time is meant to be.
        batch: sequences, over all ranks.
        share: of a core that each rank gets; 1 without dilation.
        ranks_per_node: ranks that share a network namespace, and so a NIC.
    """

    name: str
    bound: str
    layout: str
    batch: int
    link: str
    share: float
    num_layers: int = 2
    ranks_per_node: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        """Ranks of the layout."""
        return Layout.parse(self.layout).world_size

    @property
    def described(self) -> dict[str, Any]:
        """The case as a JSON object."""
        return asdict(self) | {"num_ranks": self.num_ranks}

    @property
    def experiment(self) -> Experiment:
        """The case as an experiment for `compare`, or for a run without links."""
        model = ModelConfig(
            name="judged",
            num_hidden_layers=self.num_layers,
            hidden_size=1024,
            num_attention_heads=16,
            head_dim=64,
            num_experts=16,
            num_experts_per_tok=2,
            moe_intermediate_size=2048,
            vocab_size=1024,
            max_position_embeddings=64,
        )
        layout, options = Layout.parse(self.layout), Options(**self.options)
        return Experiment(
            name=self.name,
            model=model,
            workload=Workload(self.batch, PROMPT_LEN, 1 + NUM_SKIPPED + NUM_STEPS),
            deployments=(Deployment(self.name, layout, options, is_baseline=True),),
            cluster=Cluster(self.ranks_per_node),
        )


OVERLAP = {"overlap": True}
DRAINED = {"num_micro_batches": 2}
ROTATING = {"num_micro_batches": 4, "micro_batch_schedule": "rotating"}
HIERARCHICAL = {"dispatch": "hierarchical"}

CASES = (
    Case("ep2 undilated", "compute", "dp=2,ep=2", 256, "fast", 1),
    Case("ep2 undilated slow", "dispatch", "dp=2,ep=2", 128, "slow", 1),
    Case("ep2", "compute", "dp=2,ep=2", 256, "fast", 1 / 8),
    Case("ep2 slow", "dispatch", "dp=2,ep=2", 128, "slow", 1 / 8),
    Case("ep4", "compute", "dp=4,ep=4", 512, "fast", 1 / 8),
    Case("ep4 slow overlap", "dispatch", "dp=4,ep=4", 256, "slow", 1 / 8, options=OVERLAP),
    Case("tp2 pp2 m2", "pipeline", "tp=2,pp=2", 256, "fast", 1 / 8, options=DRAINED),
    Case("ep8", "compute", "dp=8,ep=8", 1024, "fast", 1 / 8),
    Case("ep8 slow", "dispatch", "dp=8,ep=8", 512, "slow", 1 / 8),
    Case("ep8 slow overlap", "dispatch", "dp=8,ep=8", 512, "slow", 1 / 8, options=OVERLAP),
    Case("dp2 tp4 ep2", "compute", "dp=2,tp=4,ep=2", 512, "fast", 1 / 8),
    Case("tp2 pp4 m4", "pipeline", "tp=2,pp=4", 512, "fast", 1 / 8, 4, options=ROTATING),
    Case("ep16", "compute", "dp=16,ep=16", 2048, "fast", 1 / 16),
    Case("ep16 slow", "dispatch", "dp=16,ep=16", 1024, "slow", 1 / 16),
    Case("ep16 slow overlap", "dispatch", "dp=16,ep=16", 1024, "slow", 1 / 16, options=OVERLAP),
    Case("tp4 pp4 m4", "pipeline", "tp=4,pp=4", 512, "fast", 1 / 16, 4, options=ROTATING),
    Case("ep8 on 2 nodes", "dispatch", "dp=8,ep=8", 512, "slow", 1 / 8, ranks_per_node=4),
    Case(
        "ep8 on 2 nodes hierarchical",
        "dispatch",
        "dp=8,ep=8",
        512,
        "slow",
        1 / 8,
        ranks_per_node=4,
        options=HIERARCHICAL,
    ),
)
