"""Plots in rows: name and value in words, and a bar under them.

Names stand over the bars, not beside them, so that a row is legible on a phone as well.
"""

from collections.abc import Sequence

from expertlane.report.charts.encoding import NARROW, NARROW_PX, Spec, quantity

ROW_PX, BAR_PX = 32, 12
_LINE_PX = 14  # of words
_DOWN_PX = 5  # from the middle of a row to that of its bar
_LEAST_PX = 30  # of a bar with words in it
_CHARACTER_PX, _GAP_PX = 7.0, 8  # of the words on the right, and before them
_NARROWER = 0.85  # the font that names are measured in, against the widest of readers


def rows_spec(values: Sequence[Spec], layers: Sequence[Spec], num_rows: int) -> Spec:
    """Bars in rows.

    Args:
        values: each with `row`, its name; the first value of a row has the words on the right as
            `said`.
        layers: marks, each with `y` as `in_row` gives it.
    """
    words: Spec = {"baseline": "top", "fontSize": 12, "yOffset": 1}
    named = {"y": _row(bandPosition=0.0)}
    is_first = [{"filter": "isValid(datum.said)"}]
    firsts = [each for each in values if "said" in each]
    said_px = _GAP_PX + _CHARACTER_PX * max(len(each["said"]) for each in firsts)
    named_px = _CHARACTER_PX * max(len(each["row"]) for each in firsts)
    room = f"{_NARROWER} * (width - (said_down ? 0 : {said_px}))"
    left = words | {"type": "text", "align": "left", "limit": {"expr": room}}
    right = words | {"type": "text", "align": "right", "color": "--ink"}
    right["yOffset"] = {"expr": "1 + said_down"}
    # On a phone names that are too long for one line with what is said have that below them.
    down_px = _LINE_PX if named_px + said_px > NARROW_PX else 0
    return {
        "data": {"values": list(values)},
        "params": [{"name": "said_down", "value": 0}],
        "height": ROW_PX * num_rows,
        NARROW: {
            "params": [{"name": "said_down", "value": down_px}],
            "height": (ROW_PX + down_px) * num_rows,
        },
        "layer": [
            *layers,
            {
                "transform": is_first,
                "mark": left | {"color": "--ink"},
                "encoding": named | {"x": {"value": 0}, "text": {"field": "row"}},
            },
            {
                "transform": is_first,
                "mark": right,
                "encoding": named | {"x": {"value": "width"}, "text": {"field": "said"}},
            },
        ],
    }


def down(px: float) -> Spec:
    """Offset below the middle of a row, larger where the words before a bar have two lines."""
    return {"expr": f"{px} + said_down / 2"}


def in_row() -> Spec:
    """Encoding of a value's row."""
    return {"y": _row()}


def bar(**looks: object) -> Spec:
    """A mark at a row's bar."""
    return {"type": "bar", "height": BAR_PX, "yOffset": down(_DOWN_PX), **looks}


def inside(text: str, middle: str, size: str, most: float, colours: Spec) -> Spec:
    """A layer of words within bars, where these have the room.

    Args:
        text, middle, size: fields: the words, the middle of their bar, and its length.
        most: end of the axis.
        colours: encoding of the words' colour.
    """
    # Of a scale of its own: layers share that of `color`, and words would be as their bars.
    place = {"x": along(middle, None, most), "fill": colours}
    return {
        "transform": [{"filter": f"datum[{size!r}] * width / {most} > {_LEAST_PX}"}],
        "mark": {"type": "text", "yOffset": down(_DOWN_PX), "fontSize": 10.5},
        "encoding": in_row() | place | {"text": {"field": text}},
    }


def rule(**looks: object) -> Spec:
    """A line across a row's bar."""
    return {"type": "rule", "yOffset": down(_DOWN_PX), **looks}


def point(**looks: object) -> Spec:
    """A mark in the middle of a row's bar."""
    return {"type": "point", "filled": True, "opacity": 1, "yOffset": down(_DOWN_PX), **looks}


def along(field: str, title: str | None, most: float, least: float = 0.0) -> Spec:
    """A value on the axis that all rows share, without labels, as values are written out."""
    axis = {"labels": False, "grid": False, "domain": False, "ticks": False, "titlePadding": 2}
    return quantity(field, title, axis, domain=[least, most], nice=False)


def _row(**more: object) -> Spec:
    return {
        "field": "row",
        "type": "nominal",
        "sort": None,
        "axis": None,
        "scale": {"paddingInner": 0, "paddingOuter": 0},
        **more,
    }
