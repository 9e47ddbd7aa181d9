"""What a number takes for granted."""

from dataclasses import dataclass

from expertlane.results.strict import Strict


@dataclass(frozen=True)
class Assumption(Strict):
    """A choice the experiment's source leaves open, and why it was made so."""

    name: str
    value: str
    why: str
