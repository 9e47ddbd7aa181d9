"""A rank's checks of placements, tokens, sampler and weights, beside those of its layers."""

from collections.abc import Mapping
from zlib import crc32

import numpy as np
from torch import Tensor

from expertlane.balance.holding import Holding
from expertlane.balance.placement import Placement
from expertlane.engine.comm.checks import Checks, checksum
from expertlane.engine.comm.clocks import clock_for
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.comm.recorder import CheckedRecorder, Recorder
from expertlane.engine.model.sampler import Sampler
from expertlane.engine.model.transformer import TransformerStage
from expertlane.engine.ranks.commands import StageSpec
from expertlane.engine.stage.context import RankContext
from expertlane.spec.names import CheckPoint


def recorder_of(context: RankContext, spec: StageSpec, rank: int) -> Recorder:
    """The recorder of a rank's stage, with checks for silent errors unless they are off.

    Args:
        rank: the rank in the layout.
    """
    model, layout = spec.model, spec.layout
    sizes = (
        rank,
        model.num_hidden_layers,
        model.num_experts,
        context.progress,
        clock_for(context.platform.device, context.await_device),
        layout.world_size,
        context.core_token(),
    )
    if spec.check == "off":
        return Recorder(*sizes)
    own = Holding(model, layout, rank, spec.placements)
    checks = Checks(spec.check, model.num_experts, own.at.etp_rank, own.layers.start)
    return CheckedRecorder(checks, *sizes)


class StageChecks:
    """Checks of a stage in each step.

    Args:
        checks: records faults and checksums.
    """

    def __init__(self, checks: Checks, mesh: ParallelMesh) -> None:
        self._checks, self._mesh = checks, mesh
        self._placements: dict[int, tuple[Placement, int]] = {}  # by layer; and their checksums
        self.end_step = checks.end_step

    def begin_step(self, stage: TransformerStage) -> None:
        """Begin a step, and record checksums of placements, to be equal on the stage's ranks."""
        self._checks.begin_step()
        ranks, known = self._mesh.stage.ranks, self._placements
        for layer, block in stage.moe_blocks.items():
            if layer not in known or known[layer][0] is not block.placement:
                total = crc32(repr(block.placement.experts_of_rank).encode())
                known[layer] = block.placement, total
            place = self._checks.place(CheckPoint.PLACEMENT, layer)
            self._checks.alike(ranks, known[layer][1], place)

    def check_head(self, logits: Tensor, tokens: Mapping[int, int], sampler: Sampler) -> None:
        """Check that logits are finite, and that tokens and sampler are equal on the `tp` group.

        Args:
            logits: [num_seqs, num_local_vocab].
            tokens: chosen tokens by sequence id.
        """
        ranks, checks = self._mesh.tp.ranks, self._checks
        checks.finite(logits, CheckPoint.HEAD)
        if len(ranks) == 1:
            return
        total = crc32(np.array(list(tokens.items()), dtype=np.int64).data)
        checks.alike(ranks, total, checks.place(CheckPoint.TOKENS))
        total = sampler.checksum(tokens, checksum)
        checks.alike(ranks, total, checks.place(CheckPoint.SAMPLER))


def sum_weights(stage: TransformerStage) -> dict[str, int]:
    """Checksums of all weights of a stage, by name."""
    sums = {}
    for name, tensors in stage.held():
        sums[name] = crc32(repr([checksum(tensor) for tensor in tensors]).encode())
        stage.mesh.recorder.progress.touch()
    return sums
