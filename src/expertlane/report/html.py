"""A report as one page that opens anywhere, offline and without scripts: `report.html`."""

from datetime import datetime
from importlib.resources import files
from itertools import count
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from expertlane import __version__
from expertlane.report.charts.colours import style_sheet
from expertlane.report.charts.svg import NARROW_PX, SMALL_PX, WIDE_PX, svg
from expertlane.report.charts.timeline import lanes_svg, ticks
from expertlane.report.document import (
    Chapter,
    Chart,
    Commands,
    Figure,
    Lanes,
    Multiples,
    Plot,
    Report,
    Table,
    Timelines,
    Words,
)

_WHOLE = Chapter("answer", "The answer", "")  # of a report without chapters


def render(report: Report) -> str:
    """The whole page, its style sheet, drawings and script in it."""
    drawn, (headline, lead) = _PageParts(), _parted(report.answer.headline)
    first, *chapters = [drawn.chapter(report, each) for each in report.chapters or (_WHOLE,)]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("template.html.j2")).render(
        report=report,
        headline=headline,
        lead=lead,
        created=datetime.fromisoformat(report.created).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        answer=first | {"beside": list(map(drawn.part, _beside(report)))},
        chapters=chapters,
        is_sentence=lambda part: part["kind"] == "words" and not part["words"].endswith(":"),
        css=Markup(style_sheet() + _asset("page.css")),
        script=Markup(_asset("page.js")),
    )


def _parted(headline: str) -> tuple[str, str]:
    """A headline's first sentence, and the rest."""
    first, end, rest = headline.partition(". ")
    return (f"{first}.", rest) if end else (headline, "")


def _beside(report: Report) -> list[Words | Plot]:
    """Parts beside the verdict: plots, and the answer's tables if there is at most one plot."""
    plots: list[Words | Plot] = [
        part
        for section in report.of_place("first")
        for part in section.parts
        if not isinstance(part, Commands)
    ]
    tables: list[Words | Plot] = [each for each in report.answer.parts if isinstance(each, Table)]
    return plots if len(plots) > 1 else [*plots, *tables]


class _PageParts:
    """Template values of each part; every plot and section has an id of its own."""

    def __init__(self) -> None:
        self._sections, self._charts = count(1), count(1)

    def chapter(self, report: Report, chapter: Chapter) -> dict[str, Any]:
        """Template values of a chapter, without sentences that the page begins with."""
        said = f"{report.answer.setting}\n{report.answer.headline}"
        sections = []
        for each in report.sections:
            is_elsewhere = report.chapters and each.chapter != chapter.name
            if is_elsewhere or each.place == "first":
                continue
            parts = [part for part in each.parts if not (isinstance(part, str) and part in said)]
            if not parts:
                continue
            if chapter.is_box:
                parts.sort(key=lambda part: not isinstance(part, Commands))
            name = f"section-{next(self._sections)}"
            shown = {"id": name, "heading": each.heading, "parts": list(map(self.part, parts))}
            sections.append(shown)
        return vars(chapter) | {"sections": sections}

    def part(self, part: Words | Commands | Plot) -> dict[str, Any]:
        """Template values of a part, with the kind that the template branches on."""
        match part:
            case str():
                return {"kind": "words", "words": part}
            case Table():
                return {"kind": "table", "table": part}
            case Figure():
                return {"kind": "figure", "figure": part}
            case Commands():
                parts = list(map(self.part, part.parts))
                return {"kind": "commands", "title": part.title, "parts": parts}
            case Chart():
                return {"kind": "chart", "chart": self._chart(part)}
            case Multiples():
                small = [self._chart(chart, is_small=True) for chart in part.charts]
                return {"kind": "multiples", "group": part, "charts": small}
            case Timelines():
                steps = [
                    self._chart(chart, name=name, is_open=name in part.open)
                    for name, chart in part.charts
                ]
                return {"kind": "timelines", "title": part.title, "charts": steps}

    def _chart(self, chart: Chart, *, is_small: bool = False, **more: Any) -> dict[str, Any]:
        name = f"chart-{next(self._charts)}"
        drawn: dict[str, Any]
        if isinstance(chart.spec, Lanes):
            colours = {each.label: each.colour for each in chart.legend}
            drawn = {"lanes": chart.spec, "svg": lanes_svg(chart.spec, colours)}
            drawn["ticks"] = ticks(chart.spec)
        elif is_small:
            drawn = {"wide": svg(chart.spec, name, SMALL_PX), "narrow": None, "lanes": None}
        else:
            wide, narrow = f"{name}-wide", f"{name}-narrow"
            drawn = {"wide": svg(chart.spec, wide, WIDE_PX), "lanes": None}
            drawn["narrow"] = svg(chart.spec, narrow, NARROW_PX)
        return vars(chart) | {"id": name} | drawn | more


def _asset(name: str) -> str:
    return files("expertlane.report").joinpath("assets", name).read_text(encoding="utf-8")
