"""What the sections of a projection share: numbered rows, and how projected values are written."""

from collections.abc import Sequence

from expertlane.report.numbers import figures, milliseconds
from expertlane.results.projection import (
    Estimate,
    ProjectedDeployment,
    Projection,
    StepProjection,
)

BEYOND = "*"  # of a step whose sequences do not all fit


def numbers(projection: Projection) -> dict[str, int]:
    """By name of a deployment, its place in all tables, from 1."""
    names = dict.fromkeys(row.name for row in projection.deployments)
    return {name: number for number, name in enumerate(names, start=1)}


def at_context(projection: Projection, row: ProjectedDeployment) -> StepProjection:
    """The decode step of all sequences at the context that is spoken of."""
    return decode_step(projection, row, projection.context)


def decode_step(projection: Projection, row: ProjectedDeployment, context: int) -> StepProjection:
    """That of all sequences.

    Raises:
        ValueError: there is none at this context.
    """
    step = row.decode_of(context, projection.num_sequences)
    if step is None:
        raise ValueError(f"{row.name} has no step at {context}")
    return step


def fastest(projection: Projection, rows: Sequence[ProjectedDeployment]) -> ProjectedDeployment:
    """The most tokens a second at the context that is spoken of."""
    return max(rows, key=lambda row: at_context(projection, row).tps.value)


def baselines(rows: Sequence[ProjectedDeployment]) -> list[ProjectedDeployment]:
    """Those it is compared against; the first row where none is marked."""
    return [row for row in rows if row.is_baseline] or [rows[0]]


def proposals(rows: Sequence[ProjectedDeployment]) -> list[ProjectedDeployment]:
    """The others."""
    return [row for row in rows if not row.is_baseline]


def tpot(step: StepProjection) -> str:
    """Milliseconds; marked where the sequences do not fit."""
    return milliseconds(step.step_s.value) + ("" if step.fits else BEYOND)


def tps(step: StepProjection) -> str:
    """Tokens a second; marked where the sequences do not fit."""
    return figures(step.tps.value) + ("" if step.fits else BEYOND)


def bounds(estimate: Estimate, scale: float = 1.0) -> str:
    """`4.79–8.87`."""
    return f"{figures(scale * estimate.low)}–{figures(scale * estimate.high)}"


def conditions_in_words(conditions: tuple[int, str, str]) -> str:
    """`top-2, graph, balanced`."""
    top_k, execution, routing = conditions
    return f"top-{top_k}, {execution}, {routing}"
