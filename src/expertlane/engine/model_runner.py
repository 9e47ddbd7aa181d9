"""The runner of real ranks: a deployment's model on a pool, one step plan at a time."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from expertlane.engine.messages import HeldBytes, RankOutcome, StageSpec
from expertlane.engine.pool import RankPool, Ticket
from expertlane.schedule.plan import StepOutcome, StepPlan
from expertlane.spec.deployment import Deployment
from expertlane.spec.model import ModelConfig
from expertlane.spec.partition import partition
from expertlane.spec.workload import Workload

_DEPLOY = "expertlane.engine.deployed_stage:deploy"
_RUN_STEP = "expertlane.engine.deployed_stage:run_step"


class _Handle:
    def __init__(self, ticket: Ticket, submitted_s: float) -> None:
        self.ticket = ticket
        self.submitted_s = submitted_s
        self.finished_s = 0.0


class ModelRunner:
    """Executes step plans on the ranks of a pool; implements `schedule.plan.Runner`.

    Attributes:
        held: [world_size]; what each rank has allocated.

    Args:
        ranks_per_node: consecutive ranks whose traffic counts as inside a node.
        seed: of the model's weights, where they come from no checkpoint.
        checkpoint: the folder the weights are in.

    Raises:
        SpecError: the model cannot be laid out so, or has too few positions for the workload.
    """

    def __init__(
        self,
        pool: RankPool,
        model: ModelConfig,
        deployment: Deployment,
        workload: Workload,
        *,
        seed: int,
        ranks_per_node: int,
        checkpoint: Path | None = None,
    ) -> None:
        self._pool = pool
        self._layout = layout = deployment.layout
        layout.check_model(model)
        workload.check_model(model)
        seqs = partition(workload.num_sequences, layout.replicas)[0]
        num_slots = len(partition(len(seqs), layout.dp)[0])
        spec = StageSpec(
            model, layout, seed, ranks_per_node, str(checkpoint) if checkpoint else None
        )
        held = pool.call(_DEPLOY, spec, deployment.options.overlap, num_slots, workload.max_len)
        self.held: list[HeldBytes] = held[: layout.world_size]

    def submit(self, plan: StepPlan) -> _Handle:
        """Send a plan to the ranks of its replica."""
        ranks = self._layout.ranks_of_replica(plan.replica)
        submitted_s = time.perf_counter()
        return _Handle(self._pool.submit(_RUN_STEP, plan, ranks=ranks), submitted_s)

    def first_done(self, handles: Sequence[_Handle]) -> _Handle:
        """Wait until one of the steps is finished."""
        done = self._pool.first_done([handle.ticket for handle in handles])
        handle = next(handle for handle in handles if handle.ticket is done)
        handle.finished_s = time.perf_counter()
        return handle

    def collect(self, handle: _Handle) -> StepOutcome:
        """Wait for a step and put the ranks' parts of its outcome together."""
        outcomes: list[RankOutcome] = self._pool.collect(handle.ticket)
        finished_s = handle.finished_s or time.perf_counter()
        token_ids: dict[int, int] = {}
        logits: dict[int, list[np.ndarray]] = {}
        for outcome in outcomes:
            token_ids |= outcome.token_ids
            for seq, part in outcome.logits.items():  # in rank order: so are their vocabularies
                logits.setdefault(seq, []).append(part)
        return StepOutcome(
            token_ids=token_ids,
            logits={seq: np.concatenate(parts) for seq, parts in logits.items()},
            records=tuple(o.record for o in outcomes if o.record is not None),
            submitted_s=handle.submitted_s,
            finished_s=finished_s,
        )
