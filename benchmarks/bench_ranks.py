"""What benchmarks run on ranks: commands, and the fork server whose ranks know them."""

from typing import Any

from expertlane.engine.ranks import fork_server
from expertlane.engine.ranks.commands import Command
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.pool import RankPool

TIMEOUT_S = 60.0


class MeasureCollectives(Command[dict[str, list[float]]]):
    """Wall (median) and processor seconds of a call, by collective; `num_bytes` to each rank."""

    num_ranks: int
    num_bytes: int
    num_calls: int


class MeasureDispatch(Command[dict[str, dict[str, list[list[float]]]]]):
    """Wall and processor seconds by form and variant, one pair a round."""

    num_ranks: int
    num_tokens: int
    top_k: int


class RunBareSteps(Command[list[float]]):
    """Seconds of decode steps of a batch, one after the other."""

    batch_size: int


class ProfileBareSteps(Command[dict[str, list[float]]]):
    """Of decode steps of a batch, recorded: seconds and bytes read by stage."""

    batch_size: int


def start_ranks(num_ranks: int, dtype: str | None = "bfloat16") -> RankPool:
    return RankPool(LocalRanks(num_ranks, TIMEOUT_S, dtype, __name__), TIMEOUT_S)


def main() -> None:
    import bench_collectives
    import bench_dispatch
    import bench_step

    from expertlane.engine.stage.stage import HANDLERS

    own: dict[type[Command[Any]], Any] = {
        MeasureCollectives: bench_collectives.measure,
        MeasureDispatch: bench_dispatch.measure,
        RunBareSteps: bench_step.bare_steps,
        ProfileBareSteps: bench_step.profiled_steps,
    }
    fork_server.main({**HANDLERS, **own})
