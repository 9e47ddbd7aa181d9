"""Plots as inline SVG, with the page's colour variables."""

import re
import resource
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any
from xml.etree.ElementTree import Element, fromstring

from markupsafe import Markup

from expertlane.printable import printable
from expertlane.report.charts.colours import REPORTED_SHAPE
from expertlane.report.document import Column, Legend

Spec = dict[str, Any]

NARROW, NARROW_PX = "narrow", 330  # key of what differs in a spec up to this width

AXIS: Spec = {"format": "~s", "labelOverlap": True}  # `10k`, and no label over another

LIMIT: Spec = {"type": "rule", "strokeDash": [5, 4], "color": "--ink"}  # mark of a limit

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


def span(axis: Callable[[str], Spec], begin: str, end: str, side: str = "x") -> Spec:
    """Encoding of a mark from one field to another along a side."""
    return {side: axis(begin), f"{side}2": {"field": end}}


def layer(
    mark: Spec, *encodings: Spec, where: str | Spec = "", data: Sequence[Spec] | None = None
) -> Spec:
    """A layer of a plot.

    Args:
        encodings: what the mark's places and looks come from, joined.
        where: Vega's test of the values that are drawn; empty for all.
        data: values of its own.
    """
    made: Spec = {"mark": mark, "encoding": dict(ChainMap(*reversed(encodings)))}
    if where:
        made["transform"] = [{"filter": where}]
    return made if data is None else made | {"data": {"values": list(data)}}


def cells(columns: Mapping[str, Column[Any]], item: Any) -> Spec:
    """Vega fields of an item, from the columns of its table."""
    return {field: column.cell(item) for field, column in columns.items()}


def tooltip(**titles: str) -> list[Spec]:
    """Encoding of a tooltip: fields under their titles."""
    return [{"field": field, "title": title} for field, title in titles.items()]


def tooltip_of(columns: Mapping[str, Column[Any]]) -> list[Spec]:
    """The tooltip that has all columns of a table."""
    return tooltip(**{field: column.heading for field, column in columns.items()})


WIDE_PX, SMALL_PX = 560, 220  # the page shows the one that fits; NARROW_PX on a phone
_FONT_PX, _NARROW_FONT_PX = 12, 11
_ADDRESS_SPACE = 96 << 30  # 40 GiB were too little, 80 enough
_NOT_DRAWN = "Not drawn: this needs 96 GiB of address space, and ulimit -v allows less."
_MOST_NAMED = 160  # marks with a title of their own; of more they would be half of the page
_TIP = "tip"
# What is kept of a drawing: shapes, words and looks, nothing that could load or run.
_TAGS = {"clipPath", "defs", "g", "line", "linearGradient", "path", "stop", "text"}
_KEPT = {
    *("clip-path", "d", "fill", "fill-opacity", "font-size", "font-style", "font-weight", "id"),
    *("offset", "opacity", "stop-color", "stroke", "stroke-dasharray", "stroke-opacity"),
    *("stroke-width", "text-anchor", "transform", "x1", "x2", "y1", "y2"),
}
_PLACES = ("d", "transform", "x2", "y2")
_VARIABLE = re.compile(r"--[a-z][a-z0-9-]*")
_NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?|-?\d+e[-+]?\d+")
_REFERENCE = re.compile(r"url\(#([\w-]+)\)")


def svg(spec: Spec, name: str, width_px: int) -> Markup:
    """The SVG of a plot at a width: marks and escaped words, nothing else.

    Args:
        name: prefix of every id in it.
    """
    if not _can_draw():
        return Markup("<p>{}</p>").format(_NOT_DRAWN)
    import vl_convert  # a large library that nothing else needs

    narrow = spec.get(NARROW, {}) if width_px <= NARROW_PX else {}
    spec = {key: each for key, each in spec.items() if key != NARROW} | narrow
    shown = _shown(_described(spec))
    shown |= {"width": width_px, "autosize": {"type": "fit-x", "contains": "padding"}}
    drawn = fromstring(
        vl_convert.vegalite_to_svg(shown, config=_config(width_px), allowed_base_urls=[])
    )
    has_titles = sum(bool(_tip(each)) for each in drawn.iter()) <= _MOST_NAMED
    inside = _inside(drawn, name, has_titles)
    return Markup(f'<svg viewBox="{escape(drawn.attrib["viewBox"])}" fill="none">{inside}</svg>')


