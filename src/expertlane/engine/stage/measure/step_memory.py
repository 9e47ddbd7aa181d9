"""Measurement of the memory that a step of a rank's stage takes."""

import torch

from expertlane.engine.ops.device_memory import memory_of
from expertlane.engine.ranks.commands import MeasureStep
from expertlane.engine.stage.worker import RankContext


def measure_step(context: RankContext, command: MeasureStep) -> int:
    """Peak bytes of a step, beyond those allocated before; the most over all dispatch tables."""
    deployed, memory = context.deployed, memory_of(context.platform.device)
    memory.begin()
    with torch.inference_mode():
        for table in command.tables:
            deployed.set_dispatch(table)
            deployed.run_crowded(command.step)
    return memory.peak_bytes()
