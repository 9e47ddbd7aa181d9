"""What a fitter gives to the profile. A fitter is one function; `fit_h100.py` lists them all."""

from collections.abc import Callable
from dataclasses import dataclass, field

from quality import Quality

from expertlane.cost.laws.profile import Profile, Term
from expertlane.cost.laws.surface import Surface


@dataclass(frozen=True, eq=False)
class Fitted:
    """Laws, and how well they fit."""

    surfaces: dict[str, Surface] = field(default_factory=dict)
    terms: dict[str, Term] = field(default_factory=dict)
    qualities: list[Quality] = field(default_factory=list)


# From the datasheet's profile (with terms, without surfaces), and whether to judge too, to laws.
Fitter = Callable[[Profile, bool], Fitted]
