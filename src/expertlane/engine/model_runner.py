"""The runner of real ranks: loads a deployment's model on a pool, and runs its step plans."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from expertlane.balance.holding import check_deployment
from expertlane.balance.trace import RoutingTrace
from expertlane.balance.transition import Arrangement
from expertlane.engine.elastic.rebalancing import Rebalancer
from expertlane.engine.elastic.recovery import CurrentArrangement
from expertlane.engine.rank_watch import RankWatch
from expertlane.engine.ranks.commands import (
    Deploy,
    LeaveCores,
    RankOutcome,
    Redeploy,
    RunStep,
    SetDispatch,
    StageSpec,
    SumWeights,
    Ticket,
)
from expertlane.engine.ranks.losses import Loss
from expertlane.engine.ranks.pool import RankPool
from expertlane.engine.warm_up import measured_limits, record_graphs, time_dispatch
from expertlane.errors import UserError
from expertlane.results.step_checks import first_found, named
from expertlane.schedule.plan import StepOutcome, StepPlan
from expertlane.schedule.request import Limits
from expertlane.schedule.scheduler import FinishedStep
from expertlane.spec.deployment import DispatchTable, GraphLimits
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.layout import Members
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Origin, Phase
from expertlane.spec.sampling import PromptPart, TokenLogprobs


class Checking:
    """Compares steps and weights of a pool's ranks to find silent errors.

    Ranks that may have caused one count as lost, like dead ones; where two differ, both do, since
    nothing tells which is right.

    Args:
        arranged: tells which process has which rank of the layout.

    Raises:
        RankError, RanksLostError: from any method: ranks are lost; names them and the place.
    """

    def __init__(self, pool: RankPool, arranged: CurrentArrangement) -> None:
        self._pool, self._arranged = pool, arranged
        self._sums: dict[str, int] = {}  # checksums of weights as loaded, by name
        self._slices = 0, 0  # tp and etp of these weights
        self.check_weights()

    def check_step(self, plan: StepPlan, outcomes: Sequence[RankOutcome]) -> None:
        """Compare the checks that the ranks of a replica have made in a step.

        Args:
            outcomes: [num_ranks]; those of the replica's ranks.
        """
        checks = [outcome.checks for outcome in outcomes if outcome.checks is not None]
        members = self._arranged.now.members
        found = first_found(members.layout.ranks_of_replica(plan.replica), checks)
        if found is not None:
            numbers = [members.numbers[rank] for rank in found.ranks]
            line = found.line(plan.step)
            if numbers != list(found.ranks):
                line = f"{line} (in layout {members.layout}; these are {named(numbers)})"
            self._lose(line, numbers)

    def check_weights(self, ranks: Collection[int] | None = None) -> None:
        """Compare checksums of weights between ranks, and with those taken after loading.

        Weights of the same name, such as the copies of an expert, are the same on all ranks that
        hold them, in all replicas. After a change of tp or etp the slices are others, and new
        checksums are taken of all ranks.

        Args:
            ranks: numbers of the processes to look at; None for all.
        """
        members = self._arranged.now.members
        slices = members.layout.tp, members.layout.etp
        if slices != self._slices:
            self._sums, self._slices = {}, slices
        if not self._sums:
            ranks = None
        all_ranks = {*members.numbers}
        looked_at = sorted(all_ranks if ranks is None else all_ranks & {*ranks})
        by_rank = self._pool.call(SumWeights(), ranks=looked_at) if looked_at else []
        holders: defaultdict[str, dict[int, int]] = defaultdict(dict)
        for rank, sums in zip(looked_at, by_rank, strict=True):
            for name, total in sums.items():
                holders[name][rank] = total
        for name, of_rank in holders.items():
            if (loaded := self._sums.get(name)) is not None:
                wrong = tuple(rank for rank, total in of_rank.items() if total != loaded)
                if wrong:
                    self._lose(
                        f"{named(wrong)}, weights of {name}: changed since they were loaded", wrong
                    )
            elif len(set(of_rank.values())) > 1:
                total, most = Counter(of_rank.values()).most_common(1)[0]
                others = tuple(rank for rank in of_rank if of_rank[rank] != total)
                wrong = others if 2 * most > len(of_rank) else tuple(of_rank)
                self._lose(f"{named(wrong)}, weights of {name}: not the same on all ranks", wrong)
        self._sums |= {name: next(iter(of_rank.values())) for name, of_rank in holders.items()}

    def _lose(self, line: str, ranks: Collection[int]) -> None:
        self._pool.lose(Loss(frozenset(ranks), line))


@dataclass(eq=False)
class StepHandle:
    """A step under way."""

    plan: StepPlan
    ticket: Ticket[RankOutcome]
    submitted_s: float
    finished_s: float = 0.0


class ModelRunner:
    """Executes step plans on the ranks of a pool; implements `schedule.plan.Runner`.

    Attributes:
        arranged: the processes of the layout, and where experts are in the step planned last.
        limits: the scheduler's limits, with the number of blocks that the caches have.
        held: [world_size]; the bytes that each rank has allocated.
        dispatch_table: the modes timed where `dispatch` or `overlap` is `auto`, else None.
        rebalancer: moves experts between steps; None where they stay.
        checking: looks for silent errors; None with `check` off.

    Args:
        config: its layout, options, seed, level of checks, and ranks per node (not 0).
        limits: the scheduler's limits; `num_blocks` is the size of the paged KV cache.
        measures_memory: reduce `num_blocks` to what fits beside the largest step, as measured.
        checkpoint: the folder the weights are in; None for random weights.
        dispatch_table: modes timed earlier, for `auto`; None to time them now.
        arranged: shared with others that read and change it; its own by default.
        log: takes a line for each decision.
        records_ahead: where decode steps are to run as graphs, record these now and after each
            `redeploy`, instead of when a step first needs one.

    Raises:
        UserError: the deployment does not suit the model (see `check_deployment`).
    """

    def __init__(
        self,
        pool: RankPool,
        model: ModelConfig,
        config: EngineConfig,
        limits: Limits,
        *,
        checkpoint: Path | None = None,
        dispatch_table: DispatchTable | None = None,
        arranged: CurrentArrangement | None = None,
        log: Callable[[str], None] = lambda line: None,
        measures_memory: bool = False,
        records_ahead: bool = False,
    ) -> None:
        self._pool, self._log, self._records_ahead = pool, log, records_ahead
        layout, options = config.layout, config.options
        ranks_per_node = config.ranks_per_node
        placements = check_deployment(model, config.deployment, ranks_per_node)
        whole = Arrangement.alike(Members(layout), placements, ranks_per_node)
        self.arranged = arranged or CurrentArrangement(whole)
        self.arranged.begin(whole)
        self.arranged.follow(self)
        folder = str(checkpoint) if checkpoint else None
        spec = StageSpec(
            *(model, layout, placements, config.seed, ranks_per_node, folder),
            weights=options.weights,
            activations=options.activations,
            check=config.check,
        )
        graphs = None
        if options.cuda_graphs is not False:
            graphs = GraphLimits(limits.max_num_seqs, limits.max_model_len)
        self._deploy = Deploy(spec, options, limits.num_blocks, limits.block_size, graphs)
        if measures_memory:
            limits = measured_limits(pool, self._deploy, self.members, limits, log)
            self._deploy = msgspec.structs.replace(self._deploy, num_blocks=limits.num_blocks)
        self.limits = limits
        held = pool.call(self._deploy)
        self.held = held[: layout.world_size]
        self.checking = None if config.check == "off" else Checking(pool, self.arranged)
        self._model = model
        self.dispatch_table = dispatch_table
        self.rebalancer: Rebalancer | None = None
        self._watch: RankWatch | None = None
        self._is_reshaped = False  # since the last `redeploy`
        self._to_discard: set[int] = set()  # steps, by some ranks
        if options.is_timed:
            self._settle_dispatch()
        self._record_graphs()
        if options.rebalance_steps:
            self.rebalancer = Rebalancer(
                pool, self.arranged, num_steps=options.rebalance_steps, log=log
            )

    def _settle_dispatch(self) -> None:
        """Time the dispatch modes, unless a table was given, and run by the table from now on."""
        if self.dispatch_table is None:
            options, spec = self._deploy.options, self._deploy.spec
            modes = options.of_phase(Phase.DECODE).modes(spec.layout, spec.ranks_per_node)
            self.dispatch_table = replace(
                time_dispatch(self, self.set_dispatch, spec.layout, self.limits, modes),
                prefill_form=options.prefill_dispatch,
            )
        self.set_dispatch(self.dispatch_table)
        text = str(self.dispatch_table)
        unit = " (tokens per rank)" if " up to " in text else " for all steps"
        self._log(f"dispatch: {text}{unit}")

    def _record_graphs(self) -> None:
        limits, given = self._deploy.graphs, self._deploy.options
        if not self._records_ahead or limits is None or not all(h.has_graphs for h in self.held):
            return
        table = self.dispatch_table or given.fixed_table
        assert table is not None, "what is auto was timed"
        record_graphs(self._pool, self.members, limits, table, self._log)

    @property
    def members(self) -> Members:
        """The processes of the layout."""
        return self.arranged.now.members

    def watch(self) -> RankWatch:
        """Begin to read the ranks' totals, and return the watch that keeps them."""
        given = self._pool, self.arranged, self._model
        self._watch = RankWatch(*given, self.rebalancer)
        return self._watch

    def set_dispatch(self, table: DispatchTable) -> None:
        """Set the dispatch form and overlap of steps from now on."""
        self._pool.call(SetDispatch(table), ranks=self.members.numbers)

    def submit(self, plan: StepPlan) -> StepHandle:
        """Send a plan to the ranks of its replica, to each its own part."""
        placements = None if self.rebalancer is None else self.rebalancer.before_step(plan)
        submitted_s = time.perf_counter()
        commands = [
            (RunStep(step, placements), self.members.of_dp_rank[plan.replica, dp_rank])
            for dp_rank, step in enumerate(plan.of_dp_ranks())
        ]
        return StepHandle(plan, self._pool.submit_each(commands), submitted_s)

    def abandon(self, plans: Sequence[StepPlan]) -> None:
        """Drop decisions about steps to come; see `engine.elastic.recovery.Follower`."""
        if self.rebalancer is not None:
            self.rebalancer.abandon(plans)
        self._to_discard.update(plan.step for plan in plans)

    def redeploy(self, replaced: Collection[int], plans: Sequence[StepPlan]) -> None:
        """Let ranks load the weights they lack after some were replaced, and begin a new epoch.

        Args:
            replaced: process numbers of the replaced ranks.
            plans: plans of all steps that are not committed.
        """
        self.abandon(plans)
        given, members = self._deploy, self.members
        commands: list[tuple[Redeploy, Sequence[int]]] = []
        for replica, placements in enumerate(self.arranged.now.placements):
            spec = replace(given.spec, placements=placements)
            deploy = msgspec.structs.replace(given, spec=spec)
            command = Redeploy(deploy, tuple(sorted(self._to_discard)), self.dispatch_table)
            commands.append((command, members.of_replica[replica]))
        if others := sorted(self._pool.present.difference(members.numbers)):
            commands.append((command, others))  # making process groups takes all ranks
        ticket = self._pool.submit_each(commands)
        self._pool.collect(ticket)
        self.held = [ticket.results[number] for number in members.numbers]
        self._to_discard.clear()
        self._record_graphs()
        is_other, self._is_reshaped = self._is_reshaped, False
        if self.checking is not None:
            self.checking.check_weights({*replaced, *(self._having_read() if is_other else ())})
        if self._watch is not None:
            self._watch.begin_again(replaced)

    def _having_read(self) -> list[int]:
        """Numbers of the processes that have loaded weights beside those they kept."""
        each = zip(self.members.numbers, self.held, strict=True)
        return [n for n, held in each if held.bytes_from.get(Origin.KEPT, 0) < held.weight_bytes]

    def spec_of(self, arrangement: Arrangement, replica: int = 0) -> StageSpec:
        """The spec of the stages that the ranks of a replica build in another arrangement."""
        return replace(
            self._deploy.spec,
            layout=arrangement.layout,
            placements=arrangement.placements[replica],
            numbers=arrangement.members.numbers,
            ranks_per_node=arrangement.ranks_per_node,
        )

    def reshape(self, arrangement: Arrangement) -> None:
        """Change to another arrangement, which ranks get with the next `redeploy`.

        Timings for `auto` stay if the new layout has all their modes; else its first mode is used.
        """
        given, layout = self._deploy, arrangement.layout
        self._is_reshaped = True
        self._deploy = msgspec.structs.replace(given, spec=self.spec_of(arrangement))
        if (table := self.dispatch_table) is not None:
            decode = given.options.of_phase(Phase.DECODE)
            modes = decode.modes(layout, arrangement.ranks_per_node)
            if not set(table.modes) <= set(modes):
                self.dispatch_table = DispatchTable.fixed(
                    modes[0].form, modes[0].overlap, given.options.prefill_dispatch
                )
        if self.rebalancer is not None:
            self.rebalancer.begin_again()
        if self._watch is not None:
            self._watch.reshape(arrangement)

    def before_reshape(self) -> None:
        """Unpin ranks from their CPU cores, for those to come; check all weights once more."""
        self._pool.call(LeaveCores())
        if self.checking is not None:
            self.checking.check_weights()

    def first_done(self, handles: Sequence[StepHandle]) -> StepHandle:
        """Wait until one of the steps is finished, and return it."""
        done = self._pool.first_done([handle.ticket for handle in handles])
        handle = next(handle for handle in handles if handle.ticket is done)
        handle.finished_s = time.perf_counter()
        return handle

    def collect(self, handle: StepHandle) -> StepOutcome:
        """Wait for a step and put the ranks' parts of its outcome together."""
        self._pool.collect(handle.ticket)
        finished_s = handle.finished_s or time.perf_counter()
        of_process = handle.ticket.results
        outcomes = [of_process[number] for number in self.members.of_replica[handle.plan.replica]]
        if self.checking is not None:
            self.checking.check_step(handle.plan, outcomes)
        outcome = outcome_of(outcomes, handle.submitted_s, finished_s)
        if self.rebalancer is not None:
            self.rebalancer.after_step(handle.plan, outcome.records)
        return outcome


