"""Pieces of Vega-Lite that several plots share; shapes as its reference describes them."""

from collections.abc import Iterable, Mapping
from typing import Any

from expertlane.report.charts.colours import REPORTED_SHAPE
from expertlane.report.document import Column, Legend

Spec = dict[str, Any]

NARROW, NARROW_PX = "narrow", 330  # what of a plot is otherwise up to that width

AXIS: Spec = {"format": "~s", "labelOverlap": True}  # `10k`, and no label over another

# Marks that the library has no name for, in a square from -1 to 1.
PATHS = {
    REPORTED_SHAPE: "M0,-1L0.26,-0.33L0.97,-0.3L0.42,0.13L0.6,0.82L0,0.43L-0.6,0.82L-0.42,0.13"
    "L-0.97,-0.3L-0.26,-0.33Z"
}


def nominal(field: str, title: str | None = None) -> Spec:
    """A category, in the order in which it comes."""
    return {"field": field, "type": "nominal", "sort": None, "title": title}


def quantity(field: str, title: str | None, axis: Spec | None = None, **scale: Any) -> Spec:
    """A number on an axis."""
    more = {"scale": scale, "axis": axis}
    return {"field": field, "type": "quantitative", "title": title} | {
        name: value for name, value in more.items() if value
    }


def colour(field: str, legend: Iterable[Legend]) -> Spec:
    """A colour for each name; the legend is the page's own."""
    return {"type": "nominal"} | by_name(field, {each.label: each.colour for each in legend})


def by_name(field: str, looks: Mapping[str, Any]) -> Spec:
    """A look for each name, without a legend."""
    scale = {"domain": list(looks), "range": list(looks.values())}
    return {"field": field, "scale": scale, "legend": None}


def cells(columns: Mapping[str, Column[Any]], item: Any) -> Spec:
    """The fields of a drawn value that its table has as columns."""
    return {field: column.cell(item) for field, column in columns.items()}


def tooltip(**titles: str) -> list[Spec]:
    """What hovering shows: fields under their titles."""
    return [{"field": field, "title": title} for field, title in titles.items()]


def tooltip_of(columns: Mapping[str, Column[Any]]) -> list[Spec]:
    """What hovering shows, where it is what the table has."""
    return tooltip(**{field: column.heading for field, column in columns.items()})
