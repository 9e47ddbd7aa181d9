"""A report as one page that opens anywhere, offline: `report.html`."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from expertlane import __version__
from expertlane.report import kinds
from expertlane.report.document import (
    Chart,
    Figure,
    PageSection,
    Section,
    Table,
    Tabs,
    Timelines,
)
from expertlane.results.file import AnyResults
from expertlane.spec.files import strict_json


def render(results: AnyResults) -> str:
    """The whole page, its style sheet, script, plotting library and data in it."""
    charts = _Charts()
    sections = kinds.sections(results)
    lead = [section for section in sections if section.leads]
    rest = [section for section in sections if not section.leads]
    pages = kinds.page_sections(results)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    named = _numbered((*lead, *pages, *rest))
    headline = kinds.headline(results)
    shown = [_shown(section, name, headline, charts) for section, name in named]
    num_first = len(lead)
    num_charted = num_first + len(pages)
    return environment.from_string(_asset("template.html.j2")).render(
        title=kinds.title(results),
        headline=headline,
        source=kinds.source(results),
        created=_moment(results.created),
        command=results.command,
        version=__version__,
        lead=shown[:num_first],
        sections=shown[num_first:num_charted],
        rest=shown[num_charted:],
        css=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        library=Markup(_library()),
        charts=Markup(charts.json()),
    )


def _moment(created: str) -> str:
    """`2026-11-25 10:32 UTC`."""
    return datetime.fromisoformat(created).strftime("%Y-%m-%d %H:%M UTC")


class _Charts:
    """All plots of a page, each under an id."""

    def __init__(self) -> None:
        self._charts: dict[str, dict[str, Any]] = {}

    def add(self, chart: Chart, **more: Any) -> dict[str, Any]:
        """What the template needs of it."""
        name = f"chart-{len(self._charts) + 1}"
        self._charts[name] = {"title": chart.title, "spec": chart.spec, "data": chart.data}
        return {
            "id": name,
            "title": chart.title,
            "words": chart.words,
            "legend": chart.legend,
            "note": chart.note,
            "table": chart.table,
            "is_timeline": chart.data is not None,
        } | more

    def json(self) -> str:
        """For the script; nothing in it ends an element of the page."""
        text = strict_json(self._charts, ensure_ascii=False, separators=(",", ":"))
        return text.replace("<", "\\u003c")


def _numbered(sections: Sequence[Section | PageSection]) -> Iterator[tuple[Any, str]]:
    """Each with an id to link to."""
    for place, section in enumerate(sections, 1):
        yield section, f"section-{place}"


def _shown(
    section: Section | PageSection, name: str, headline: str, charts: _Charts
) -> dict[str, Any]:
    parts = [_part(part, charts) for part in section.parts if part != headline]
    return {"id": name, "heading": section.heading, "parts": parts}


def _part(part: str | Table | Figure | Chart | Tabs | Timelines, charts: _Charts) -> dict[str, Any]:
    match part:
        case str():
            return {"kind": "words", "words": part}
        case Table():
            return {"kind": "table", "table": part}
        case Figure():
            return {"kind": "figure", "figure": part}
        case Chart():
            return {"kind": "chart", "chart": charts.add(part)}
        case Tabs():
            shown = [charts.add(chart, name=name) for name, chart in part.charts]
            return {"kind": "tabs", "title": part.title, "charts": shown}
        case Timelines():
            steps = [
                charts.add(chart, name=name, is_open=name in part.open)
                for name, chart in part.charts
            ]
            name = f"time-{steps[0]['id']}"
            return {"kind": "timelines", "id": name, "title": part.title, "charts": steps}


def _asset(name: str) -> str:
    return files("expertlane.report").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Vega-Lite and what it needs; over a second to put together, and the same for all pages."""
    import vl_convert  # a large library that nothing else needs

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")
