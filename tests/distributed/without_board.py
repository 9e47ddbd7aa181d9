"""A fork server whose ranks cannot see the launcher's board, as on another node."""

from dataclasses import replace

from distributed import on_ranks
from expertlane.engine.fork_server import ServerSettings


def main() -> None:
    of_rank = ServerSettings.of_rank
    ServerSettings.of_rank = lambda self, rank: replace(of_rank(self, rank), board_fd=None)
    on_ranks.main()
