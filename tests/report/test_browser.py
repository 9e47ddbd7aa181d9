"""report.html in a real browser: headless Chromium, driven by Playwright."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

import example_pages
import example_results
from chromium import NEEDS_CHROMIUM
from expertlane.report.charts.timeline import UNITS
from expertlane.report.document import Lanes
from expertlane.report.sections import report_of
from report.shown import charts, made_by

pytestmark = NEEDS_CHROMIUM


@pytest.fixture
def opened(browser: Browser, tmp_path: Path):
    """Opens a page; at the end nothing may have been said on the console or asked for."""
    complaints: list[str] = []
    contexts = []

    def open_page(
        make, width: int = 1280, scheme: str = "light", *, has_scripts: bool = True
    ) -> Page:
        path = tmp_path / "report.html"
        path.write_text(made_by(make)[1], encoding="utf-8")
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            java_script_enabled=has_scripts,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda asked: asked.url == path.as_uri() or complaints.append(asked.url[:100]),
        )
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [each for each in complaints if not each.startswith("data:")] == []


def open_all(page: Page) -> None:
    """All parts that a reader can open."""
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")


def sizes_of_text(page: Page) -> list[float]:
    """Heights of the plots' letters, in pixels of the screen."""
    return page.evaluate(
        """() => [...document.querySelectorAll(".plot text")]
        .filter(text => text.checkVisibility())
        .map(text => {
          const { a, b } = text.getScreenCTM();
          return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(a, b);
        })"""
    )


@pytest.mark.smoke(1)
@pytest.mark.parametrize("has_scripts", [True, False], ids=["scripts", "no scripts"])
@pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)
def test_every_plot_is_seen_with_and_without_scripts(opened, make, has_scripts):
    page = opened(make, has_scripts=has_scripts)
    open_all(page)
    assert page.locator("h1").inner_text()
    plots = page.locator(".plot:visible")
    assert plots.count() == made_by(make)[1].count('class="plot"')
    for plot in plots.all():
        box = plot.locator("svg:visible").bounding_box()
        assert box["width"] > 180
        assert box["height"] > 30


@pytest.mark.smoke(1)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)
def test_nothing_is_wider_than_a_phone_nor_too_small_to_read(opened, make, scheme):
    page = opened(make, 390, scheme)
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(size > 9.5 for size in sizes_of_text(page))


@pytest.mark.parametrize(
    "make", [example_results.usual, example_pages.KINDS["bench"]], ids=["compare", "bench"]
)
def test_the_answer_fills_the_first_screen(opened, make):
    """The headline, plots in two columns of which none is half empty; the rest is closed."""
    page = opened(make, 1440)
    assert page.locator("h1").bounding_box()["y"] < 100
    assert page.locator("details.part[open]").count() == 0
    ends = {}
    for each in page.locator(".columns :is(figure, p)").all():
        if box := each.bounding_box():
            ends.setdefault(box["x"] > 700, []).append(box["y"] + box["height"])
    columns = page.locator(".columns").bounding_box()
    assert len(ends) == 2
    assert min(map(max, ends.values())) > columns["y"] + columns["height"] / 2
    first = page.locator(".columns .plot").first.bounding_box()
    assert first["y"] + first["height"] < 900


@pytest.mark.smoke(1)
@pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)
def test_the_number_that_is_the_answer_is_seen_on_a_phone(opened, make):
    """In the first heading, without a scroll to the side or down."""
    page = opened(make, 390)
    headline = page.locator("h1")
    assert re.search(r"\d", headline.inner_text())
    box = headline.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    assert box["y"] + box["height"] < 844
    assert page.evaluate("document.querySelector('h1').scrollWidth") <= box["width"] + 1


@pytest.mark.smoke(1)
@pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)
def test_tables_fold_or_scroll_in_a_box_of_their_own(opened, make):
    page = opened(make, 390)
    open_all(page)
    for table in page.locator(".scroll").all():
        if not table.is_visible():
            continue
        box = table.bounding_box()
        assert box["x"] + box["width"] <= 390
        if "folds" in table.get_attribute("class").split():
            assert table.evaluate("each => each.scrollWidth <= each.clientWidth")


