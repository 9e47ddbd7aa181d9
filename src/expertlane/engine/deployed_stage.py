"""What runs on a rank: build its stage of a deployment, then execute step plans with it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from expertlane.comm.clock import clock_for
from expertlane.comm.collectives import Pending
from expertlane.comm.interleave import interleave
from expertlane.comm.mesh import ParallelMesh
from expertlane.comm.progress import NO_LAYER
from expertlane.comm.recorder import Recorder
from expertlane.engine import migration
from expertlane.engine.commands import (
    Deploy,
    HeldBytes,
    RankOutcome,
    RunStep,
    SetDispatch,
    StageSpec,
)
from expertlane.engine.dispatch_timing import forms_of
from expertlane.engine.worker import RankContext
from expertlane.model.checkpoint import Checkpoint, CheckpointWeights
from expertlane.model.draw import NO_TOKEN
from expertlane.model.forward_batch import ForwardBatch
from expertlane.model.sampler import Sampler
from expertlane.model.transformer import HeadResult, TransformerStage
from expertlane.model.weights import SeededWeights, WeightSource
from expertlane.schedule.plan import UNKNOWN, Batch, StepPlan
from expertlane.spec.deployment import DispatchMode, DispatchTable, Options, PayloadType
from expertlane.spec.names import Phase, Stage
from expertlane.spec.sampling import TokenLogprobs


def deploy(context: RankContext, command: Deploy) -> HeldBytes:
    """Build this rank's stage, or keep it if only options changed."""
    spec, options = command.spec, command.options
    if context.deployed is not None:
        migration.finish_moves(context)  # buffers must not go while bytes travel
    context.progress.enter(Stage.SETUP, NO_LAYER)
    context.meshes.make(spec.layout, _nodes_for(spec, options))
    held = HeldBytes(0, 0)
    if context.rank >= spec.layout.world_size:
        context.deployed = None
    else:
        if context.deployed is None or not context.deployed.is_as_at_first(spec):
            context.deployed = None  # frees the old weights before the new ones are drawn
            context.deployed = DeployedStage(context, spec)
        context.deployed.start(
            options, num_blocks=command.num_blocks, block_size=command.block_size
        )
        stage: TransformerStage = context.deployed.stage
        held = HeldBytes(stage.weight_bytes, stage.kv_bytes)
    context.progress.enter(Stage.IDLE, NO_LAYER)
    return held


def _nodes_for(spec: StageSpec, options: Options) -> int:
    """`ranks_per_node` where groups by node are needed, else 0."""
    is_wanted = options.dispatch == "hierarchical"
    if options.dispatch == "auto":
        is_wanted = "hierarchical" in forms_of(spec.layout, spec.ranks_per_node)
    return spec.ranks_per_node if is_wanted else 0


def set_dispatch(context: RankContext, command: SetDispatch) -> None:
    """Choose how steps run from now on."""
    context.deployed.set_dispatch(command.table)


def run_step(context: RankContext, command: RunStep) -> RankOutcome:
    """Execute one step plan on this rank's stage."""
    deployed: DeployedStage = context.deployed
    with torch.inference_mode():
        return deployed.run(command.plan)


