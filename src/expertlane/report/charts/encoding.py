"""Pieces of Vega-Lite that several plots share; shapes as its reference describes them."""

from collections.abc import Sequence
from typing import Any

Spec = dict[str, Any]

AXIS: Spec = {"format": "~s", "labelOverlap": True}  # `10k`, and no label over another


def nominal(field: str, title: str | None = None) -> Spec:
    """A category, in the order in which it comes."""
    return {"field": field, "type": "nominal", "sort": None, "title": title}


def quantity(field: str, title: str | None, **scale: Any) -> Spec:
    """A number on an axis."""
    return {"field": field, "type": "quantitative", "title": title} | (
        {"scale": scale} if scale else {}
    )


def colour(field: str, names: Sequence[str], colours: Sequence[str]) -> Spec:
    """A colour for each name; the legend is the page's own."""
    scale = {"domain": list(names), "range": list(colours)}
    return {"field": field, "type": "nominal", "scale": scale, "legend": None}


def tooltip(**titles: str) -> list[Spec]:
    """What hovering shows: fields under their titles."""
    return [{"field": field, "title": title} for field, title in titles.items()]
