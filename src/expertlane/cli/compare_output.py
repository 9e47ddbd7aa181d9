"""What `expertlane compare` prints and writes, with a projection beside it if asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from expertlane.cli.publish import publish
from expertlane.errors import UserError
from expertlane.spec.ranges import take_option

if TYPE_CHECKING:
    from expertlane.compare.projection import ExperimentProjector
    from expertlane.results.results import Results
    from expertlane.results.step_record import StepRecord
    from expertlane.spec.experiment import Experiment

DEFAULT_PROFILE = "h100"
DEFAULT_SKEW = 1.0


class ResultPrinter:
    """Prints and writes what was found, with a projection beside it if asked for.

    Args:
        projections: by the folder of results.

    Attributes:
        num_published: comparisons so far.
    """

    def __init__(
        self, projections: "Mapping[Path, Results]", *, as_json: bool, traffic: bool
    ) -> None:
        self._projections = projections
        self._as_json = as_json
        self._traffic = traffic
        self.num_published = 0

    def publish(
        self,
        results: "Results",
        folder: Path,
        traces: "Mapping[str, Sequence[StepRecord]]",
    ) -> None:
        """What was measured."""
        from expertlane.results.chrome_trace import trace_names, write_trace

        if folder in self._projections:
            results = results.beside(self._projections[folder])
        if self._traffic:
            results = results.with_traffic()
        self.num_published += 1
        names = trace_names(traces)

        def write_traces() -> list[Path]:
            return [write_trace(folder / names[each], steps) for each, steps in traces.items()]

        publish(results, folder, as_json=self._as_json, also=write_traces)

    def publish_projection(self, folder: Path, reason: str) -> None:
        """A projection alone, and why nothing was measured."""
        from expertlane.cli.output import print_message

        print_message(f"expertlane: nothing is measured here: {reason}")
        results = replace(self._projections[folder], not_measured=reason)
        publish(results, folder, as_json=self._as_json)


def projectors_of(
    comparisons: "list[tuple[Experiment, Path]]",
    project: bool,
    cluster: str | None,
    skew: float,
    dtype: str | None,
) -> "dict[Path, ExperimentProjector]":
    """One for each experiment, by its folder; none if no projection was asked for.

    Raises:
        UserError: an option of projections without one, an unknown cluster, or one with too few
            devices.
    """
    if not project:
        if cluster is not None or skew != DEFAULT_SKEW:
            option = "--skew" if cluster is None else "--cluster"
            raise UserError(f"{option} is of a projection; add --project")
        return {}
    take_option("--skew", skew)
    from expertlane.compare.projection import ExperimentProjector, usual_number_type
    from expertlane.cost.laws.profile_file import parse_cluster

    found = {}
    for experiment, folder in comparisons:
        name = f"{DEFAULT_PROFILE}x{experiment.num_ranks}" if cluster is None else cluster
        modelled = parse_cluster(name)
        number_type = dtype or usual_number_type(modelled)
        found[folder] = ExperimentProjector(experiment, modelled, number_type, skew)
    return found


def projections_of(projectors: "Mapping[Path, ExperimentProjector]") -> "dict[Path, Results]":
    """All of them, before anything is measured: what fails does so early."""
    from expertlane.cli.output import command_line, progress_on_stderr

    projections = {}
    for folder, projector in projectors.items():
        with progress_on_stderr() as progress:
            projections[folder] = projector.run(progress, command_line())
    return projections
