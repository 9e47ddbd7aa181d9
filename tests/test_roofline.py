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


def row(what: str, variant: str, intensity: float, flops: float) -> dict:
    return {
        "what": what,
        "variant": variant,
        "flops_per_s": flops,
        "bytes_per_s": flops / intensity if intensity else 5e9,
    }


SETS = [
    {
        "instructions": name,
        "peak_flops_per_s": peak,
        "read_bytes_per_s": 50e9,
        "rows": [
            row("one row", "ours", 1.0, 40e9),
            row("many rows", "ours", 400.0, 0.8 * peak),
            row("one row", "oneDNN packed", 1.0, 20e9),
            row("one row", "sum", 0.0, 0.0),
        ],
    }
    for name, peak in (("avx2", 100e9), ("avx512_bf16", 400e9))
]


def test_a_roof_bends_where_bandwidth_meets_the_peak(script):
    roof = script.roof(SETS[1], [1.0, 400.0])
    assert [(point.x, point.y.value) for point in roof.points] == [(1, 50), (8, 400), (400, 400)]
    # Where all kernels lie left of the ridge, the roof still reaches it.
    roof = script.roof(SETS[0], [0.5, 1.0])
    assert [(point.x, point.y.value) for point in roof.points] == [(0.5, 25), (2, 100)]


def test_only_our_kernels_are_points(script):
    assert [(p.x, p.y.value, p.words) for p in script.kernels(SETS[0]).points] == [
        (1.0, 40.0, "one row"),
        (400.0, 80.0, "many rows"),
    ]


def test_the_picture_is_a_file_of_its_own(script):
    drawn = script.picture(script.roofline(SETS))
    root = ElementTree.fromstring(drawn)
    texts = "".join(root.itertext())
    assert all(name in texts for name in ("avx2", "avx512_bf16", "GFLOP/s", "many rows"))
    assert "href" not in drawn
    for colour in set(script_colours(drawn)):
        assert f"{colour}:" in drawn  # each is defined in it


def script_colours(drawn: str) -> list[str]:
    return [part.partition(")")[0] for part in drawn.split("var(")[1:]]
