"""Results of an experiment that was projected and not measured."""

import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime

from expertlane import __version__
from expertlane.results.projection import Projection
from expertlane.results.schema import Results, Versions
from expertlane.spec.experiment import Experiment
from expertlane.spec.files import strict_json


def projected_results(experiment: Experiment, projection: Projection, command: str) -> Results:
    """The projection alone.

    Args:
        command: how a user repeats it.
    """
    return Results(
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=Versions(__version__, platform.python_version(), "not used"),
        machine=None,
        experiment=json.loads(strict_json(asdict(experiment))),  # lists, as they are read back
        assumptions=(),
        deployments=(),
        hidden_communication=(),
        scaling=(),
        projection=projection,
    )
