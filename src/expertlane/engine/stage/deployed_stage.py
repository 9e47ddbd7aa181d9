"""A rank's stage of a deployment: it runs step plans, decode steps as graphs where it can."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertlane.balance.holding import Placements
from expertlane.balance.transition import Arrangement, Transition
from expertlane.engine.comm.collectives import Pending, interleave
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.model.decode_graphs import DecodeGraphs, PaddedBatch
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.head import NO_TOKEN, HeadResult, ScoredPrompts
from expertlane.engine.model.sampler import SampledTokens, Sampler, SamplerStep
from expertlane.engine.model.transformer import TransformerStage
from expertlane.engine.model.weights import HeldWeights
from expertlane.engine.ops.device import to_host
from expertlane.engine.ops.kv_cache import KVCache
from expertlane.engine.ranks.commands import Deploy, HeldBytes, RankOutcome, StageSpec
from expertlane.engine.stage.context import RankContext
from expertlane.engine.stage.migration import Migration, PlacementsBefore
from expertlane.engine.stage.preparing import weight_source
from expertlane.engine.stage.rank_checks import StageChecks, recorder_of
from expertlane.results.step_record import RankTotals
from expertlane.schedule.plan import UNKNOWN, Batch, RankBatch, RankStep
from expertlane.spec.deployment import DispatchForm, DispatchMode, DispatchTable, PayloadType
from expertlane.spec.names import CheckPoint, Origin, Phase, Stage
from expertlane.spec.sampling import TokenLogprobs


def with_chosen(batch: Batch, chosen: dict[int, int]) -> Batch:
    """Fill in the tokens that the scheduler did not know: those of the step before.

    Args:
        chosen: tokens of that step, by sequence id.
    """
    is_unknown = batch.token_ids == UNKNOWN
    if not is_unknown.any():
        return batch
    token_ids = batch.token_ids.copy()
    seq_ids = np.repeat(batch.seq_ids, batch.num_scheduled_tokens)[is_unknown]
    token_ids[is_unknown] = [chosen[seq] for seq in seq_ids.tolist()]
    return replace(batch, token_ids=token_ids)


class StepTokens:
    """Chooses the next tokens of a step's parts, alike on all ranks of a tensor-parallel group."""

    def __init__(self) -> None:
        # `SampledTokens` is None where the likeliest tokens are taken.
        self._parts: list[tuple[list[int], HeadResult, SampledTokens | None]] = []
        self._tensors: list[Tensor] = []  # of all parts, to be copied to the host

    def choose(self, seq_ids: list[int], result: HeadResult, sampler: Sampler) -> None:
        """Choose the next tokens of a part.

        Args:
            seq_ids: [num_seqs]; the sequences that yield a token.
            result: the head's result for them.
        """
        if result.token_ids is not None:
            self._parts.append((seq_ids, result, None))
            self._tensors.append(result.token_ids)
            return
        assert result.all_logits is not None, "one of both is given"
        sampled = sampler.sample(seq_ids, result.all_logits)
        self._parts.append((seq_ids, result, sampled))
        self._tensors += sampled.tensors

    def fetch(
        self,
        outcome: RankOutcome | None,
        look: Callable[[Tensor, dict[int, int]], None] | None,
        until: Callable[[Any], None],
    ) -> dict[int, int]:
        """Wait for the device, and give all tokens by sequence id, for the next step.

        A sequence without a next token gets 0: a step that is under way goes on with any token.

        Args:
            outcome: gets the tokens and log-probabilities; None on all but one rank of a
                tensor-parallel group.
            look: called with each part's logits on this rank, and its tokens; None without checks.
            until: waits for an event of the device.
        """
        arrived = iter(to_host(self._tensors, until))
        of_all: dict[int, int] = {}
        for seq_ids, result, sampled in self._parts:
            logprobs: dict[int, TokenLogprobs] = {}
            if sampled is None:
                chosen = next(arrived).tolist()
            else:
                chosen, logprobs = sampled.read(arrived)
            tokens = dict(zip(seq_ids, chosen, strict=True))
            if look is not None:
                look(result.logits, tokens)
            of_all |= tokens
            if outcome is not None:
                outcome.token_ids |= tokens
                outcome.logprobs |= logprobs
                outcome.prompt_logprobs |= result.prompt_logprobs
            if NO_TOKEN in chosen:
                failed = [seq for seq, token in tokens.items() if token == NO_TOKEN]
                of_all |= dict.fromkeys(failed, 0)
                if outcome is not None:
                    outcome.not_finite += failed
                    for seq in failed:
                        del outcome.token_ids[seq]
        return of_all


