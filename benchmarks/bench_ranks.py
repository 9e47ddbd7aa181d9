"""The commands of benchmarks that run on ranks, and the fork server whose ranks know them."""

from typing import Any

from expertlane.engine.ranks import fork_server
from expertlane.engine.ranks.commands import Command
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.pool import RankPool

TIMEOUT_S = 60.0


class MeasureDispatch(Command[dict[str, dict[str, list[list[float]]]]]):
    """Wall and processor seconds by form and variant, one pair a round."""

    num_ranks: int
    num_tokens: int
    top_k: int


def start_ranks(num_ranks: int, dtype: str | None = "bfloat16") -> RankPool:
    return RankPool(LocalRanks(num_ranks, TIMEOUT_S, dtype, __name__), TIMEOUT_S)


def main() -> None:
    import bench_dispatch

    from expertlane.engine.stage.worker import HANDLERS

    own: dict[type[Command[Any]], Any] = {MeasureDispatch: bench_dispatch.measure}
    fork_server.main({**HANDLERS, **own})
