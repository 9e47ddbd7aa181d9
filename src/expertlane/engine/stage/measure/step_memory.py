"""How much memory a step of this rank's stage takes."""

import torch

from expertlane.engine.ops.device_memory import memory_of
from expertlane.engine.ranks.commands import MeasureStep
from expertlane.engine.stage.worker import RankContext


def measure_step(context: RankContext, command: MeasureStep) -> int:
    """Bytes beyond what the rank had before; the most of all ways to run it."""
    deployed, memory = context.deployed, memory_of(context.platform.device)
    memory.begin()
    with torch.inference_mode():
        for table in command.tables:
            deployed.set_dispatch(table)
            deployed.run_crowded(command.step)
    return memory.peak_bytes()
