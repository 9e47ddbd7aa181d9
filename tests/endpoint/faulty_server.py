"""`expertlane serve` with one planted error, which the environment variable `FAULT` names."""

import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # ranks import from there, too

from endpoint.faulty_ranks import FAR, FAULT, LARGE_BATCH
from expertlane.schedule.blocks import BlockManager

STALE = "stale prefix-cache block"
FAULTS = (STALE, LARGE_BATCH, FAR)


def _plant_in_cache() -> None:
    """The last block that a request finds in the cache is another one's, if there is another."""
    right = BlockManager.find

    def wrong(self: BlockManager, digests: Iterable[bytes]) -> list[int]:
        found = right(self, digests)
        others = [block for block in self._registered.values() if block not in found]
        return [*found[:-1], others[0]] if found and others else found

    BlockManager.find = wrong  # type: ignore[method-assign]


def _main() -> None:
    from expertlane.cli.main import main
    from expertlane.engine import launch

    if os.environ.get(FAULT) == STALE:
        _plant_in_cache()
    launch.LocalRanks = partial(  # type: ignore[assignment,misc]
        launch.LocalRanks, server_module="endpoint.faulty_ranks"
    )
    main()


if __name__ == "__main__":
    _main()
