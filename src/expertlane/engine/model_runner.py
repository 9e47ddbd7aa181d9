"""The runner of real ranks: a deployment's model on a pool, one step plan at a time."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from expertlane.balance.placement_file import Placements, placements_of
from expertlane.engine.commands import (
    Deploy,
    DiscardSteps,
    RankOutcome,
    SetDispatch,
    StageSpec,
    run_step,
)
from expertlane.engine.dispatch_timing import modes_of, time_dispatch
from expertlane.engine.pool import RankPool, Ticket
from expertlane.schedule.limits import Limits
from expertlane.schedule.plan import StepOutcome, StepPlan
from expertlane.spec.deployment import Deployment, DispatchTable
from expertlane.spec.model import ModelConfig
from expertlane.spec.sampling import TokenLogprobs


class StepHandle:
    """A step under way."""

    def __init__(self, ticket: Ticket[RankOutcome], submitted_s: float) -> None:
        self.ticket = ticket
        self.submitted_s = submitted_s
        self.finished_s = 0.0


class ModelRunner:
    """Executes step plans on the ranks of a pool; implements `schedule.plan.Runner`.

    Attributes:
        held: [world_size]; what each rank has allocated.
        dispatch_table: as measured where `dispatch` or `overlap` is `auto`, else None.

    Args:
        limits: of the scheduler; here, the size of the paged cache.
        ranks_per_node: consecutive ranks whose traffic counts as inside a node.
        seed: of the model's weights, where they come from no checkpoint.
        checkpoint: the folder the weights are in.

    Raises:
        UserError: the model cannot be laid out or its experts placed so.
    """

    def __init__(
        self,
        pool: RankPool,
        model: ModelConfig,
        deployment: Deployment,
        limits: Limits,
        *,
        seed: int,
        ranks_per_node: int,
        checkpoint: Path | None = None,
    ) -> None:
        self._pool = pool
        self._layout = layout = deployment.layout
        layout.check_model(model)
        options = deployment.options
        if options.dispatch == "hierarchical":
            layout.ep_ranks_per_node(ranks_per_node)
        placements = placements_of(model, layout, options)
        folder = str(checkpoint) if checkpoint else None
        spec = StageSpec(model, layout, placements, seed, ranks_per_node, folder)
        held = pool.call(Deploy(spec, options, limits.num_blocks, limits.block_size))
        self.held = held[: layout.world_size]
        self.dispatch_table: DispatchTable | None = None
        if options.is_timed:
            modes = modes_of(layout, options, ranks_per_node)
            table = time_dispatch(pool, layout, limits, modes)
            pool.call(SetDispatch(table), ranks=range(layout.world_size))
            self.dispatch_table = table

    def submit(self, plan: StepPlan, placements: Placements | None = None) -> StepHandle:
        """Send a plan to the ranks of its replica, to each its own part.

        Args:
            placements: [num_hidden_layers]; of experts from this step on; None as they are.
        """
        submitted_s = time.perf_counter()
        commands = run_step(self._layout, plan, placements)
        return StepHandle(self._pool.submit_each(commands), submitted_s)

    def discard(self, plans: Sequence[StepPlan]) -> None:
        """Undo the steps that are not committed, once they have run; they may be submitted again.

        Args:
            plans: all of them.
        """
        for replica in {plan.replica for plan in plans}:
            steps = tuple(plan.step for plan in plans if plan.replica == replica)
            self._pool.submit(DiscardSteps(steps), ranks=self._layout.ranks_of_replica(replica))

    def first_done(self, handles: Sequence[StepHandle]) -> StepHandle:
        """Wait until one of the steps is finished."""
        done = self._pool.first_done([handle.ticket for handle in handles])
        handle = next(handle for handle in handles if handle.ticket is done)
        handle.finished_s = time.perf_counter()
        return handle

    def collect(self, handle: StepHandle) -> StepOutcome:
        """Wait for a step and put the ranks' parts of its outcome together."""
        outcomes = self._pool.collect(handle.ticket)
        return outcome_of(outcomes, handle.submitted_s, handle.finished_s or time.perf_counter())


def outcome_of(
    outcomes: Sequence[RankOutcome], submitted_s: float, finished_s: float
) -> StepOutcome:
    """The ranks' parts of an outcome, in rank order, as one."""
    token_ids: dict[int, int] = {}
    logprobs: dict[int, TokenLogprobs] = {}
    logits: dict[int, list[np.ndarray]] = {}
    for outcome in outcomes:
        token_ids |= outcome.token_ids
        logprobs |= outcome.logprobs
        for seq, part in outcome.logits.items():  # in rank order: so are their vocabularies
            logits.setdefault(seq, []).append(part)
    return StepOutcome(
        token_ids=token_ids,
        logprobs=logprobs,
        logits={seq: np.concatenate(parts) for seq, parts in logits.items()},
        not_finite=tuple(seq for outcome in outcomes for seq in outcome.not_finite),
        records=tuple(o.record for o in outcomes if o.record is not None),
        submitted_s=submitted_s,
        finished_s=finished_s,
    )
