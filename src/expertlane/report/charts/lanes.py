"""A timeline as SVG that is as wide as its place: time is stretched, rows are not."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import floor, log10

from markupsafe import Markup, escape

from expertlane.report.document import Lanes, Stretch

UNITS = 8192  # along the time axis: a pixel each where it is drawn largest
_LANE, _GAP = 8, 4  # of a row's height
_LANE_PX = 7
_NUM_TICKS, _FINER = 5, 4  # the finer ones are seen where the axis is stretched
_US_PER_MS = 1e3


@dataclass(frozen=True)
class Tick:
    """A label under the time axis, `at` from 0 to 1."""

    at: float
    label: str
    is_fine: bool


def lanes_svg(lanes: Lanes, colours: Mapping[str, str]) -> Markup:
    """The `svg` element; one path for all stretches of a kind, to keep thousands small.

    Args:
        colours: a variable of the page's style sheet, by kind.
    """
    box = f"0 0 {UNITS} {len(lanes.rows) * _row(lanes)}"
    height_px = round(len(lanes.rows) * _row(lanes) * _LANE_PX / _LANE)
    paths = "".join(
        f'<path stroke="var({escape(colours[kind])})" d="{_path(lanes, stretches)}">'
        f"<title>{escape(kind)}</title></path>"
        for kind, stretches in lanes.stretches.items()
    )
    return Markup(
        f'<svg viewBox="{box}" preserveAspectRatio="none" fill="none" height="{height_px}" '
        f'stroke-width="{_LANE}" data-rows="{escape(" ".join(lanes.rows))}" '
        f'data-until-ms="{lanes.until_us / _US_PER_MS:g}">{paths}</svg>'
    )


def ticks(lanes: Lanes) -> list[Tick]:
    """Round numbers of milliseconds along the axis."""
    until_ms = lanes.until_us / _US_PER_MS
    step_ms = _round_step(until_ms / _NUM_TICKS)
    num = floor(until_ms / step_ms * _FINER + 1e-9)
    return [
        Tick(at, f"{at * until_ms:.6g}", place % _FINER != 0)
        for place in range(num + 1)
        if (at := place * step_ms / _FINER / until_ms) <= 1
    ]


def _row(lanes: Lanes) -> int:
    return _LANE * lanes.num_lanes + _GAP


def _round_step(least: float) -> float:
    """The next of 1, 2, 4, 10, 20, 40 …; their quarters are round too."""
    whole = 10.0 ** floor(log10(least))
    return next(whole * each for each in (1, 2, 4, 10) if whole * each >= least)


def _path(lanes: Lanes, stretches: Iterable[Stretch]) -> str:
    """A path of lines as thick as a lane; gaps under a pixel are closed."""
    by_lane: dict[tuple[int, int], list[list[int]]] = {}
    for each in sorted(stretches, key=lambda each: each.begin_us):
        begin = round(each.begin_us / lanes.until_us * UNITS)
        end = max(begin + 1, round((each.begin_us + each.duration_us) / lanes.until_us * UNITS))
        drawn = by_lane.setdefault((each.row, each.lane), [])
        if drawn and begin <= drawn[-1][1] + 1:
            drawn[-1][1] = max(drawn[-1][1], end)
        else:
            drawn.append([begin, end])
    return "".join(
        f"M{begin} {row * _row(lanes) + lane * _LANE + (_LANE + _GAP) // 2}h{end - begin}"
        for (row, lane), drawn in sorted(by_lane.items())
        for begin, end in drawn
    )
