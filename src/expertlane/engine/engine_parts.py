"""An engine on started ranks, with what replaces lost ranks and changes the layout."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from expertlane.balance.placement_file import Placements
from expertlane.engine.elastic.arrangement import Arranged, Arrangement
from expertlane.engine.elastic.recovery import Recovery
from expertlane.engine.elastic.scaling import Scaling
from expertlane.engine.elastic.shrinking import Shrinking
from expertlane.engine.engine import Engine
from expertlane.engine.launch import (
    check_num_blocks,
    describe_ranks,
    enough_blocks,
    with_blocks,
)
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.ranks.pool import RankPool
from expertlane.schedule.drive import FinishedStep
from expertlane.schedule.plan import StepPlan
from expertlane.schedule.request import Limits
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.layout import Members
from expertlane.spec.model import ModelConfig
from expertlane.text.tokenizer import Tokenizer

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class EngineInputs:
    """The model, settings and callbacks that an engine is made of.

    Attributes:
        folder: the checkpoint's folder; None where weights are random.
        placements: the layout's expert placements, by layer; see `check_deployment`.
        limits: the limits asked for; the number of blocks is settled on the machine.
        on_commit: called with every committed step, whose routing is then recorded; None for
            neither.
        log: takes a line for each thing that the user should know.
    """

    model: ModelConfig
    folder: Path | None
    config: EngineConfig
    placements: Placements
    limits: Limits
    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[int]
    on_commit: Callable[[FinishedStep], None] | None
    log: Callable[[str], None]


class EngineParts:
    """Loads a model on the ranks of a pool, and makes an engine that runs it.

    Attributes:
        machine: [num_ranks]; the machine of each rank, described before the model was loaded.
        limits: the scheduler's limits, with the number of blocks that fit.

    Raises:
        UserError: the model does not fit into memory, or there is a mistake that ranks found.
        RankError: a rank died, hung or failed, and was not replaced.
    """

    def __init__(self, pool: RankPool, inputs: EngineInputs) -> None:
        self._pool, self._inputs, log = pool, inputs, inputs.log
        config = inputs.config
        # The ranks tell how many of them a node has, once they are up.
        given = inputs.placements, config.ranks_per_node
        self._arranged = Arranged(Arrangement.alike(Members(config.layout), *given))
        self._recovery: Recovery | None = None
        if config.on_failure != "stop":
            self._recovery = Recovery(pool, self._arranged, self._redeploy, log)
            pool.on_early_end(log)
        self.machine = tuple(self._start(lambda: describe_ranks(pool)))
        self.limits = self._fitting_limits()
        self.runner = self._start(self._load)
        self.limits = self.runner.limits
        self.engine = self._make_engine()
        self.scaling = Scaling(
            *(pool, self.runner, self.engine, inputs.model, config.deployment),
            *(self.limits, self.machine),
            ranks_per_node=config.ranks_per_node,
            folder=inputs.folder,
            oversubscribe=config.oversubscribe,
        )
        if self._recovery is None:
            return
        self._recovery.settle()
        if config.on_failure == "shrink":
            self._recovery.shrinker = Shrinking(
                *(pool, self.runner, self.scaling, inputs.model, self.limits),
                folder=inputs.folder,
                log=log,
            )

    def _start(self, action: Callable[[], ResultT]) -> ResultT:
        """Run an action on ranks that do not serve yet; lost ones are replaced meanwhile."""
        return action() if self._recovery is None else self._recovery.start(action)

    def _redeploy(self, replaced: Collection[int], plans: Sequence[StepPlan]) -> None:
        if any(self._pool.pid(rank) is None for rank in replaced):
            describe_ranks(self._pool)  # a node that has come back may be another machine
        self.runner.redeploy(replaced, plans)

    def _fitting_limits(self) -> Limits:
        """The limits with as many blocks as fit; on a GPU only an upper bound, measured later."""
        inputs, config, wanted = self._inputs, self._inputs.config, self._inputs.limits
        layout, options = config.layout, config.options
        limits = with_blocks(
            *(wanted, config.num_blocks, inputs.model, layout),
            *(inputs.placements, self.machine, options, inputs.folder),
        )
        if self.machine[0].on_gpu and config.num_blocks is None:
            return replace(wanted, num_blocks=enough_blocks(wanted))  # measured with the model
        return limits

    def _load(self) -> ModelRunner:
        inputs, config = self._inputs, self._inputs.config
        runner = ModelRunner(
            self._pool,
            inputs.model,
            config.deployment,
            self.limits,
            seed=config.seed,
            ranks_per_node=config.ranks_per_node or self.machine[0].ranks_per_node,
            checkpoint=inputs.folder,
            arranged=self._arranged,
            check=config.check,
            log=inputs.log,
            measures_memory=self.machine[0].on_gpu,
            records_ahead=True,
        )
        if config.num_blocks is not None:
            check_num_blocks(config.num_blocks, runner.limits)
        return runner

    def _make_engine(self) -> Engine[Any]:
        inputs, config = self._inputs, self._inputs.config
        scheduler = ContinuousScheduler(
            config.layout,
            config.options,
            self.limits,
            lookahead=True,
            record=config.options.rebalance_steps > 0,
            record_routing=inputs.on_commit is not None,
        )
        return Engine(
            scheduler,
            self.runner,
            eos_token_ids=inputs.eos_token_ids,
            tokenizer=inputs.tokenizer,
            on_commit=inputs.on_commit,
            recovery=self._recovery,
        )