def outcome_of(
    outcomes: Sequence[RankOutcome], submitted_s: float, finished_s: float
) -> StepOutcome:
    """A step's outcome, merged from those of the ranks, given in rank order."""
    token_ids: dict[int, int] = {}
    logprobs: dict[int, TokenLogprobs] = {}
    prompt_logprobs: dict[int, PromptPart] = {}
    logits: dict[int, list[np.ndarray]] = {}
    for outcome in outcomes:
        token_ids |= outcome.token_ids
        logprobs |= outcome.logprobs
        prompt_logprobs |= outcome.prompt_logprobs
        for seq, part in outcome.logits.items():  # in rank order: so are their vocabularies
            logits.setdefault(seq, []).append(part)
    return StepOutcome(
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logits={seq: np.concatenate(parts) for seq, parts in logits.items()},
        not_finite=tuple(seq for outcome in outcomes for seq in outcome.not_finite),
        records=tuple(o.record for o in outcomes if o.record is not None),
        submitted_s=submitted_s,
        finished_s=finished_s,
    )


class RoutingRecorder:
    """Keeps the top-k ids of all tokens of committed steps; memory grows with every token.

    Raises:
        UserError: the model has no MoE layer.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._moe_layers = model.moe_layers
        if not self._moe_layers:
            raise UserError(
                f"{model.name} has no routing to record: all its {model.num_hidden_layers} layers "
                "are dense"
            )
        # [num_steps]; the step, and for each rank of its replica the top-k ids by layer
        self._kept: list[tuple[int, list[dict[int, npt.NDArray[np.int32]]]]] = []

    def add(self, finished: FinishedStep) -> None:
        """Keep the routing of a step, whose plan asked for `record_routing`."""
        kept = [record.topk_ids for record in finished.outcome.records]
        self._kept.append((finished.plan.step, kept))

    def trace(self) -> RoutingTrace:
        """The routing of the steps so far.

        Within a step, tokens stand by the rank of the pipeline stage that owns them, then in the
        order of computation: the same in all layers, since all stages cut a plan's batches alike.
        """
        return RoutingTrace.of_steps(self._model, self._moe_layers, self._kept)
