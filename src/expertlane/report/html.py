"""A report as one page that opens anywhere, offline: `report.html`."""

import contextlib
import hashlib
from datetime import datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any, get_args

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from expertlane import __version__
from expertlane.errors import UserError
from expertlane.report.document import (
    Chart,
    Figure,
    Multiples,
    Place,
    Plot,
    Report,
    Table,
    Tabs,
    Timelines,
    Words,
)
from expertlane.spec.files import strict_json, user_cache, write_text


def render(report: Report) -> str:
    """The whole page, its style sheet, script, plotting library and data in it."""
    charts = _Charts()
    places = get_args(Place)
    shown: dict[Place, list[dict[str, Any]]] = {place: [] for place in places}
    in_order = [section for place in places for section in report.of_place(place)]
    for number, section in enumerate(in_order, 1):
        parts = [_part(part, charts) for part in section.parts if part != report.answer.headline]
        shown[section.place].append(
            {"id": f"section-{number}", "heading": section.heading, "parts": parts}
        )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("template.html.j2")).render(
        report=report,
        created=datetime.fromisoformat(report.created).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        sections=shown["first"] + shown["top"] + shown["plots"],
        rest=shown["tables"],
        css=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        library=Markup(_library()),
        charts=Markup(charts.json()),
    )


class _Charts:
    """All plots of a page, each under an id."""

    def __init__(self) -> None:
        self._charts: dict[str, dict[str, Any]] = {}

    def add(self, chart: Chart, **more: Any) -> dict[str, Any]:
        """What the template needs of it."""
        name = f"chart-{len(self._charts) + 1}"
        self._charts[name] = {"title": chart.title, "spec": chart.spec, "data": chart.data}
        return vars(chart) | {"id": name, "is_timeline": chart.data is not None} | more

    def json(self) -> str:
        """For the script; nothing in it ends an element of the page."""
        text = strict_json(self._charts, ensure_ascii=False, separators=(",", ":"))
        return text.replace("<", "\\u003c")


def _part(part: Words | Plot, charts: _Charts) -> dict[str, Any]:
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
        case Multiples():
            each = [charts.add(chart) for chart in part.charts]
            return {"kind": "multiples", "group": part, "charts": each}
        case Timelines():
            steps = [
                charts.add(chart, name=name, is_open=name in part.open)
                for name, chart in part.charts
            ]
            name = f"time-{steps[0]['id']}"
            return {"kind": "timelines", "id": name, "title": part.title, "charts": steps}


def _asset(name: str) -> str:
    return files("expertlane.report").joinpath("assets", name).read_text(encoding="utf-8")


_SNIPPET = "window.vegaEmbed = vegaEmbed;"


@cache
def _library() -> str:
    """Vega-Lite and what it needs; over a second to put together, and the same for all pages."""
    key = hashlib.blake2b(f"{_SNIPPET} {version('vl-convert-python')}".encode(), digest_size=12)
    name = f"vega-{key.hexdigest()}.js"
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        return (user_cache() / name).read_text(encoding="utf-8")
    import vl_convert  # a large library that nothing else needs

    bundle: str = vl_convert.javascript_bundle(_SNIPPET)
    bundle = bundle.replace("</script", "<\\/script")
    with contextlib.suppress(UserError, RuntimeError):  # then the next page takes as long
        write_text(user_cache() / name, bundle)
    return bundle
