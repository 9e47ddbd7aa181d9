"""A supervisor whose ranks know the tests' commands too."""

from distributed.on_ranks import handlers
from expertlane.engine.ranks import supervisor


def main() -> None:
    supervisor.main(handlers())
