"""`expertlane serve` that rebalances whenever it can: no move of experts this small would pay."""

import sys
from typing import Any

from expertlane.balance.holding import Placements
from expertlane.engine import model_runner
from expertlane.engine.elastic.rebalancing import Rebalancer

SWITCHED = "experts have moved"


class Eager(Rebalancer):
    """Takes the placement that moves most, and says when it is in use."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more, worth=lambda decision: decision.num_bytes)

    def _move_on(self, *given: Any) -> Placements | None:
        new = super()._move_on(*given)
        if new is not None:
            print(SWITCHED, file=sys.stderr)
        return new


if __name__ == "__main__":
    from expertlane.cli.main import main

    model_runner.Rebalancer = Eager  # type: ignore[misc]
    main()
