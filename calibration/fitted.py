"""What a fit gives to the profile."""

from dataclasses import dataclass, field

from quality import Quality

from expertlane.cost.laws.profile import Term
from expertlane.cost.laws.times import Surface


@dataclass(frozen=True, eq=False)
class Fitted:
    """Laws, and how well they fit."""

    surfaces: dict[str, Surface] = field(default_factory=dict)
    terms: dict[str, Term] = field(default_factory=dict)
    qualities: list[Quality] = field(default_factory=list)
