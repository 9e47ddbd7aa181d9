"""`/live` in a real browser: headless Chromium, driven by Playwright."""

import re
import threading

import httpx
import pytest
from playwright.sync_api import expect

from chromium import NEEDS_CHROMIUM
from engine.ranks.processes import wait_until
from expertlane.server import live
from expertlane.server.setup import ServedModel, ServerOptions
from server.running import PATIENCE_S, ServerInThread

pytestmark = NEEDS_CHROMIUM
expect.set_options(timeout=1e3 * PATIENCE_S)


@pytest.fixture
def opened(browser, monkeypatch):
    """Opens the page; at the end nothing may have been said on the console, or asked elsewhere."""
    monkeypatch.setattr(live, "_FRAME_S", 0.1)
    complaints, asked, contexts = [], [], []

    def open_page(server, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1e3 * PATIENCE_S)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append((server.url, request.url)))
        page.goto(f"{server.url}/live")
        return page

    yield open_page
    for context in contexts:
        context.close()
    # Chromium says that an answer was a 401 or a server is gone; the tests read canvases often.
    own = ("401 (Unauthorized)", "net::ERR_", "503 (Service Unavailable)", "willReadFrequently")
    assert [each for each in complaints if not any(text in each for text in own)] == []
    assert {url.removeprefix(server) for server, url in asked} <= {"/live", "/live/feed"}


@pytest.fixture
def busy(served):
    """A server of real ranks, which is asked all the time."""
    done = threading.Event()

    def ask():
        body = {"prompt": [5, 6, 7, 8], "max_tokens": 30, "temperature": 1.5, "ignore_eos": True}
        while not done.is_set():
            httpx.post(f"{served.server.url}/v1/completions", json=body, timeout=PATIENCE_S)

    thread = threading.Thread(target=ask)
    thread.start()
    yield served.server
    done.set()
    thread.join()


PAINTED = """id => {
  const canvas = document.getElementById(id);
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255)
    colours.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
  return colours.size;
}"""


def is_painted(page, canvas, num_colours):
    """Wait until there are more colours; not by Playwright's own wait, which the policy forbids."""
    assert wait_until(lambda: page.evaluate(PAINTED, canvas) > num_colours), canvas


NAMES = """[...document.querySelectorAll("canvas, select, button, input, [tabindex]")]
  .filter(each => each.ariaHidden !== "true")
  .map(each => each.ariaLabel || each.labels?.[0]?.textContent || each.textContent)"""


MIDDLES = """[...document.querySelectorAll(".controls > *")].map(each => {
  const box = each.getBoundingClientRect();
  return (box.top + box.bottom) / 2;
})"""


@pytest.mark.full
@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_all_of_it_is_drawn(opened, busy, width, scheme):
    page = opened(busy, width, scheme)
    expect(page.locator("h1")).to_have_text(re.compile(r"\d+ output tokens/s; 1 request running"))
    assert wait_until(lambda: page.locator("#lanes .bar span").count() > 8)
    for each, least in (("map", 5), ("history", 5), ("speed", 1)):
        is_painted(page, each, least)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    middles = page.evaluate(MIDDLES)
    assert max(middles) - min(middles) < 10, "controls stand in one row"
    bars = page.locator("#lanes .bar")
    assert bars.count() == 2
    widths = "bar => [...bar.children].reduce((sum, each) => sum + parseFloat(each.style.width), 0)"
    assert bars.first.evaluate(widths) == pytest.approx(100, abs=0.1)
    legend = page.locator("#legend").inner_text()
    assert {"experts", "dispatch", "waiting"} <= set(legend.split())
    tiles = page.locator("#tiles").inner_text()
    assert all(word in tiles for word in ("TTFT", "TPOT", "KV cache", "Preemptions", "ms"))
    assert page.locator("#placement tr").count() == 3
    assert page.locator("#state").inner_text() == "running"
    page.locator("#map-card summary").click()
    assert page.locator("#hot-table tr").count() == 13


def test_it_is_used_by_keys_alone(opened, busy):
    page = opened(busy)
    is_painted(page, "map", 5)
    readout = page.locator("#readout")
    page.locator("#map").focus()
    page.keyboard.press("ArrowRight")
    expect(readout).to_have_text(re.compile("^Layer 0, expert 0: .* on rank 0"))
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
    expect(readout).to_have_text(re.compile("^Layer 2, expert 1: "))
    page.keyboard.press("Enter")
    expect(page.locator("#layer")).to_have_value("2")
    expect(page.locator("#placement-said")).to_have_text(re.compile("^Layer 2: no copies"))
    page.keyboard.press("Escape")
    expect(readout).to_have_text("No cell chosen.")
    names = page.evaluate(NAMES)
    assert all(names)


