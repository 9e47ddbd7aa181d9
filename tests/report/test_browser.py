"""report.html in a real browser: headless Chromium, driven by Playwright."""

import json
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

import example_pages
import example_results
from expertlane.report import html
from expertlane.report.numbers import figures, milliseconds
from expertlane.report.sections import report_of
from expertlane.results.file import to_json
from expertlane.results.record import EXPERIMENT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: install Debian's chromium to run these"
)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Browser, tmp_path: Path):
    """Opens a page; at the end nothing may have been said on the console or asked for."""
    complaints: list[str] = []
    contexts = []

    def open_page(results, width: int = 1280, scheme: str = "light") -> Page:
        path = tmp_path / "report.html"
        path.write_text(html.render(report_of(results)), encoding="utf-8")
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
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
    assert [each for each in complaints if not each.startswith(("data:", "blob:"))] == []


def draw_all(page: Page) -> None:
    """Wait for all plots that can be seen."""
    page.wait_for_function(
        "() => [...document.querySelectorAll('.plot')]"
        ".every(plot => !plot.checkVisibility() || plot.dataset.drawn)"
    )


@pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)
def test_every_plot_is_drawn_without_an_error(opened, make):
    page = opened(make())
    draw_all(page)
    assert page.locator(".plot[data-drawn]").count() > 0
    assert page.locator("h1").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)
def test_nothing_is_wider_than_a_phone(opened, make, scheme):
    page = opened(make(), 390, scheme)
    draw_all(page)
    for each in page.locator("details").all():
        each.evaluate("each => { each.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def timelines(page: Page):
    group = page.locator(".timelines").first
    group.scroll_into_view_if_needed()
    draw_all(page)
    return group


def stretch(group) -> tuple[float, float]:
    return tuple(float(group.get_attribute(name)) for name in ("data-from-ms", "data-to-ms"))


def test_timelines_zoom_together_by_buttons_keys_and_wheel(opened):
    results = example_results.usual()
    page = opened(results)
    group = timelines(page)
    plots = group.locator(".plot[data-drawn]")
    assert plots.count() >= 2
    before = [plot.screenshot() for plot in plots.all()]
    until = max(each.decode.timeline.shown_us for each in results.deployments) / 1e3

    group.get_by_role("button", name="Zoom in").click()
    assert stretch(group) == pytest.approx((until / 4, 3 * until / 4))
    page.wait_for_timeout(300)
    for plot, old in zip(plots.all(), before, strict=True):
        assert plot.screenshot() != old
    plots.first.focus()
    page.keyboard.press("ArrowRight")
    assert stretch(group) == pytest.approx((3 * until / 8, 7 * until / 8))
    page.keyboard.press("0")
    assert stretch(group) == pytest.approx((0, until))
    handle = group.element_handle()
    handle.evaluate("group => { group.dataset.was = group.dataset.toMs; }")
    plots.first.hover()
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.wait_for_function("group => group.dataset.toMs < 0.9 * group.dataset.was", arg=handle)
    group.get_by_role("button", name="All").click()
    assert stretch(group) == pytest.approx((0, until))


def test_hovering_over_a_timeline_tells_its_event(opened):
    results = example_results.usual()
    page = opened(results)
    group = timelines(page)
    plot = group.locator(".plot[data-drawn]").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    tooltip = page.locator("#vg-tooltip-element.visible")
    seen = set()
    for share in (0.12, 0.2, 0.3, 0.4, 0.5):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 10)
        page.wait_for_timeout(60)
        if tooltip.count():
            seen.add(tooltip.inner_text())
    assert seen
    step = results.deployments[0].decode.timeline
    first = step.ranks[0]
    for words in seen:
        told = dict(re.split(r"[:\s]*\t", line, maxsplit=1) for line in words.splitlines() if line)
        stage = step.stages.index(told["stage"])
        place = first.stage.index(stage)
        assert told["rank"] == f"rank {first.rank}"
        assert float(told["takes"].removesuffix(" ms")) == pytest.approx(
            first.duration_us[place] / 1e3, rel=1e-3
        )
        assert float(told["begins at"].removesuffix(" ms")) == pytest.approx(
            first.begin_us[place] / 1e3, rel=1e-3
        )


def test_dragging_moves_the_time_axis(opened):
    page = opened(example_results.usual())
    group = timelines(page)
    group.get_by_role("button", name="Zoom in").click()
    from_ms, to_ms = stretch(group)
    plot = group.locator(".plot[data-drawn]").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 30, steps=5)
    page.mouse.up()
    page.wait_for_timeout(200)
    moved = stretch(group)[0] - from_ms
    assert 0.15 * (to_ms - from_ms) < moved < 0.3 * (to_ms - from_ms)


