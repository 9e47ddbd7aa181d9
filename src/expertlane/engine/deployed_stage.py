"""What runs on a rank: build its stage of a deployment, then execute step plans with it."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from expertlane.engine.messages import HeldBytes, RankOutcome, StageSpec
from expertlane.engine.worker import RankContext
from expertlane.model.checkpoint import Checkpoint, CheckpointWeights
from expertlane.model.forward_batch import ForwardBatch
from expertlane.model.tensors import WeightSource
from expertlane.model.transformer import HeadResult, TransformerStage
from expertlane.model.weights import SeededWeights
from expertlane.parallel.clock import clock_for
from expertlane.parallel.collectives import Pending
from expertlane.parallel.interleave import interleave
from expertlane.parallel.mesh import ParallelMesh
from expertlane.parallel.progress import NO_LAYER
from expertlane.parallel.recorder import Recorder
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.names import Phase, Stage


def deploy(
    context: RankContext, spec: StageSpec, overlap: bool, num_slots: int, max_len: int
) -> HeldBytes:
    """Build this rank's stage, or keep it if only options changed. Collective over all ranks.

    Args:
        num_slots: sequences the key/value cache has room for.
        max_len: positions of each.
    """
    context.progress.enter(Stage.SETUP, NO_LAYER)
    context.meshes.make(spec.layout)
    held = HeldBytes(0, 0)
    if context.rank >= spec.layout.world_size:
        context.deployed = None
    else:
        if context.deployed is None or context.deployed.spec != spec:
            context.deployed = None  # frees the old weights before the new ones are drawn
            context.deployed = DeployedStage(context, spec)
        context.deployed.set_options(overlap=overlap)
        stage: TransformerStage = context.deployed.stage
        stage.allocate_cache(num_slots, max_len)
        held = HeldBytes(stage.weight_bytes, stage.kv_bytes)
    context.progress.enter(Stage.IDLE, NO_LAYER)
    return held


def run_step(context: RankContext, plan: StepPlan) -> RankOutcome:
    """Execute one step plan on this rank's stage."""
    deployed: DeployedStage = context.deployed
    with torch.inference_mode():
        return deployed.run(plan)


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
            checkpoint = Checkpoint(Path(spec.checkpoint))
            source = CheckpointWeights(checkpoint, platform.dtype, platform.device, touch)
        self.stage = TransformerStage(model, source, self._mesh, self._recorder)
        self._device = platform.device
        self._num_parts = 1
        self._phase: Phase | None = None
        self._sends: deque[list[Pending]] = deque()

    def set_options(self, *, overlap: bool) -> None:
        """Choose whether two parts of a micro-batch overlap."""
        self._num_parts = 2 if overlap else 1
        self._phase = None

    def run(self, plan: StepPlan) -> RankOutcome:
        """Take the plan's micro-batches through this stage, one after the other."""
        recorder = self._recorder
        same_phase = plan.phase is self._phase
        self._phase = plan.phase
        recorder.begin_step(
            plan.step, len(plan.micro_batches), record=plan.record, count_idle=same_phase
        )
        # A step that far back was collected before this one was submitted: its sends are through.
        while len(self._sends) >= self.spec.layout.pp:
            for send in self._sends.popleft():
                send.wait()
        self._sends.append([])
        token_ids: dict[int, int] = {}
        logits: dict[int, npt.NDArray[np.float32]] = {}
        inputs = [self._begin_input(micro_batch) for micro_batch in plan.micro_batches]
        for number, (parts, arriving) in enumerate(inputs):
            recorder.set_micro_batch(number)
            for part, result in self._run_micro_batch(parts, arriving):
                recorder.enter(Stage.HEAD)
                seq_ids = part.batch.seq_ids.tolist()
                if self._mesh.at.tp_rank == 0:
                    token_ids |= zip(seq_ids, result.token_ids.tolist(), strict=True)
                if plan.return_logits:
                    logits |= zip(seq_ids, result.logits.cpu().numpy(), strict=True)
        return RankOutcome(token_ids, logits, recorder.end_step())

    def _begin_input(
        self, micro_batch: Sequence[Batch]
    ) -> tuple[list[ForwardBatch], Pending | None]:
        """The parts of a micro-batch, and their hidden states on the way from the stage before.

        A part without a token on any rank of the stage is left out by all of them.
        """
        mesh = self._mesh
        first = mesh.is_first_stage
        self._recorder.enter(Stage.EMBED if first else Stage.HAND_OVER)
        by_dp_rank = [batch.split(self._num_parts) for batch in micro_batch]
        parts = [
            ForwardBatch(batches, mesh.layout, mesh.at, self._device)
            for batches in zip(*by_dp_rank, strict=True)
            if any(batch.num_tokens for batch in batches)
        ]
        if first:
            return parts, None
        room = self.stage.empty_hidden(sum(part.num_owned for part in parts))
        return parts, mesh.pp.receive(room, mesh.at.pp_rank - 1)

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
            [stage.forward(x, part) for x, part in zip(inputs, parts, strict=True)]
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
