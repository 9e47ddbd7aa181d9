"""The options of `expertlane compare`: what is measured, virtual time, and a projection."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import typer

from expertlane.cli.help import Panel
from expertlane.cli.load import slo_option
from expertlane.cli.options import (
    CORRECTIONS,
    FRAMEWORK,
    MODEL_HELP,
    SKEW,
    TRACE,
    cluster_option,
    dtype_option,
    fields_of,
    known_models,
    known_profiles,
)
from expertlane.errors import UserError, naming
from expertlane.spec.names import Dtype
from expertlane.spec.ranges import DEFAULT_REPEAT

if TYPE_CHECKING:
    from expertlane.comparison.virtual import VirtualSettings
    from expertlane.results.results import Results
    from expertlane.spec.experiment import Experiment, Projection

DEFAULT_PROFILE = "h100"
_NO_LINKS, _MEASURED = "none", "measured"


@dataclass(frozen=True, kw_only=True)
class VirtualTimeOptions:
    """Options of virtual time, and of its assumptions."""

    panel: ClassVar = Panel.VIRTUAL_TIME
    clock: Literal["virtual", "wall"] | None = typer.Option(
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
        autocompletion=known_profiles,
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
        autocompletion=known_profiles,
        help="Compute times in virtual time: measured, or a profile's cost model for the "
        "operations that ran.",
    )

    def __post_init__(self) -> None:
        given = "--link-scale" if self.link_scale is not None else "--links"
        is_given = self.links is not None or self.link_scale is not None
        if self.compute != _MEASURED:
            given, is_given = "--compute", True
        if self.clock == "wall" and is_given:
            raise UserError(f"{given} needs virtual time; leave out --clock wall")
        if self.links == _NO_LINKS and self.link_scale is not None:
            raise UserError("--link-scale needs links; give --links a profile")

    def settings(self) -> "VirtualSettings | None":
        """The assumptions of virtual time; None for wall time alone.

        Raises:
            UserError: no such profile, or a damaged one.
        """
        from expertlane.comparison.virtual import VirtualSettings
        from expertlane.cost.laws.profile import read_profile

        if self.clock == "wall":
            return None
        profile = None if self.links == _NO_LINKS else read_profile(self.links or DEFAULT_PROFILE)
        compute = None if self.compute == _MEASURED else read_profile(self.compute)
        is_asked = (self.clock, self.links, self.link_scale) != (None, None, None)
        return VirtualSettings(profile, self.link_scale, compute, is_asked or compute is not None)


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of a comparison."""

    panel: ClassVar = Panel.WORKLOAD
    model: str | None = typer.Option(
        None,
        metavar="MODEL",
        show_default="the experiment's",
        autocompletion=known_models,
        help=MODEL_HELP,
    )
    experts_per_token: str | None = typer.Option(
        None,
        rich_help_panel=Panel.MORE_WORKLOAD,
        metavar="K[,K…]",
        show_default="the model's",
        help="Experts per token; with several, one comparison each, one after the other.",
    )
    only: str | None = typer.Option(
        None,
        metavar="NAME[,NAME]",
        help="Run only these deployments, by their names or numbers in the experiment; no scaling "
        "layouts.",
    )
    repeat: int = typer.Option(
        DEFAULT_REPEAT,
        help="How often the deployments of the answer's first sentence are measured; the others "
        "twice at most. Fewer than 5 give no intervals.",
    )
    min_time: float = typer.Option(
        0.0,
        metavar="SECONDS",
        rich_help_panel=Panel.MORE_WORKLOAD,
        help="Measure each of those deployments for at least this long.",
    )
    resume: bool = typer.Option(
        False,
        rich_help_panel=Panel.MORE_OUTPUT,
        help="Go on with a comparison that was interrupted: what it measured is kept in the folder "
        "of its results until it is complete.",
    )
    trace: bool = TRACE
    dtype: Dtype | None = dtype_option("the machine's choice")


@dataclass(frozen=True, kw_only=True)
class ProjectionOptions:
    """A projection of the same deployments."""

    panel: ClassVar = Panel.PROJECTION
    project: bool = typer.Option(
        False,
        help="Also project the same deployments on a modelled cluster, in separate tables; "
        "where this machine is too small to run them, only project. An experiment's table "
        "[projection] has values for the options below; those given take precedence.",
    )
    cluster: str | None = cluster_option(None, "as many h100 as ranks")
    skew: float | None = SKEW
    framework: str | None = FRAMEWORK
    corrections: Path | None = CORRECTIONS
    fit_corrections: Path | None = typer.Option(
        None,
        show_default="none",
        help="Fit corrections to what was measured beside the projection, and write them: for "
        "--corrections of plan, simulate and compare.",
        rich_help_panel=Panel.MODELLED,
    )
    slo: list[str] | None = slo_option(
        "Each deployment runs as many sequences as they allow.", panel=Panel.MODELLED
    )

    def __post_init__(self) -> None:
        from expertlane.spec.workload import parse_slos

        parse_slos(self.slo or ())

    def check(self, *needless: str) -> None:
        """Refuse options of a projection without one.

        Args:
            needless: options that mean something without one.

        Raises:
            UserError: one is given.
        """
        unused = [each for each in self.given if each not in needless]
        if self.fit_corrections is not None:
            unused.append("fit-corrections")
        if unused and not self.project:
            raise UserError(f"--{unused[0]} needs a projection; add --project")

    def write_fit(self, results: "Results") -> Sequence[Path]:
        """Fit corrections to measured and projected deployments; return the file, if asked for.

        Raises:
            UserError: nothing was measured that is projected too, or the file cannot be written.
        """
        from expertlane.cli.output import progress_on_stderr
        from expertlane.comparison.corrections import fit_corrections

        if self.fit_corrections is None:
            return ()
        with naming("--fit-corrections"), progress_on_stderr() as progress:
            return (fit_corrections([results], progress).write(self.fit_corrections),)

    @property
    def given(self) -> dict[str, Any]:
        """Options that were given; they take precedence over an experiment's `[projection]`."""
        from expertlane.spec.experiment import Projection

        values = fields_of(Projection, self) | {
            "slo": ",".join(self.slo or ()) or None,
            "corrections": None if self.corrections is None else os.path.abspath(self.corrections),
        }
        return {name: value for name, value in values.items() if value is not None}

    def applied_to(self, experiment: "Experiment", dtype: str | None) -> "Projection":
        """The experiment's `[projection]`, or the default, changed by the options given."""
        from expertlane.spec.experiment import Projection

        given = self.given | ({} if dtype is None else {"dtype": dtype})
        if (own := experiment.projection) is None:
            cluster = f"{DEFAULT_PROFILE}x{experiment.num_ranks}"
            own = Projection(cluster=cluster, skew=experiment.model.usual_skew)
        if "skew" in given:
            given["routing_trace"] = None
        if given:
            given["num_running"] = {}
        return replace(own, **given)
