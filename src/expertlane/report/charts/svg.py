"""Plots as inline SVG, with the page's colour variables."""

import re
import resource
from collections.abc import Iterable
from html import escape
from typing import Any
from xml.etree.ElementTree import Element, fromstring

from markupsafe import Markup

from expertlane.printable import printable
from expertlane.report.charts.encoding import NARROW, NARROW_PX, Spec

WIDE_PX, SMALL_PX = 560, 220  # the page shows the one that fits; NARROW_PX on a phone
_FONT_PX, _NARROW_FONT_PX = 12, 11
_ADDRESS_SPACE = 96 << 30  # 40 GiB were too little, 80 enough
_NOT_DRAWN = "Not drawn: this needs 96 GiB of address space, and ulimit -v allows less."
_MOST_NAMED = 160  # marks with a title of their own; of more they would be half of the page
_TIP = "tip"
_RECT = "rect mark"
_KEPT = {
    "clipPath": {"id"},
    "defs": set(),
    "g": {"clip-path", "fill", "opacity", "transform"},
    "line": {"x2", "y2"},
    "linearGradient": {"id", "x1", "x2", "y1", "y2"},
    "path": {"d"},
    "stop": {"offset", "stop-color"},
    "text": {"font-size", "font-style", "font-weight", "text-anchor"},
}
_LOOKS = {
    *("clip-path", "fill", "fill-opacity", "opacity", "stroke", "stroke-dasharray"),
    *("stroke-opacity", "stroke-width", "transform"),
}
_PLACES = {"d", "transform", "x2", "y2"}
_DEFAULTS = {
    *(("opacity", "1"), ("stroke-width", "1"), ("text-anchor", "start")),
    *(("transform", "translate(0,0)"), ("stroke-dasharray", "1,0")),
}
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
    drawn = vl_convert.vegalite_to_svg(shown, config=_config(width_px), allowed_base_urls=[])
    return _Writer(fromstring(drawn), name).whole()


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


class _Writer:
    """Writes a drawing anew from its known elements, so that names stay words."""

    def __init__(self, root: Element, name: str) -> None:
        self._root, self._name = root, name
        self._font_px = _most(each.get("font-size", "") for each in root.iter())
        tips = [each for each in root.iter() if _tip(each)]
        self._has_titles = len(tips) <= _MOST_NAMED

    def whole(self) -> Markup:
        """The `svg` element."""
        box = escape(self._root.attrib["viewBox"])
        size = f' font-size="{escape(self._font_px)}"' if self._font_px else ""
        return Markup(f'<svg viewBox="{box}"{size}>{self._inside(self._root)}</svg>')

    def _inside(self, element: Element) -> str:
        """The markup of its parts; marks that look alike and have no title are one path."""
        written: list[str] = []
        paths: dict[tuple[str, str], list[str]] = {}
        for each in element:
            look = self._attributes(each, without="d")
            if each.get("aria-roledescription") == _RECT and not self._has_titles:
                paths.setdefault(("path", look), []).append(_rounded(each.get("d", "")))
            else:
                written.append(self._one(each))
        merged = [f'<path{look} d="{escape("".join(d))}"/>' for (_, look), d in paths.items()]
        return "".join([*merged, *written])

    def _one(self, element: Element) -> str:
        tag = element.tag.rpartition("}")[2]
        if tag not in _KEPT or element.get("display") == "none":
            return ""
        if tag == "path" and (not element.get("d") or _is_frame(element)):
            return ""
        attributes, inside = self._attributes(element), self._inside(element)
        if tag == "g" and not (attributes and inside):
            return inside
        words = escape(element.text or "", quote=False) if tag == "text" else ""
        tip = _tip(element)
        if tip and self._has_titles:
            inside += f"<title>{escape(tip, quote=False)}</title>"
        return f"<{tag}{attributes}>{words}{inside}</{tag}>"

    def _attributes(self, element: Element, without: str = "") -> str:
        tag = element.tag.rpartition("}")[2]
        written = ""
        for key, value in element.attrib.items():
            is_kept = key in _KEPT.get(tag, ()) or key in _LOOKS
            if not is_kept or key == without or (key, value) in _DEFAULTS:
                continue
            if key == "font-size" and value == self._font_px:
                continue
            if key == "id":
                value = f"{self._name}-{value}"
            elif key in _PLACES:
                value = _rounded(value)
            value = _REFERENCE.sub(rf"url(#{self._name}-\1)", value)
            written += f' {key}="{escape(value)}"'
        if element.get("aria-roledescription") == _RECT:  # no seam between two that touch
            written += ' shape-rendering="crispEdges"'
        return written


def _most(values: Iterable[str]) -> str:
    counted = [each for each in values if each]
    return max(counted, key=counted.count, default="")


def _tip(element: Element) -> str:
    """The tooltip of a mark; empty for axes and legends, whose descriptions nobody needs."""
    has_role = element.get("role") == "graphics-symbol"
    is_mark = has_role and element.get("aria-roledescription") not in ("axis", "legend", "title")
    return element.get("aria-label", "") if is_mark else ""


def _is_frame(element: Element) -> bool:
    """True for the colourless box that the library puts around a group."""
    is_frame = element.get("class") in ("background", "foreground")
    return is_frame and not {"fill", "stroke"} & element.attrib.keys()


def _rounded(text: str) -> str:
    """The text with its numbers rounded to a tenth of a pixel."""
    return _NUMBER.sub(lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), text)