@dataclass(eq=False)
class Changes:
    """The changes of a step that can be undone; the cache is not among them.

    Attributes:
        sampled: the sampler's changes; None except on the last stage.
        placements: the placements that the step replaced; None if it brought none.
        chosen: the step's tokens, by sequence id.
    """

    step: int
    sampled: SamplerStep | None
    placements: PlacementsBefore | None
    chosen: dict[int, int] = field(default_factory=dict)


class UncommittedChanges:
    """The changes of the latest steps, oldest first, to be committed or undone.

    Args:
        committed: tokens of the last committed step, by sequence id.
    """

    def __init__(self, sampler: Sampler, committed: dict[int, int]) -> None:
        self._sampler, self._committed = sampler, committed
        self._steps: deque[Changes] = deque()

    @property
    def tokens(self) -> dict[int, int]:
        """The tokens of the last step, by sequence id."""
        return self._steps[-1].chosen if self._steps else self._committed

    def begin(
        self, step: int, sampled: SamplerStep | None, placements: PlacementsBefore | None
    ) -> Changes:
        """Add a step; for the arguments see `Changes`."""
        changes = Changes(step, sampled, placements)
        self._steps.append(changes)
        return changes

    def commit_all_but(self, num_latest: int) -> None:
        """Commit all steps but the `num_latest` latest ones."""
        while len(self._steps) > num_latest:
            changes = self._steps.popleft()
            self._committed = changes.chosen
            if changes.sampled is not None:
                self._sampler.commit(changes.sampled)

    def undo(self, steps: Sequence[int]) -> Iterator[PlacementsBefore]:
        """Undo the latest steps if they are among `steps`, and commit those before them.

        Yields:
            Replaced placements, which the caller has to restore in this order.
        """
        while self._steps and self._steps[-1].step in steps:
            changes = self._steps.pop()
            if changes.sampled is not None:
                self._sampler.undo(changes.sampled)
            if changes.placements is not None:
                yield changes.placements
        self.commit_all_but(0)


@dataclass(eq=False)
class Left:
    """The state that a stage leaves to its successor in another layout on the same rank.

    Attributes:
        caches: the layers' KV caches; None if the successor cannot use them, nor the sampler then.
        tokens: tokens of the last step, by sequence id.
    """

    weights: HeldWeights
    caches: list[KVCache] | None
    sampler: Sampler
    tokens: dict[int, int]


