"""What is said of how far projections were off is what was found."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from expertlane.cost.laws.judged import JUDGED, judged
from expertlane.cost.laws.profile_file import read_profile
from expertlane.cost.laws.times import Basis

ROOT = Path(__file__).parents[2]


def test_published_rows_are_those_of_the_table():
    said = JUDGED[Basis.FITTED]
    quantity, mode, model = re.match(r"(\w+), (\w+), (\S+) in float8", said.what).groups()
    modes = {"disaggregated": "two pools", "aggregated": "one pool"}
    text = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    names = "|".join((mode, modes[mode]))
    row = re.search(
        rf"^\| {model} \| ({names}) \| {quantity} \| (\d+) \| [^|]+ \| (\d+)% \|", text, re.M
    )
    assert row is not None
    assert (int(row[2]), int(row[3]) / 100) == (said.num_rows, said.median_error)


def test_calibrated_rows_are_those_measured():
    said = JUDGED[Basis.MEASURED]
    file = ROOT / "benchmarks" / "results" / "2026-11-25-bench_projection-final.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    errors = [abs(row[phase]["error"]) for row in rows for phase in ("prefill_s", "decode_s")]
    assert len(errors) == said.num_rows
    assert len({row["deployment"] for row in rows}) <= len(rows) == 36
    assert np.median(errors) == pytest.approx(said.median_error, abs=5e-4)


def test_another_devices_laws_were_not_judged():
    assert judged(read_profile("h100")) is JUDGED[Basis.FITTED]
    assert judged(read_profile("b200")) is None
    assert judged(read_profile("a100")) is None