BANDS = """() => {
  const canvas = document.getElementById("speed");
  const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const above = getComputedStyle(document.documentElement).getPropertyValue("--above").trim();
  const wanted = [1, 3, 5].map(place => parseInt(above.slice(place, place + 2), 16));
  const places = new Set();
  for (let i = 0; i < data.length; i += 4)
    if (data[i + 3] === 255 && wanted.every((value, c) => Math.abs(data[i + c] - value) < 3))
      places.add((i / 4) % width);
  return places.size;
}"""


def test_a_recovery_is_marked_on_the_rate(opened, stub_server, monkeypatch):
    """Recorded snapshots: ten seconds of 100 tokens/s, a rank is lost, 3.5 s later steps go on."""
    server = stub_server()
    state = server.live.state
    start, frame = state.start(), state.frame()
    began = 1e9
    speeds = [[began + second, 100 * second] for second in range(10)]
    monkeypatch.setattr(state, "start", lambda: start | {"speeds": speeds})

    def snapshot(second, num_tokens, of_state, changes):
        return frame | {
            "at": began + second,
            "num_generation_tokens": num_tokens,
            "num_running": 2,
            "state": of_state,
            "changes": changes,
        }

    lost = {"kind": "recovery", "began": began + 9.6, "seconds": None, "ranks": [1]}
    now = snapshot(10, 1000, "running", [])
    monkeypatch.setattr(state, "frame", lambda: dict(now))
    page = opened(server)
    expect(page.locator("h1")).to_have_text("100 output tokens/s; 2 requests running, 0 waiting")
    assert page.evaluate(BANDS) == 0
    assert not page.locator("#dip").is_visible()

    now = snapshot(12, 1000, "recovering", [lost])
    expect(page.locator("h1")).to_have_text("Recovering for 2 s: rank 1 lost; 2 requests wait")
    expect(page.locator("#state")).to_have_text("recovering")
    expect(page.locator("#dip")).to_have_text(
        re.compile(r"^[\d:]+: rank 1 lost, recovering; the rate fell from 100 to 0 tokens/s\.$")
    )
    assert page.evaluate(BANDS) > 0

    now = snapshot(14, 1100, "running", [lost | {"seconds": 3.5}])
    expect(page.locator("#dip")).to_have_text(
        re.compile(r"rank 1 lost, recovered in 3\.50 s; the rate fell from 100 to 0 tokens/s\.$")
    )
    expect(page.locator("h1")).to_have_text(re.compile(r"^\d+ output tokens/s; 2 requests"))
    expect(page.locator("#state")).to_have_text("running")
    assert page.evaluate(BANDS) > 0


@pytest.mark.full
def test_a_key_is_asked_for_and_is_in_no_address(opened, stub_server):
    server = stub_server(ServerOptions(api_keys=("open sesame",)))
    page = opened(server)
    secret = page.get_by_label("API key")
    secret.fill("wrong")
    secret.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The server does not accept this key.")
    assert not page.locator("#content").is_visible()
    secret.fill("open sesame")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#content")).to_be_visible()
    expect(page.locator("#setting")).to_have_text(re.compile("^stub"))
    assert "sesame" not in page.url + page.content()
    page.reload()
    expect(page.locator("#content")).to_be_visible()  # this tab still has it


@pytest.mark.full
def test_names_are_no_markup_and_an_end_is_said(opened, stub_server):
    made = stub_server()
    name = "<img src=x onerror=alert(1)>"
    model = ServedModel(name, made.engine, made.engine.limits)
    made.stop()
    server = ServerInThread(model)
    try:
        page = opened(server)
        expect(page.locator("#setting")).to_have_text(re.compile("^" + re.escape(name)))
        assert page.locator("img").count() == 0

        def die():
            raise RuntimeError("rank 1 was killed <b>here</b>")

        made.engine.runner.before = die
        httpx.post(f"{server.url}/v1/completions", json={"prompt": [1]}, timeout=PATIENCE_S)
        expect(page.locator("#alerts")).to_contain_text("Problem: ")
        expect(page.locator("#alerts")).to_contain_text("rank 1 was killed <b>here</b>")
        expect(page.locator("#alerts")).to_contain_text("What to do: ")
        expect(page.locator("#state")).to_have_attribute("data-state", "ended")
        expect(page.locator("#events")).to_contain_text("rank 1 was killed")
    finally:
        server.stop()