class DeployedStage:
    """A rank's stage of a deployment, and the order in which it takes micro-batches."""

    def __init__(self, context: RankContext, spec: StageSpec) -> None:
        self.spec = spec
        platform, model = context.platform, spec.model
        self._recorder = Recorder(
            context.rank,
            model.num_hidden_layers,
            model.num_experts,
            context.progress,
            clock_for(platform.device),
            spec.layout.world_size,
        )
        self._mesh = ParallelMesh(
            spec.layout,
            context.meshes,
            context.rank,
            spec.ranks_per_node,
            self._recorder,
        )
        touch = context.progress.touch
        source: WeightSource
        if spec.checkpoint is None:
            source = SeededWeights(model, spec.seed, platform.dtype, platform.device, touch)
        else:
            checkpoint = Checkpoint(Path(spec.checkpoint), model)
            source = CheckpointWeights(checkpoint, platform.dtype, platform.device, touch)
        self.stage = TransformerStage(model, spec.placements, source, self._mesh, self._recorder)
        self.migration = migration.Migration()
        self._device = platform.device
        self._sampler = Sampler(model.vocab_size, platform.device)
        self._dispatch = DispatchTable.fixed("all_to_all")
        self._payload: PayloadType = "model"
        self._block_size = 1
        self._phase: Phase | None = None
        self._chosen: dict[int, int] = {}  # the last step's tokens, by sequence id
        self._sends: deque[list[Pending]] = deque()

    def is_as_at_first(self, spec: StageSpec) -> bool:
        """Whether it is what `spec` builds: experts may have moved since."""
        blocks = self.stage.moe_blocks
        return self.spec == spec and all(
            block.placement == spec.placements[layer] for layer, block in blocks.items()
        )

    def start(self, options: Options, *, num_blocks: int, block_size: int) -> None:
        """Begin with an empty cache; what is `auto` is timed first, then set."""
        self.migration = migration.Migration()  # what arrived for a switch that never came
        self._payload = options.payload
        if options.dispatch != "auto" and options.overlap != "auto":
            self.set_dispatch(DispatchTable.fixed(options.dispatch, options.overlap))
        self._block_size = block_size
        self._phase = None
        self._sampler.forget_all()
        self.stage.allocate_cache(num_blocks, block_size)

    def set_dispatch(self, table: DispatchTable) -> None:
        """Choose how steps run from now on."""
        self._dispatch = table
        self.stage.set_forms(table.forms, self._payload)

    def run(self, plan: StepPlan) -> RankOutcome:
        """Take the plan's micro-batches through this stage, one after the other."""
        recorder = self._recorder
        same_phase = plan.phase is self._phase
        self._phase = plan.phase
        recorder.begin_step(
            plan.step,
            len(plan.micro_batches),
            record=plan.record,
            count_idle=same_phase,
            record_routing=plan.record_routing,
            record_events=plan.record_events,
        )
        # A step that far back was collected before this one was submitted: its sends are through.
        while len(self._sends) >= self.spec.layout.pp:
            for send in self._sends.popleft():
                send.wait()
        self._sends.append([])
        if self._mesh.is_last_stage:
            self._sampler.forget(plan.released)
            for seq_id, state in plan.admitted.items():
                self._sampler.admit(seq_id, state)
        outcome = RankOutcome()
        inputs = [self._begin_input(micro_batch) for micro_batch in plan.micro_batches]
        self._chosen = {}
        for number, (parts, arriving) in enumerate(inputs):
            recorder.set_micro_batch(number)
            for part, result in self._run_micro_batch(parts, arriving):
                recorder.enter(Stage.HEAD)
                self._take(part.yielding_seq_ids, result, outcome, plan.return_logits)
        outcome.record = recorder.end_step()
        return outcome

    def _take(
        self, seq_ids: list[int], result: HeadResult, outcome: RankOutcome, return_logits: bool
    ) -> None:
        """Choose a part's next tokens; one rank of a tensor-parallel group tells them."""
        logprobs: dict[int, TokenLogprobs] = {}
        if result.token_ids is not None:
            chosen = result.token_ids.tolist()
        else:  # on all ranks alike: each may have to go on with what was chosen
            assert result.all_logits is not None, "one of both is given"
            chosen, logprobs = self._sampler.sample(seq_ids, result.all_logits)
        tokens = dict(zip(seq_ids, chosen, strict=True))
        failed = [seq for seq, token in tokens.items() if token == NO_TOKEN]
        self._chosen |= tokens
        for seq in failed:  # a step that is under way still takes it: with any token
            self._chosen[seq] = 0
            del tokens[seq]
        if self._mesh.at.tp_rank == 0:
            outcome.token_ids |= tokens
            outcome.logprobs |= logprobs
            outcome.not_finite += failed
        if return_logits:
            outcome.logits |= zip(seq_ids, result.logits.cpu().numpy(), strict=True)

    def _with_chosen(self, batch: Batch) -> Batch:
        """The batch with the tokens that the scheduler did not know."""
        is_unknown = batch.token_ids == UNKNOWN
        if not is_unknown.any():
            return batch
        token_ids = batch.token_ids.copy()
        seq_ids = np.repeat(batch.seq_ids, batch.num_scheduled_tokens)[is_unknown]
        token_ids[is_unknown] = [self._chosen[seq] for seq in seq_ids.tolist()]
        return replace(batch, token_ids=token_ids)

    def _begin_input(
        self, micro_batch: Sequence[Batch]
    ) -> tuple[list[ForwardBatch], Pending | None]:
        """The parts of a micro-batch, and their hidden states on the way from the stage before.

        A part without a token on any rank of the stage is left out by all of them.
        """
        mesh = self._mesh
        first = mesh.is_first_stage
        self._recorder.enter(Stage.EMBED if first else Stage.HAND_OVER)
        own, mode = mesh.at.dp_rank, self._choose(micro_batch)
        by_dp_rank = [
            (self._with_chosen(batch) if dp_rank == own else batch).split(1 + mode.overlap)
            for dp_rank, batch in enumerate(micro_batch)
        ]
        parts = [
            ForwardBatch(batches, mesh.layout, mesh.at, self._device, self._block_size, mode.form)
            for batches in zip(*by_dp_rank, strict=True)
            if any(batch.num_tokens for batch in batches)
        ]
        if first:
            return parts, None
        room = self.stage.empty_hidden(sum(part.num_owned for part in parts))
        return parts, mesh.pp.receive(room, mesh.at.pp_rank - 1)

    def _choose(self, micro_batch: Sequence[Batch]) -> DispatchMode:
        """By what all ranks of all stages see alike, before the batch is split."""
        most = max(batch.num_tokens for batch in micro_batch)
        can_split = any(batch.num_seqs > 1 for batch in micro_batch)
        return self._dispatch.choose(-(-most // self.spec.layout.tp), can_split)

    def _run_micro_batch(
        self, parts: list[ForwardBatch], arriving: Pending | None
    ) -> list[tuple[ForwardBatch, HeadResult]]:
        """Results of the head by part; none but on the last stage."""
        mesh, stage = self._mesh, self.stage
        if arriving is None:
            inputs = [stage.embed(part) for part in parts]
        else:
            inputs = list(torch.split(arriving.wait(), [part.num_owned for part in parts]))
        results = interleave(
            [
                stage.forward(x, part, self._needs_logits(part))
                for x, part in zip(inputs, parts, strict=True)
            ]
        )
        heads = [result for result in results if isinstance(result, HeadResult)]
        if mesh.is_last_stage:
            return list(zip(parts, heads, strict=True))
        self._recorder.enter(Stage.HAND_OVER)
        hidden = [result for result in results if isinstance(result, torch.Tensor)]
        if hidden:
            send = mesh.pp.send(torch.cat(hidden), mesh.at.pp_rank + 1)
            if send is not None:
                self._sends[-1].append(send)
        return []

    def _needs_logits(self, part: ForwardBatch) -> bool:
        """Whether any sequence of the part asks for more than its likeliest token."""
        return any(seq in self._sampler for seq in part.yielding_seq_ids)
