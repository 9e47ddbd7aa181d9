"""Plots as inline SVG, and timelines."""

import re
import resource
from xml.etree import ElementTree

import pytest

from expertlane.report.charts.svg import svg
from expertlane.report.charts.timeline import UNITS, lanes_svg, ticks
from expertlane.report.document import Lanes, Segment


def bars(names, colour="--compute-1", **more):
    values = [{"name": name, "size": place + 1} for place, name in enumerate(names)]
    return {
        "data": {"values": values},
        "mark": {"type": "bar", "color": colour},
        "encoding": {
            "y": {"field": "name", "type": "nominal", "sort": None},
            "x": {"field": "size", "type": "quantitative", "title": "size"},
            "tooltip": [{"field": "name", "title": "it's"}, {"field": "size", "title": "size"}],
        },
    } | more


def squares(num):
    values = [{"x": place % 20, "y": place // 20, "kind": place % 2} for place in range(num)]
    return {
        "data": {"values": values},
        "mark": "rect",
        "encoding": {
            "x": {"field": "x", "type": "ordinal"},
            "y": {"field": "y", "type": "ordinal"},
            "color": {
                "field": "kind",
                "type": "nominal",
                "scale": {"domain": [0, 1], "range": ["--above", "--below"]},
                "legend": None,
            },
            "tooltip": [{"field": "x", "title": "x"}],
        },
    }


def test_colours_are_variables_and_values_are_told():
    drawn = svg(bars(["one", "two"]), "c", 330)
    root = ElementTree.fromstring(drawn)
    assert root.get("viewBox").split()[2] == "330"
    assert 'fill="var(--compute-1)"' in drawn
    assert [each.text for each in root.iter("title")] == [
        "it's: one, size: 1",
        "it's: two, size: 2",
    ]


@pytest.mark.parametrize(
    "name",
    ['</svg><script>alert("1")</script>', "' + alert(1) + '", "<title>&amp;", "--ink", "a\x1b[0m"],
)
def test_names_stay_words(name):
    drawn = svg(bars([name]), "c", 330)
    root = ElementTree.fromstring(drawn)
    shown = name.replace("\x1b", "\\x1b")
    assert f"it's: {shown}, size: 1" in [each.text for each in root.iter("title")]
    assert {each.tag for each in root.iter()} <= {
        *["svg", "g", "path", "line", "text", "title", "defs", "clipPath"]
    }
    names = {key for each in root.iter() for key in each.attrib}
    assert not [key for key in names if key.startswith("on") or "href" in key or key == "style"]


def test_ids_are_of_the_plot():
    rounded = bars(["one", "two"])
    rounded["mark"] |= {"clip": True, "cornerRadiusEnd": 2}
    drawn = svg(rounded, "chart-7", 330)
    ids = re.findall(r'id="([^"]*)"', drawn)
    assert all(each.startswith("chart-7-") for each in ids)
    assert set(re.findall(r"url\(#([^)]*)\)", drawn)) == set(ids)


def test_many_squares_are_a_path_a_colour():
    few, many = svg(squares(100), "c", 330), svg(squares(400), "c", 330)
    assert few.count("<title>") == 100
    assert many.count("<title>") == 0
    assert many.count('fill="var(--above)"') == many.count('fill="var(--below)"') == 1
    assert len(many) < 1.5 * len(few)


def lanes(**more):
    segments = {
        "experts": (Segment(0, 0, 0.0, 500.0), Segment(1, 0, 250.0, 500.0)),
        "idle": (Segment(0, 0, 500.0, 0.001), Segment(0, 0, 500.01, 0.001)),
    }
    return Lanes(
        **({"rows": ("0", "5"), "num_lanes": 1, "until_us": 1000.0} | more), segments=segments
    )


def test_a_timeline_is_where_things_happen():
    drawn = lanes_svg(lanes(), {"experts": "--compute-1", "idle": "--waiting-3"})
    root = ElementTree.fromstring(drawn)
    first, second = root.iter("path")
    assert first.get("stroke") == "var(--compute-1)"
    assert first.findtext("title") == "experts"
    found = re.findall(r"M(\d+) (\d+)h(\d+)", first.get("d"))
    assert [(int(x), int(length)) for x, _, length in found] == [
        (0, UNITS // 2),
        (UNITS // 4, UNITS // 2),
    ]
    assert int(found[0][1]) < int(found[1][1])
    # What is shorter than a pixel is still there, and neighbours are one.
    assert re.findall(r"h(\d+)", second.get("d")) == ["1"]


@pytest.mark.parametrize(
    ("until_ms", "labels"),
    [(1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]), (44.2, ["0", "10", "20", "30", "40"])],
)
def test_ticks_are_round(until_ms, labels):
    found = ticks(lanes(until_us=1e3 * until_ms))
    assert [each.label for each in found if not each.is_fine] == labels
    assert sum(each.is_fine for each in found) >= 3 * (len(labels) - 1)
    for each in found:
        assert each.at * until_ms == pytest.approx(float(each.label))


def test_nothing_is_drawn_where_it_would_abort_the_process(monkeypatch):
    limits = (40 << 30, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    assert "ulimit -v allows less" in svg(bars("a"), "chart-1", 560)