class DeployedStage:
    """A rank's stage of a deployment, which runs the micro-batches of each step.

    Args:
        given: weights that need not be read, by origin, with the seconds that getting them took.
    """

    _checks: StageChecks | None = None
    _graphs: DecodeGraphs | None = None
    _is_over_nccl = False

    def __init__(
        self,
        context: RankContext,
        spec: StageSpec,
        given: Mapping[Origin, tuple[HeldWeights, float]] = MappingProxyType({}),
    ) -> None:
        self.spec = spec
        platform, model = context.platform, spec.model
        rank = spec.members.rank_of(context.rank)
        assert rank is not None, "it has a place in the layout"
        self._recorder = recorder_of(context, spec, rank)
        self._mesh = ParallelMesh(
            spec.layout,
            context.meshes,
            rank,
            spec.ranks_per_node,
            self._recorder,
            spec.members,
        )
        if (checks := self._recorder.checks) is not None:
            self._checks = StageChecks(checks, self._mesh)
        source = weight_source(spec, platform, context.progress.touch)
        source.given = {origin: weights for origin, (weights, _) in given.items()}
        self._seconds_from = {origin: seconds for origin, (_, seconds) in given.items() if seconds}
        self.stage = TransformerStage(model, spec.placements, source, self._mesh)
        self._seconds_from[Origin.READ] = source.read_s
        self.migration = Migration(self.stage, context.progress)
        self._device = platform.device
        self._await_device = context.await_device
        self._is_over_nccl = platform.transport == "nccl"
        self._dispatch = DispatchTable.fixed("all_to_all")
        self._only_mode: DispatchMode | None = None  # of all steps, where they have the same
        self._payload: PayloadType = "model"
        self._block_size = 1
        self._phase: Phase | None = None
        self._crowds = False
        self._sends: deque[list[Pending]] = deque()

    def is_as_at_first(self, spec: StageSpec) -> bool:
        """True if the stage is as `spec` would build it, with no expert moved since."""
        return self.spec == spec and self.is_placed(spec.placements)

    def is_placed(self, placements: Placements) -> bool:
        """True if experts have these placements."""
        blocks = self.stage.moe_blocks
        return all(block.placement == placements[layer] for layer, block in blocks.items())

    @property
    def held(self) -> HeldBytes:
        """The memory that it has allocated."""
        stage = self.stage
        held = stage.weight_bytes, stage.kv_bytes, stage.bytes_from, self._seconds_from
        return HeldBytes(*held, has_graphs=self._graphs is not None)

    def leave(self, after: Arrangement, discard: Sequence[int]) -> Left:
        """The state for a stage of another layout on this rank; this stage must not run again.

        Args:
            after: the ranks of that layout.
            discard: steps to undo; see `discard`.
        """
        self.discard(discard)
        at, members = self._mesh.at, self.spec.members
        kept = Transition(self.spec.arrangement, after, members.numbers).caches.values()
        caches = self.stage.leave_cache() if (at.replica, at.dp_rank) in kept else None
        return Left(self.stage.held_weights(), caches, self._sampler, self._changes.tokens)

    def start(self, deploy: Deploy, left: Left | None = None) -> None:
        """Begin with an empty cache, or the one that is left.

        Where the options leave dispatch open (`auto`), `set_dispatch` has to follow.

        Args:
            left: state of the stage before.
        """
        options, num_blocks = deploy.options, deploy.num_blocks
        self.migration.forget()
        self._payload = options.payload
        if (table := options.fixed_table) is not None:
            self.set_dispatch(table)
        self._block_size = deploy.block_size
        self._phase = None
        self._graphs = DecodeGraphs.of(
            self.stage,
            deploy.graphs if self._checks is None else None,
            num_blocks=num_blocks,
            block_size=deploy.block_size,
            records_transfers=self._is_over_nccl,
            await_device=self._await_device,
        )
        if self._graphs is not None:
            self.totals()  # starts the meter on all ranks alike: graphs add to it
        if left is not None and left.caches is not None:
            self._sampler = left.sampler
            self._changes = UncommittedChanges(self._sampler, left.tokens)
            self.stage.take_cache(left.caches)
            return
        self._sampler = Sampler(self.spec.model.vocab_size, self._device)
        self._changes = UncommittedChanges(self._sampler, {})
        num_blocks += self._graphs is not None  # one for padding
        self.stage.allocate_cache(num_blocks, deploy.block_size, options.kv_dtype)

    def drop_graphs(self) -> None:
        """Drop all graphs, since groups, weights or forms change."""
        if self._graphs is not None:
            self._graphs.clear()

    def record_graphs(self, size: int, forms: Sequence[DispatchForm]) -> int:
        """Record the graphs of batches padded to a size; gives the number of new graphs."""
        return 0 if self._graphs is None else self._graphs.record(size, forms)

    def rejoin(self, discard: Sequence[int]) -> None:
        """Use the groups of a new epoch, and undo steps.

        Args:
            discard: steps to undo; see `discard`.
        """
        self.drop_graphs()
        self._mesh.renew()
        self._sends.clear()  # their receivers dropped them
        self.discard(discard)
        self.migration.forget()

    def set_dispatch(self, table: DispatchTable) -> None:
        """Set dispatch form and overlap of steps from now on, by a table."""
        self.drop_graphs()
        self._dispatch, self._only_mode = table, table.only
        self.stage.set_forms(table.forms, self._payload)

    def run(self, step: RankStep, placements: Placements | None = None) -> RankOutcome:
        """Run a step's micro-batches through this stage, one after the other.

        Args:
            placements: [num_hidden_layers]; new placements from this step on; None for no change.
        """
        self._changes.commit_all_but(step.num_uncommitted)
        before = self._changes.tokens
        changes = self._begin_changes(step, placements)
        self._begin_record(step)
        # A step that far back was collected before this one was submitted: its sends are done.
        while len(self._sends) >= self.spec.layout.pp:
            for send in self._sends.popleft():
                send.wait()
        self._sends.append([])
        outcome = RankOutcome()
        if self._checks is not None:
            self._checks.begin_step(self.stage)
        inputs: Iterator[tuple[list[ForwardBatch], Pending | None]]
        inputs = map(partial(self._begin_input, chosen=before), step.micro_batches)
        if not self._is_over_nccl:  # where a receive that waits holds up the sends behind it
            inputs = iter([*inputs])
        tokens = StepTokens()
        for number, (parts, arriving) in enumerate(inputs):
            self._recorder.set_micro_batch(number)
            for seq_ids, result in self._run_micro_batch(parts, arriving):
                self._recorder.enter(Stage.HEAD)
                tokens.choose(seq_ids, result, self._sampler)
                if step.return_logits:
                    logits = result.logits.to("cpu", copy=True)  # graphs overwrite their logits
                    outcome.logits |= zip(seq_ids, logits.numpy(), strict=True)
        is_told = self._mesh.at.tp_rank == 0
        look = None if self._checks is None else self._look_at_head
        changes.chosen = tokens.fetch(outcome if is_told else None, look, self._await_device)
        for send in self._sends[-1]:
            send.let_go()
        outcome.record = self._recorder.end_step()
        if self._checks is not None:
            outcome.checks = self._checks.end_step()
        return outcome

    def _begin_record(self, step: RankStep) -> None:
        """Begin the step in the recorder, and in the choice of graphs."""
        if step.record_operations and torch.get_num_threads() > 1:
            torch.set_num_threads(1)  # the recorder sees one thread's CPU time
        same_phase = step.phase is self._phase
        self._phase = step.phase
        self._recorder.begin_step(
            step.step,
            len(step.micro_batches),
            record=step.record,
            count_idle=same_phase,
            record_routing=step.record_routing,
            record_events=step.record_events,
            record_operations=step.record_operations,
        )
        if self._graphs is not None:
            self._graphs.begin_step(step.phase)

    def run_crowded(self, step: RankStep) -> None:
        """Run a step in which all tokens go to the same experts."""
        self._crowds = True
        try:
            self.run(step)
        finally:
            self._crowds = False

    def totals(self) -> RankTotals:
        """Totals of the steps since the first call."""
        with torch.inference_mode():  # steps add to its tensors in this mode
            return self._recorder.totals()

    def _begin_changes(self, step: RankStep, placements: Placements | None) -> Changes:
        sampled = replaced = None
        if placements is not None:
            self.drop_graphs()
            replaced = self.migration.apply_placements(placements)
        if self._mesh.is_last_stage:
            sampled = self._sampler.begin_step(step.released, step.admitted, step.masks)
        return self._changes.begin(step.step, sampled, replaced)

    def discard(self, steps: Sequence[int]) -> None:
        """Undo the latest steps if they are among `steps`, and commit those before them.

        Their keys and values stay in the cache: when steps run again, in order, they write them
        anew before they read them.
        """
        for placements in self._changes.undo(steps):
            self.drop_graphs()
            self.migration.restore(placements)

    def _look_at_head(self, logits: torch.Tensor, tokens: dict[int, int]) -> None:
        assert self._checks is not None, "they are asked for"
        self._checks.check_head(logits, tokens, self._sampler)

    def _begin_input(
        self, micro_batch: RankBatch, chosen: dict[int, int]
    ) -> tuple[list[ForwardBatch], Pending | None]:
        """The parts of a micro-batch, and the receive of their hidden states; None if first stage.

        All ranks of the stage leave out a part that has no token on any of them.

        Args:
            chosen: tokens of the step before, by sequence id.
        """
        mesh = self._mesh
        first = mesh.is_first_stage
        self._recorder.enter(Stage.EMBED if first else Stage.HAND_OVER)
        mode = self._choose(micro_batch)
        own, sizes = [with_chosen(micro_batch.own, chosen)], [micro_batch.num_tokens]
        if self._graphs is not None:
            padded = self._graphs.padded_step(own[0], micro_batch, mode)
            if padded is not None:
                return [padded], self._hidden_of([padded])
        if mode.overlap:
            own = own[0].split(2)
            sizes = [list(half) for half in zip(*micro_batch.num_tokens_of_halves, strict=True)]
        parts = [
            ForwardBatch(
                *(batch, num_tokens, mesh.layout, mesh.at, self._device, self._block_size),
                mode.form,
                crowds=self._crowds,
            )
            for batch, num_tokens in zip(own, sizes, strict=True)
            if any(num_tokens)
        ]
        return parts, None if first else self._hidden_of(parts)

    def _hidden_of(self, parts: Sequence[ForwardBatch]) -> Pending | None:
        """Begin to receive hidden states from the previous stage; None in the first one."""
        mesh = self._mesh
        if mesh.is_first_stage:
            return None
        buffer = self.stage.empty_hidden(sum(part.num_owned for part in parts))
        return mesh.pp.receive(buffer, mesh.at.pp_rank - 1)

    def _choose(self, micro_batch: RankBatch) -> DispatchMode:
        """Choose dispatch form and overlap by facts that all ranks of all stages share."""
        if self._only_mode is not None:
            return self._only_mode
        num_owned = -(-max(micro_batch.num_tokens) // self.spec.layout.tp)
        return self._dispatch.choose(num_owned, micro_batch.can_split, self._phase)

    def _run_micro_batch(
        self, parts: list[ForwardBatch], arriving: Pending | None
    ) -> list[tuple[list[int], HeadResult]]:
        """Run a micro-batch, and hand its hidden states to the next stage.

        Returns:
            For each part, the sequences that yield a token and the head's result; empty except on
            the last stage.
        """
        mesh, stage = self._mesh, self.stage
        if parts and isinstance(parts[0], PaddedBatch):
            return self._run_graph(parts[0], arriving)
        if arriving is None:
            inputs = [stage.embed(part) for part in parts]
            point = CheckPoint.EMBEDDING
        else:
            arrived = arriving.wait()
            self._recorder.arrive()
            inputs = list(torch.split(arrived, [part.num_owned for part in parts]))
            point = CheckPoint.HAND_OVER
        for x in inputs:
            self._recorder.check_finite(x, point)
        self._recorder.is_interleaved = len(parts) > 1
        begin = None if self._graphs is None else self._graphs.beginning_of(parts)
        results = interleave(
            [
                stage.forward(x, part, self._needs_logits(part.batch), self._scored(part), begin)
                for x, part in zip(inputs, parts, strict=True)
            ]
        )
        heads = [result for result in results if isinstance(result, HeadResult)]
        if mesh.is_last_stage:
            of_parts = zip(parts, heads, strict=True)
            return [(part.batch.yielding_seq_ids, head) for part, head in of_parts]
        hidden = [result for result in results if isinstance(result, torch.Tensor)]
        self._hand_over(hidden)
        return []

    def _run_graph(
        self, part: PaddedBatch, arriving: Pending | None
    ) -> list[tuple[list[int], HeadResult]]:
        """Run a micro-batch as a graph; for the result see `_run_micro_batch`."""
        assert self._graphs is not None, "the batch was padded for it"
        result = self._graphs.run(part, None if arriving is None else arriving.wait())
        if not isinstance(result, HeadResult):
            self._hand_over([result])
            return []
        if self._needs_logits(part.real):
            (result,) = interleave([self.stage.with_all_logits(result)])
        return [(part.real.yielding_seq_ids, result)]

    def _hand_over(self, hidden: list[torch.Tensor]) -> None:
        """Begin to send the parts' hidden states to the next stage."""
        self._recorder.enter(Stage.HAND_OVER)
        if hidden:
            send = self._mesh.pp.send(torch.cat(hidden), self._mesh.at.pp_rank + 1)
            if send is not None:
                self._sends[-1].append(send)

    def _needs_logits(self, batch: Batch) -> bool:
        """True if a sequence that yields a token is sampled, not plainly greedy."""
        return self._sampler.samples_any(batch.yielding_seq_ids)

    def _scored(self, part: ForwardBatch) -> ScoredPrompts | None:
        """The prompt tokens of the part whose log-probabilities are asked for."""
        if not self._mesh.is_last_stage:
            return None
        return ScoredPrompts.of_batch(part.batch, self._sampler.state)
