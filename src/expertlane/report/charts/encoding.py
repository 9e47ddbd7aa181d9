"""Vega-Lite encodings that several plots share."""

from collections.abc import Iterable, Mapping
from typing import Any

from expertlane.report.charts.colours import REPORTED_SHAPE
from expertlane.report.document import Column, Legend

Spec = dict[str, Any]

NARROW, NARROW_PX = "narrow", 330  # key of what differs in a spec up to this width

AXIS: Spec = {"format": "~s", "labelOverlap": True}  # `10k`, and no label over another

# Marks that the library has no name for, in a square from -1 to 1.
PATHS = {
    REPORTED_SHAPE: "M0,-1L0.26,-0.33L0.97,-0.3L0.42,0.13L0.6,0.82L0,0.43L-0.6,0.82L-0.42,0.13"
    "L-0.97,-0.3L-0.26,-0.33Z"
}


def nominal(field: str, title: str | None = None) -> Spec:
    """Encoding of a category, in the order of the data."""
    return {"field": field, "type": "nominal", "sort": None, "title": title}


def quantity(field: str, title: str | None, axis: Spec | None = None, **scale: Any) -> Spec:
    """Encoding of a number on an axis."""
    more = {"scale": scale, "axis": axis}
    return {"field": field, "type": "quantitative", "title": title} | {
        name: value for name, value in more.items() if value
    }


def colour(field: str, legend: Iterable[Legend]) -> Spec:
    """Encoding of a colour for each name; the legend is the page's own."""
    return {"type": "nominal"} | by_name(field, {each.label: each.colour for each in legend})


def by_name(field: str, looks: Mapping[str, Any]) -> Spec:
    """Encoding of a look for each name, without a legend."""
    scale = {"domain": list(looks), "range": list(looks.values())}
    return {"field": field, "scale": scale, "legend": None}


def cells(columns: Mapping[str, Column[Any]], item: Any) -> Spec:
    """Vega fields of an item, from the columns of its table."""
    return {field: column.cell(item) for field, column in columns.items()}


def tooltip(**titles: str) -> list[Spec]:
    """Encoding of a tooltip: fields under their titles."""
    return [{"field": field, "title": title} for field, title in titles.items()]


def tooltip_of(columns: Mapping[str, Column[Any]]) -> list[Spec]:
    """The tooltip that has all columns of a table."""
    return tooltip(**{field: column.heading for field, column in columns.items()})
