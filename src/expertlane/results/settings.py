"""What two results were made under: the question, versions, machine and conditions."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from expertlane.results.results import Results

_MISSING = "—"


def different_settings(first: Results, second: Results) -> Iterator[tuple[str, str, str]]:
    """What was not the same beside the deployments: its name, and what each of the two has."""
    here, there = _setting(first), _setting(second)
    for name in [*here, *(each for each in there if each not in here)]:
        values = [each.get(name, _MISSING) for each in (here, there)]
        if values[0] != values[1]:
            yield name, values[0], values[1]


_DEPLOYMENTS = ("experiment.deployments", "experiment.scaling", "experiment.name", "traffic")
_OF_MACHINE = ("cpu_name", "device", "num_cores", "dtype", "kernels", "backend")


def _setting(results: Results) -> dict[str, str]:
    """All that was the same for every deployment, by name."""
    found = {
        name.removeprefix("experiment."): value
        for name, value in _leaves(results.question)
        if not name.startswith(_DEPLOYMENTS)
    }
    found["expertlane"] = results.versions.expertlane
    found["torch"] = results.versions.torch or _MISSING
    if results.machine is not None:
        found |= {f"machine.{each}": str(getattr(results.machine, each)) for each in _OF_MACHINE}
    if results.cluster is not None:
        found["cluster"] = results.cluster.name
    if results.virtual_time is not None:
        found["links"] = results.virtual_time.links or "none"
    conditions = {each.conditions for each in results.select("projected")}
    if len(conditions) == 1 and (only := conditions.pop()) is not None:
        found |= {name: str(value) for name, value in asdict(only).items()}
    return found


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _MISSING if value is None else str(value)