def test_a_plot_is_called_the_same_after_it_is_drawn(opened):
    page = opened(example_pages.both())
    draw_all(page)
    plots = page.locator(".plot[data-drawn]")
    assert plots.count() > 3
    for plot in plots.all():
        assert plot.get_attribute("role") == "img"
        assert len(plot.get_attribute("aria-label")) > 40
        assert plot.locator("> [aria-hidden=true]").count() == 1


def test_a_change_of_colours_or_width_draws_again(opened):
    page = opened(example_results.usual())
    group = timelines(page)
    plot = group.locator(".plot[data-drawn]").first
    page.mouse.move(0, 0)
    light = plot.screenshot()
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(500)
    draw_all(page)
    dark = plot.screenshot()
    assert dark != light
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 700, "height": 900})
    page.wait_for_timeout(500)
    draw_all(page)
    width = plot.locator("canvas").evaluate("canvas => canvas.getBoundingClientRect().width")
    assert 300 < width <= plot.bounding_box()["width"] + 1


def test_hovering_over_a_bar_tells_its_value(opened):
    results = example_results.usual()
    page = opened(results)
    draw_all(page)
    plot = page.locator("section", has_text="Speed, measured").last.locator(".plot").first
    plot.scroll_into_view_if_needed()
    bars = plot.locator("path[aria-roledescription=bar]")
    deployments = results.select("measured", EXPERIMENT)
    assert bars.count() == len(deployments)
    for bar, deployment in zip(bars.all(), deployments, strict=True):
        bar.hover()
        expect(page.locator("#vg-tooltip-element.visible")).to_contain_text(deployment.name)
        words = page.locator("#vg-tooltip-element").inner_text()
        assert figures(deployment.decode.tps.value) in words


def cells(table) -> list[list[str]]:
    return table.evaluate(
        "table => [...table.tBodies[0].rows].map(row => [...row.cells].map(c => c.textContent))"
    )


def test_tables_equal_results_json(opened):
    results = example_results.usual()
    given = json.loads(to_json(results))["deployments"]
    given = [each for each in given if EXPERIMENT in each["roles"]]
    page = opened(results)
    speed = page.locator("table", has_text="decode TPS").first
    for row, deployment in zip(cells(speed), given, strict=True):
        prefill, decode = deployment["steps"]
        assert row[1:4] == [
            deployment["name"],
            figures(prefill["tps"]["value"]),
            milliseconds(prefill["token_s"]["median"]["value"]),
        ]
        assert row[4] == figures(decode["tps"]["value"])
        assert row[6] == milliseconds(decode["token_s"]["median"]["value"])
    caption = page.locator("caption", has_text="Time of a decode step by cause")
    for row in cells(page.locator("table", has=caption).first)[:-1]:
        for cell, deployment in zip(row[1:], given, strict=True):
            assert cell == milliseconds(deployment["steps"][1]["breakdown_s"][row[0]])


def test_tabs_by_keyboard(opened):
    page = opened(example_results.usual())
    tabs = page.get_by_role("tablist").first.get_by_role("tab")
    tabs.first.focus()
    page.keyboard.press("ArrowRight")
    assert tabs.nth(1).get_attribute("aria-selected") == "true"
    panel = page.locator("#" + tabs.nth(1).get_attribute("aria-controls"))
    expect(panel).to_be_visible()
    expect(page.locator("#" + tabs.first.get_attribute("aria-controls"))).to_be_hidden()
    draw_all(page)
    assert panel.locator(".plot").get_attribute("data-drawn") == "yes"


def test_a_timeline_is_saved_as_a_chrome_trace(opened, tmp_path):
    results = example_results.usual()
    page = opened(results)
    group = timelines(page)
    group.locator("summary", has_text="Numbers and trace").first.click()
    with page.expect_download() as saved:
        group.get_by_role("button", name="Save as Chrome trace").first.click()
    saved.value.save_as(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    step = results.deployments[0].decode.timeline
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(events) == sum(len(rank.stage) for rank in step.ranks)
    assert {event["pid"] for event in events} == {rank.rank for rank in step.ranks}
    assert saved.value.suggested_filename.startswith("trace-")


def test_on_paper_all_tables_are_open(opened, tmp_path):
    page = opened(example_results.usual())
    draw_all(page)
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details.tables").count() > 0
    assert page.locator("details.tables:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details.tables[open]").count() == 0
    page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