def _can_draw() -> bool:
    """True if V8 can start: it aborts the process where it can't reserve address space."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return limit == resource.RLIM_INFINITY or limit >= _ADDRESS_SPACE


def _config(width_px: int) -> Spec:
    font_px = _NARROW_FONT_PX if width_px <= NARROW_PX else _FONT_PX
    ink, muted, line = "var(--ink)", "var(--muted)", "var(--line)"
    words = {
        "labelFontSize": font_px,
        "titleFontSize": font_px,
        "titleFontWeight": 500,
        "labelColor": ink,
        "titleColor": muted,
    }
    limits = {"labelLimit": round(width_px * 0.42), "labelPadding": 5}
    colours = {"domainColor": line, "tickColor": line, "gridColor": line}
    return {
        "background": None,
        "padding": 2,
        "view": {"stroke": None},
        "axis": words | limits | colours,
        "axisX": {"tickCount": max(3, width_px // 110)},
        "text": {"fontSize": font_px, "fill": ink},
        "legend": words | {"orient": "bottom", "gradientLength": min(240, width_px // 2)},
        "scale": {"bandPaddingInner": 0.25},
        "rect": {"discreteBandSize": {"band": 1}},
    }


def _shown(part: Any, *, is_data: bool = False) -> Any:
    """The spec with colours as SVG variables, and unsafe characters of names escaped."""
    match part:
        case str():
            is_colour = not is_data and _VARIABLE.fullmatch(part)
            return f"var({part})" if is_colour else printable(part)
        case list() | tuple():
            return [_shown(each, is_data=is_data) for each in part]
        case dict():
            return {
                key: _shown(each, is_data=is_data or key in ("values", "domain"))
                for key, each in part.items()
            }
    return part


def _described(spec: Spec) -> Spec:
    """The spec with each mark's tooltip as its description, which an SVG without script keeps."""
    made = dict(spec)
    if "layer" in spec:
        made["layer"] = list(map(_described, spec["layer"]))
    encoding = dict(spec.get("encoding", {}))
    if tooltip := encoding.pop("tooltip", None):
        words = "+', '+".join(
            f"{_quoted(each.get('title') or each['field'])}+': '+datum[{_quoted(each['field'])}]"
            for each in tooltip
        )
        made["transform"] = [*spec.get("transform", []), {"calculate": words, "as": _TIP}]
        made["encoding"] = encoding | {"description": {"field": _TIP, "type": "nominal"}}
    return made


def _quoted(text: str) -> str:
    """A string literal in Vega's expressions."""
    return (
        "'" + re.sub(r"[\\'\n\r\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text) + "'"
    )


def _inside(element: Element, name: str, has_titles: bool) -> str:
    """The markup of an element's parts; of many marks those that look alike are one path."""
    written: list[str] = []
    paths: dict[str, str] = {}
    for each in element:
        if _is_square(each) and not has_titles:
            look = _attributes(each, name, without="d")
            paths[look] = paths.get(look, "") + _rounded(each.get("d", ""))
        else:
            written.append(_written(each, name, has_titles))
    return "".join(f'<path{look} d="{escape(d)}"/>' for look, d in paths.items()) + "".join(written)


def _written(element: Element, name: str, has_titles: bool) -> str:
    """An element with what is kept of it."""
    tag = element.tag.rpartition("}")[2]
    is_frame = element.get("class") in ("background", "foreground") and not element.get("stroke")
    if tag not in _TAGS or element.get("display") == "none" or (tag == "path" and is_frame):
        return ""
    attributes, inside = _attributes(element, name), _inside(element, name, has_titles)
    if tag == "g" and not (attributes and inside):
        return inside
    if tag == "text":
        inside += escape(element.text or "", quote=False)
    if has_titles and (tip := _tip(element)):
        inside += f"<title>{escape(tip, quote=False)}</title>"
    return f"<{tag}{attributes}>{inside}</{tag}>"


def _attributes(element: Element, name: str, without: str = "") -> str:
    kept = {
        key: _rounded(value) if key in _PLACES else value
        for key, value in element.items()
        if key in _KEPT
    }
    kept.pop(without, None)
    if "id" in kept:
        kept["id"] = f"{name}-{kept['id']}"
    if _is_square(element):
        kept["shape-rendering"] = "crispEdges"  # no seam between two that touch
    written = (f' {key}="{escape(value)}"' for key, value in kept.items())
    return _REFERENCE.sub(rf"url(#{name}-\1)", "".join(written))


def _is_square(element: Element) -> bool:
    return element.get("aria-roledescription") == "rect mark"


def _tip(element: Element) -> str:
    """The tooltip of a mark; empty for axes and legends, whose descriptions nobody needs."""
    has_role = element.get("role") == "graphics-symbol"
    is_mark = has_role and element.get("aria-roledescription") not in ("axis", "legend", "title")
    return element.get("aria-label", "") if is_mark else ""


def _rounded(text: str) -> str:
    """The text with its numbers rounded to a tenth of a pixel."""
    return _NUMBER.sub(lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), text)
