"""The roofline picture: kernels under the roofs of their sets, as bench_kernels.py found them."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).parent.parent / "docs/pictures/roofline.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("roofline", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(what: str, variant: str, intensity: float, flops: float, dtype: str = "bfloat16") -> dict:
    return {
        "what": what,
        "dtype": dtype,
        "variant": variant,
        "flops_per_s": flops,
        "bytes_per_s": flops / intensity if intensity else 50e9,
    }


FOUND = {
    "peak_flops_per_s": {
        "avx2 bfloat16": 100e9,
        "avx2 float32": 90e9,
        "avx512_bf16 bfloat16": 400e9,
    },
    "rows": [
        row("one row", "avx2", 1.0, 40e9),
        row("many rows", "avx2", 400.0, 80e9),
        row("one row", "avx2", 0.5, 20e9, "float32"),
        row("one row", "avx512_bf16", 1.0, 45e9),
        row("one row", "torch", 1.0, 20e9),
        row("one row", "read", 0.0, 0.0),
    ],
}


def test_a_roof_bends_where_bandwidth_meets_the_peak(script):
    roof = script.roof("avx512_bf16", 400e9, 50e9, [1.0, 400.0])
    assert [(point.x, point.y.value) for point in roof.points] == [(1, 50), (8, 400), (400, 400)]
    # Where all kernels lie left of the ridge, the roof still reaches it.
    roof = script.roof("avx2", 100e9, 50e9, [0.5, 1.0])
    assert [(point.x, point.y.value) for point in roof.points] == [(0.5, 25), (2, 100)]


def test_only_our_kernels_in_bfloat16_are_points(script):
    curves = script.roofline(FOUND)
    rows = [each for each in curves.table.rows if "roof" not in each[0]]
    assert [each[0] for each in rows] == ["avx2", "avx2", "avx512_bf16"]


def test_the_picture_is_a_file_of_its_own(script):
    drawn = script.picture(script.roofline(FOUND))
    root = ElementTree.fromstring(drawn)
    texts = "".join(root.itertext())
    assert all(name in texts for name in ("avx2", "avx512_bf16", "GFLOP/s", "many rows"))
    assert "href" not in drawn
    for colour in set(script_colours(drawn)):
        assert f"{colour}:" in drawn  # each is defined in it


def script_colours(drawn: str) -> list[str]:
    return [part.partition(")")[0] for part in drawn.split("var(")[1:]]
