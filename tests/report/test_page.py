"""report.html without a browser: complete, self-contained, and the same numbers as elsewhere."""

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest

import example_pages
import example_results
import example_timelines
from expertlane.report import html
from expertlane.report.charts.colours import style_sheet
from expertlane.report.document import Lanes, Multiples, Table
from expertlane.report.sections import report_of
from expertlane.results.results import Results
from report.shown import charts, made_by

KINDS = pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)


_NAMES = """
a body caption code details div fieldset figure footer h1 h2 h3 h4 h5 head header html input
label legend li link main nav ol section meta p pre script span style summary table tbody td
th thead title tr ul circle clippath defs g line lineargradient path rect stop svg text
"""
TAGS = {*_NAMES.split()}


class Page(HTMLParser):
    """What a test asks of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.titles: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of_tag = dict(attrs)
        self.tags.add(tag)
        self.attributes |= {*of_tag}
        for name in ("src", "href"):
            if of_tag.get(name):
                self.links.append(of_tag[name] or "")
        if of_tag.get("id"):
            self.ids.append(of_tag["id"] or "")
        if tag not in ("meta", "link", "input", "circle", "rect"):
            self._open.append((tag, of_tag))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("circle", "rect"):
            opened, _ = self._open.pop()
            assert opened == tag

    def handle_data(self, data: str) -> None:
        tag, _ = self._open[-1] if self._open else ("", {})
        if tag == "title":
            self.titles.append(data)
        elif tag not in ("script", "style"):
            self.words.append(data)


def page_of(results: Results) -> Page:
    return Page(html.render(report_of(results)))


@pytest.mark.smoke(1)
@KINDS
def test_the_page_is_whole_and_asks_nothing_of_the_network(make):
    page = Page(made_by(make)[1])
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= {*page.ids}
    assert page.tags <= TAGS
    assert not [name for name in page.attributes if name.startswith("on")]


@pytest.mark.smoke(2)
@KINDS
def test_everything_of_the_other_reports_is_in_it(make):
    results, text = made_by(make)
    words = " ".join(" ".join(Page(text).words).split())
    report = report_of(results)
    assert report.answer.headline in words
    for section in report.sections:
        said = (report.answer.setting, report.answer.headline)
        is_said = all(isinstance(each, str) and each in " ".join(said) for each in section.parts)
        assert section.place == "first" or is_said or section.heading in words
        for part in section.parts:
            if isinstance(part, str):
                assert " ".join(part.split()) in words
            elif isinstance(part, Table):
                for cell in (cell for row in part.rows for cell in row if cell):
                    assert " ".join(cell.split()) in words


@pytest.mark.smoke(2)
@KINDS
def test_every_plot_is_drawn_for_wide_and_narrow_screens_and_tells_its_values(make):
    results, text = made_by(make)
    words = " ".join(Page(text).words + Page(text).titles)
    of_kind = [
        (part, chart)
        for section in report_of(results).sections
        for part in section.parts
        for chart in charts(replace(section, parts=(part,)))
    ]
    drawn = [each for each in of_kind if not isinstance(each[1].spec, Lanes)]
    small = [chart for part, chart in drawn if isinstance(part, Multiples)]
    assert text.count('<div class="wide"><svg ') == len(drawn) - len(small)
    assert text.count('<div class="narrow"><svg ') == len(drawn) - len(small)
    assert text.count('<div class="time"') == len(of_kind) - len(drawn)
    for _, chart in drawn:
        assert any(row[0] in words for row in chart.table.rows)


def test_a_plan_s_second_box_is_what_to_run():
    results, text = made_by(example_pages.KINDS["plan"])
    boxes = re.findall(r'<section class="box" id="(.*?)"', text)
    assert boxes == ["answer", "run"]
    box = text.split('id="run"')[1].split("</section>")[0]
    commands = [unescape(each) for each in re.findall(r'<pre class="command".*?>(.*?)</pre>', box)]
    lines = [
        line
        for engine in results.plans[0].engines
        for command in engine.commands
        for line in command.lines
    ]
    assert commands == lines
    assert lines
    # The verdict's box has no word of how it was found out.
    answer = text.split('id="answer"')[1].split('id="run"')[0]
    sure = text.split('id="sure"')[1]
    for words in ("Tried: ", "Not validated"):
        assert words in sure
        assert words not in answer


def test_a_section_of_no_chapter_is_refused():
    report = report_of(example_results.usual())
    lost = replace(report.sections[0], chapter="run")
    with pytest.raises(ValueError, match="in no chapter"):
        replace(report, sections=(*report.sections, lost))


@KINDS
def test_the_colours_of_plots_are_in_the_style_sheet(make):
    _, text = made_by(make)
    _, _, body = text.partition("</style>")
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", body))
    assert "--ink" in used
    for name in used:
        assert f"{name}:#" in style_sheet()
    assert set(re.findall(r"[\"']--[a-z0-9-]+[\"']", body)) == set()


def test_measured_and_projected_never_share_a_section():
    """What is only in a projection is not in a measured section, and the other way round."""
    both = example_pages.both()
    alone = replace(both, deployments=both.select("measured"))
    sections = report_of(both).of_place("first", "plots")
    measured = [each for each in sections if "measured" in each.heading]
    projected = [each for each in sections if "projected" in each.heading.lower()]
    assert len(measured) + len(projected) == len(sections)
    assert measured == report_of(alone).of_place("first", "plots")


def test_a_model_without_experts():
    results = example_results.usual()
    deployments = tuple(
        replace(
            each,
            num_tokens_per_expert=((0, 0), (0, 0)),
            held=tuple(replace(rank, num_experts_per_layer=(0, 0)) for rank in each.held),
        )
        for each in results.deployments
    )
    words = " ".join(page_of(replace(results, deployments=deployments)).words)
    assert "no experts" in words
    assert "Load of the experts" not in words


def test_names_that_look_like_markup_stay_words():
    results = example_results.usual()
    names = {
        '</script><b title="x">&': '</script><b title="x">&',
        "</title></svg><img onerror=alert(1)> {{ 1 + 1 }} ']+alert(1)+datum['": None,
        "\x1b[31m\x00\u202e": "\\x1b[31m\\x00\\u202e",
        "--blue": None,
    }
    deployments = [
        replace(each, name=name) for each, name in zip(results.deployments, names, strict=False)
    ]
    page = page_of(replace(results, deployments=tuple(deployments)))
    for name, shown in names.items():
        assert (shown or name) in "".join(page.words)
        assert any((shown or name) in title for title in page.titles)
    assert page.tags <= TAGS
    assert not [name for name in page.attributes if name.startswith("on")]


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
        replace(
            each,
            name=f"{each.name} {copy}",
            steps=tuple(replace(step, timeline=full) for step in each.steps),
        )
        for copy in range(3)
        for each in results.deployments
    ]
    text = html.render(report_of(replace(results, deployments=tuple(deployments))))
    assert len(text.encode()) < 8e5
