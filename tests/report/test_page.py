"""report.html without a browser: complete, self-contained, and the same numbers as elsewhere."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import example_pages
import example_results
import example_timelines
from expertlane.report import html, kinds
from expertlane.report.document import Chart, Table, Tabs, Timelines
from expertlane.results.file import AnyResults

KINDS = pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)


class Page(HTMLParser):
    """What a test asks of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.data = ""
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of_tag = dict(attrs)
        for name in ("src", "href"):
            if of_tag.get(name):
                self.links.append(of_tag[name] or "")
        if of_tag.get("id"):
            self.ids.append(of_tag["id"] or "")
        if tag not in ("meta", "link", "circle", "path", "rect"):
            self._open.append((tag, of_tag))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("circle", "path", "rect"):
            opened, _ = self._open.pop()
            assert opened == tag

    def handle_data(self, data: str) -> None:
        tag, of_tag = self._open[-1] if self._open else ("", {})
        if of_tag.get("id") == "charts":
            self.data += data
        elif tag not in ("script", "style"):
            self.words.append(data)


def charts_of(results: AnyResults) -> list[Chart]:
    found: list[Chart] = []
    for section in kinds.page_sections(results):
        for part in section.parts:
            if isinstance(part, Chart):
                found.append(part)
            elif isinstance(part, Tabs | Timelines):
                found += [chart for _, chart in part.charts]
    return found


@KINDS
def test_the_page_is_whole_and_asks_nothing_of_the_network(make):
    page = Page(html.render(make()))
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= {*page.ids}
    assert page.data


@KINDS
def test_everything_of_the_other_reports_is_in_it(make):
    results = make()
    words = " ".join(" ".join(Page(html.render(results)).words).split())
    assert kinds.headline(results) in words
    for section in kinds.sections(results):
        assert section.heading in words
        for part in section.parts:
            if isinstance(part, str):
                assert " ".join(part.split()) in words
            elif isinstance(part, Table):
                for cell in (cell for row in part.rows for cell in row if cell):
                    assert " ".join(cell.split()) in words


@KINDS
def test_every_plot_has_words_and_a_table(make):
    charts = charts_of(make())
    assert charts
    for chart in charts:
        assert chart.words
        assert chart.table.rows
        widths = {len(row) for row in chart.table.rows}
        assert widths == {len(chart.table.columns)}
        assert all(legend.colour.startswith("--") for legend in chart.legend)


@KINDS
def test_what_is_plotted_reaches_the_script(make):
    results = make()
    data = json.loads(Page(html.render(results)).data)
    charts = charts_of(results)
    assert [each["title"] for each in data.values()] == [chart.title for chart in charts]
    for each, chart in zip(data.values(), charts, strict=True):
        assert each["spec"] == json.loads(json.dumps(chart.spec))
        assert (each["data"] is None) == (chart.data is None)


def test_the_colours_of_plots_are_in_the_style_sheet():
    text = html.render(example_pages.both())
    used = set(re.findall(r'"(--[a-z]+)"', Page(text).data))
    assert {"--blue", "--ink"} <= used
    for name in used:
        assert f"{name}: #" in text


def test_measured_and_projected_never_share_a_plot():
    sections = kinds.page_sections(example_pages.both())
    headings = [section.heading for section in sections]
    assert all(("measured" in each) != ("projected" in each) for each in headings)
    for section in sections:
        for part in section.parts:
            for chart in [part] if isinstance(part, Chart) else []:
                names = {legend.label for legend in chart.legend}
                assert "measured" not in names


def test_names_that_look_like_markup_stay_words():
    results = example_results.usual()
    first, *others = results.deployments
    name = '</script><b title="x">&'
    page = Page(html.render(replace(results, deployments=(replace(first, name=name), *others))))
    assert name in "".join(page.words)


def test_sixteen_ranks_with_full_timelines_stay_small():
    results = example_results.usual()
    step = example_timelines.timeline(16)
    many = tuple(
        replace(
            rank,
            **{
                name: tuple(getattr(rank, name)) * 84
                for name in ("track", "stage", "layer", "micro_batch", "begin_us", "duration_us")
            },
        )
        for rank in step.ranks
    )
    full = replace(step, ranks=many)
    assert sum(len(rank.stage) for rank in full.ranks) > 4000
    deployments = [
        replace(each, name=f"{each.name} {copy}", timelines=dict.fromkeys(each.timelines, full))
        for copy in range(3)
        for each in results.deployments
    ]
    text = html.render(replace(results, deployments=tuple(deployments)))
    assert len(text.encode()) < 5e6
