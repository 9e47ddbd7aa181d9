"""What runs on a rank: build its stage of a deployment, then execute step plans with it."""

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from expertlane.engine.messages import RankOutcome, StageSpec
from expertlane.engine.worker import RankContext
from expertlane.model.forward_batch import ForwardBatch
from expertlane.model.transformer import HeadResult, TransformerStage, WeightSource
from expertlane.parallel.collectives import Pending
from expertlane.parallel.interleave import interleave
from expertlane.parallel.mesh import DeviceMeshes, ParallelMesh
from expertlane.parallel.recorder import Recorder
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.names import Phase, Stage


def deploy(
    context: RankContext, spec: StageSpec, overlap: bool, num_slots: int, max_len: int
) -> None:
    """Build this rank's stage, or keep it if only options changed. Collective over all ranks.

    Args:
        num_slots: sequences the key/value cache has room for.
        max_len: positions of each.
    """
    if spec.layout not in context.meshes:
        context.meshes[spec.layout] = DeviceMeshes(spec.layout, context.platform.device.type)
    if context.rank >= spec.layout.world_size:
        context.deployed = None
        return
    current = context.deployed
    if current is None or current.spec != spec:
        context.deployed = current = None  # frees the old weights before the new ones are drawn
        context.deployed = DeployedStage(context, spec)
    context.deployed.set_options(overlap=overlap)
    context.deployed.stage.allocate_cache(num_slots, max_len)


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
            context.rank, model.num_hidden_layers, model.num_experts, context.progress
        )
        self._recorder.enter(Stage.SETUP)
        self._mesh = ParallelMesh(
            spec.layout,
            context.meshes[spec.layout],
            context.rank,
            spec.ranks_per_node,
            self._recorder,
        )
        source = WeightSource(
            model, spec.seed, platform.dtype, platform.device, context.progress.touch
        )
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
        for number, micro_batch in enumerate(plan.micro_batches):
            recorder.set_micro_batch(number)
            for part, result in self._run_micro_batch(micro_batch):
                recorder.enter(Stage.HEAD)
                seq_ids = part.batch.seq_ids.tolist()
                if self._mesh.at.tp_rank == 0:
                    token_ids |= zip(seq_ids, result.token_ids.tolist(), strict=True)
                if plan.return_logits:
                    logits |= zip(seq_ids, result.logits.cpu().numpy(), strict=True)
        return RankOutcome(token_ids, logits, recorder.end_step())

    def _run_micro_batch(
        self, micro_batch: Sequence[Batch]
    ) -> list[tuple[ForwardBatch, HeadResult]]:
        """Results of the head by part; none but on the last stage."""
        mesh, stage = self._mesh, self.stage
        by_dp_rank = [batch.split(self._num_parts) for batch in micro_batch]
        parts = [
            ForwardBatch(batches, mesh.layout, mesh.at, self._device)
            for batches in zip(*by_dp_rank, strict=True)
        ]
        if mesh.is_first_stage:
            inputs = [stage.embed(part) for part in parts]
        else:
            self._recorder.enter(Stage.HAND_OVER)
            room = stage.empty_hidden(sum(part.num_owned for part in parts))
            received = mesh.pp.receive(room, mesh.at.pp_rank - 1).wait()
            inputs = list(torch.split(received, [part.num_owned for part in parts]))
        results = interleave(
            [stage.forward(x, part) for x, part in zip(inputs, parts, strict=True)]
        )
        heads = [result for result in results if isinstance(result, HeadResult)]
        if heads:
            return list(zip(parts, heads, strict=True))
        self._recorder.enter(Stage.HAND_OVER)
        hidden = torch.cat([result for result in results if isinstance(result, torch.Tensor)])
        send = mesh.pp.send(hidden, mesh.at.pp_rank + 1)
        if send is not None:
            self._sends[-1].append(send)
        return []
