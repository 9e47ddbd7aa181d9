"""Options of virtual time: which clock goes first, and what is modelled."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

import typer

from expertlane.cli import completion
from expertlane.cli.help import Panel
from expertlane.errors import UserError

if TYPE_CHECKING:
    from expertlane.comparison.virtual import VirtualSettings

DEFAULT_PROFILE = "h100"
_NO_LINKS, _MEASURED = "none", "measured"


class _Clock(StrEnum):
    VIRTUAL = "virtual"
    WALL = "wall"


@dataclass(frozen=True, kw_only=True)
class VirtualTimeOptions:
    """Whether there is virtual time, and what it assumes."""

    panel: ClassVar = Panel.VIRTUAL_TIME
    clock: _Clock | None = typer.Option(
        None,
        show_default="virtual for the ranks of one host; wall on several, whose links are real",
        help="virtual: also replay what was measured with one core per rank and a cluster's "
        "links (while measuring, ranks that share a core compute one at a time). wall: wall time "
        "only.",
    )
    links: str | None = typer.Option(
        None,
        metavar="PROFILE",
        show_default=DEFAULT_PROFILE,
        autocompletion=completion.profiles,
        help="The links of virtual time: a profile as in --cluster, or none, so that transfers "
        "take no time.",
    )
    link_scale: float | None = typer.Option(
        None,
        metavar="N",
        show_default="the ratio of compute speeds, the profile's device over a core here",
        help="Transfers take N times as long as on the profile's links.",
    )
    compute: str = typer.Option(
        _MEASURED,
        metavar="PROFILE",
        autocompletion=completion.profiles,
        help="Compute times in virtual time: measured, or a profile's cost model for the "
        "operations that ran.",
    )

    def __post_init__(self) -> None:
        given = "--link-scale" if self.link_scale is not None else "--links"
        is_given = self.links is not None or self.link_scale is not None
        if self.compute != _MEASURED:
            given, is_given = "--compute", True
        if self.clock is _Clock.WALL and is_given:
            raise UserError(f"{given} needs virtual time; leave out --clock wall")
        if self.links == _NO_LINKS and self.link_scale is not None:
            raise UserError("--link-scale needs links; give --links a profile")

    def settings(self) -> "VirtualSettings | None":
        """What virtual time assumes; None for wall time alone.

        Raises:
            UserError: no such profile, or a damaged one.
        """
        from expertlane.comparison.virtual import VirtualSettings
        from expertlane.cost.laws.profile_file import read_profile

        if self.clock is _Clock.WALL:
            return None
        profile = None if self.links == _NO_LINKS else read_profile(self.links or DEFAULT_PROFILE)
        compute = None if self.compute == _MEASURED else read_profile(self.compute)
        is_asked = (self.clock, self.links, self.link_scale) != (None, None, None)
        return VirtualSettings(profile, self.link_scale, compute, is_asked or compute is not None)
