"""The map of when expert parallelism wins: its cells, its page, and measured pairs."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from report.shown import charts, words

FOLDER = Path(__file__).parents[2] / "experiments" / "ep_map"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(FOLDER))
    try:
        import cells
        import ep_map
        import pairs

        yield ep_map, cells, pairs
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("ep_map", "cells", "pairs"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def made(modules):
    ep_map, cells, _ = modules
    pair = cells.Pair("h200", "trt", "fp8", 8, 1024, 1024, 16, 0.7, 12)
    clusters = [(model, cells.HARDWARE[0], 8) for model in ("DeepSeek-V3", "the paper's model")]
    return ep_map.made(clusters, [pair, replace(pair, hardware="mi300x")])


@pytest.mark.full
def test_a_panel_for_each_model_with_a_square_for_each_load(modules, made):
    _, cells, _ = modules
    report, drawn = made
    assert [each.title for each in drawn] == ["DeepSeek-V3, H200", "the paper's model, H200"]
    for each in drawn:
        values = each.spec["data"]["values"]
        assert [value["load"] for value in values] == ["0.5", "2", "8", "32", "128"]
        assert {value["gpus"] for value in values} == {"8"}
        assert len(each.table.rows) == len(cells.SEQS_PER_DEVICE)
    marks = [layer["data"]["values"] for layer in drawn[0].spec["layer"] if "data" in layer]
    assert marks == [[{"load": "2", "gpus": "8", "mark": "no EP"}]]
    assert not [layer for layer in drawn[1].spec["layer"] if "data" in layer]
    assert [each for section in report.sections for each in charts(section)] == drawn


def test_each_region_has_its_reason_in_a_sentence(made):
    report, drawn = made
    (regions,) = [each for each in report.sections if each.heading.startswith("Each region")]
    (table,) = regions.parts
    assert {row[0] for row in table.rows} == {"DeepSeek-V3", "the paper's model"}
    for row in table.rows:
        assert re.search(r"8 GPUs, [\d.]+ each", row[-1])
    num_squares = sum(len(each.table.rows) for each in drawn)
    assert f"Of {num_squares} combinations" in report.answer.headline


def test_measured_pairs_stand_beside_what_the_model_says(made):
    report, _ = made
    (measured,) = [each for each in report.sections if each.heading == "Measured by others"]
    (table,) = [each for each in measured.parts if not isinstance(each, str)]
    first, other = table.rows
    assert first[:8] == ("8 H200", "trt", "fp8", "1,024", "1,024", "16", "12", "0.700×")
    assert first[-1].endswith("×")
    assert other[-1] == "—"  # no profile of that card
    assert "2 pairs" in words(measured)


@pytest.mark.parametrize(
    ("factor", "factors", "side"),
    [
        (1.2, (1.3, 1.1), "EP"),
        (1.2, (1.3, 0.9), "even"),
        (1.02, (1.02, 1.01), "even"),
        (0.9, (0.95, 0.8), "no EP"),
        (0.9, (1.1, 0.8), "even"),
        (None, None, "neither"),
    ],
)
def test_the_side_of_a_cell(modules, factor, factors, side):
    _, cells, _ = modules
    cell = cells.Cell("m", cells.HARDWARE[0], 8, 2.0, None, None, factor, factors)
    assert cell.side == side
    assert cell.num_seqs == 16


def test_the_page_and_its_pictures(modules, made):
    ep_map, _, _ = modules
    report, drawn = made
    page = ep_map.page(report)
    assert page.startswith("# ")
    assert "_static/when_does_ep_win_narrow.svg" in page
    wide, narrow = (ep_map.picture(drawn, *size) for size in ((220, 3), (330, 1)))
    for picture in (wide, narrow):
        assert picture.count("<svg ") == 1 + len(drawn)
        assert "prefers-color-scheme:dark" in picture
    boxes = [re.search(r'viewBox="0 0 (\d+) (\d+)"', each) for each in (wide, narrow)]
    assert int(boxes[0][1]) > int(boxes[1][1])
    assert int(boxes[0][2]) < int(boxes[1][2])


def test_pairs_are_the_two_of_the_nearest_days(modules):
    _, _, pairs = modules
    row = {
        **dict.fromkeys(("decode_dp_attention", "disagg"), "False"),
        **{"hardware": "h200", "framework": "trt", "precision": "fp8", "spec_method": "none"},
        **{"decode_tp": "8", "isl": "1024", "osl": "1024", "conc": "4"},
    }

    def run(ep, day, tps, **more):
        return row | {"decode_ep": ep, "date": day, "output_tput_per_gpu": tps} | more

    rows = [
        run("8", "2026-01-10", "30"),
        run("1", "2026-01-20", "40"),
        run("1", "2026-01-12", "50"),
        run("1", "2026-01-10", "60", conc="8"),
        run("8", "2026-06-10", "60", conc="8"),
        run("8", "2026-01-10", "99", disagg="True"),
    ]
    (found,) = pairs.pairs_of(rows)
    assert (found.factor, found.days, found.num_seqs, found.num_devices) == (0.6, 2, 4, 8)