def test_a_link_of_the_contents_opens_its_chapter(opened):
    page = opened(example_results.usual)
    for name in ("why", "setup"):
        chapter = page.locator(f"details#{name}")
        assert not chapter.evaluate("each => each.open")
        page.locator(f'nav a[href="#{name}"]').click()
        expect(chapter).to_have_attribute("open", "")
        assert chapter.locator("summary").first.bounding_box()["y"] < 900


def test_commands_are_copied_as_they_are(opened):
    page = opened(example_pages.KINDS["plan"])
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    command = page.locator("pre.command").first
    button = command.get_by_role("button")
    button.click()
    expect(button).to_have_text("Copied")
    lines = [
        line
        for engine in example_pages.KINDS["plan"]().plans[0].engines
        for command in engine.commands
        for line in command.lines
    ]
    assert page.evaluate("navigator.clipboard.readText()") == lines[0]


def timelines(page: Page):
    open_all(page)
    group = page.locator(".timelines").first
    group.scroll_into_view_if_needed()
    return group


@pytest.mark.full
@pytest.mark.parametrize("has_scripts", [True, False], ids=["scripts", "no scripts"])
def test_timelines_are_stretched_together(opened, has_scripts):
    page = opened(example_results.usual, has_scripts=has_scripts)
    group = timelines(page)
    drawn = group.locator(".time svg:visible")
    assert drawn.count() >= 2
    before = [each.bounding_box() for each in drawn.all()]
    assert group.locator(".axis .fine:visible").count() == 0
    group.get_by_label("4 ×").check()
    for each, old in zip(drawn.all(), before, strict=True):
        assert each.bounding_box()["width"] == pytest.approx(4 * old["width"], rel=0.02)
        assert each.bounding_box()["height"] == pytest.approx(old["height"])
    assert group.locator(".axis .fine:visible").count() > 0
    if has_scripts:
        scrolled = group.locator(".time")
        scrolled.first.evaluate("each => { each.scrollLeft = 200; }")
        expect(scrolled.nth(1)).to_have_js_property("scrollLeft", 200)


@pytest.mark.full
def test_pointing_at_a_timeline_tells_what_is_there(opened):
    results = example_results.usual()
    page = opened(example_results.usual)
    group = timelines(page)
    drawn = group.locator(".time svg").first
    drawn.scroll_into_view_if_needed()
    box = drawn.bounding_box()
    timeline = next(
        chart.spec
        for each in report_of(results).sections
        for chart in charts(each)
        if isinstance(chart.spec, Lanes)
    )
    seen = set()
    for share in (0.05, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 4)
        if page.locator(".tip").is_visible():
            seen.add(page.locator(".tip").inner_text())
    assert len(seen) > 1
    tolerance = 2 * timeline.until_us / 1e3 / UNITS
    for words in seen:
        told = re.fullmatch(r"(.*), rank (\d+): from ([\d.]+) ms, ([\d.]+) ms", words)
        assert told, words
        assert told[2] == timeline.rows[0]
        drawn = [each for each in timeline.segments[told[1]] if each.row == 0]
        assert any(
            float(told[3]) == pytest.approx(each.begin_us / 1e3, abs=tolerance, rel=1e-3)
            and float(told[4]) <= sum(one.duration_us for one in drawn) / 1e3 + tolerance
            for each in drawn
        )


@pytest.mark.full
def test_a_table_that_goes_on_keeps_its_first_column(opened):
    page = opened(example_results.usual, 390)
    open_all(page)
    tables = page.locator(".scroll").all()
    wide = [each for each in tables if each.evaluate("each => each.scrollWidth > each.clientWidth")]
    assert wide
    first = wide[0].locator("td").first
    before = first.bounding_box()["x"]
    wide[0].evaluate("each => { each.scrollLeft = 100; }")
    assert wide[0].locator("td").nth(1).bounding_box()["x"] < before + 390
    assert first.bounding_box()["x"] == pytest.approx(before, abs=1)


@pytest.mark.full
def test_on_paper_all_parts_are_open(opened, tmp_path):
    page = opened(example_results.usual)
    closed = page.locator("details.part:not([open])").count()
    assert closed > 0
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details.part:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details.part:not([open])").count() == closed
    page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
