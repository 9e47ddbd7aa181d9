"""`results.json` of a simulation: what is read is what was written."""

import json
import os
from dataclasses import replace

import pytest

from example_simulation import SIMULATION
from expertlane.errors import UserError
from expertlane.results.file import read_any, write
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.spec.layout import Layout


@pytest.mark.parametrize("prefill", [None, LayoutSizes.of(Layout(tp=8))])
def test_what_is_read_is_what_was_written(tmp_path, prefill):
    given = replace(SIMULATION, deployment=replace(SIMULATION.deployment, prefill_layout=prefill))
    path = write(given, tmp_path / "new")
    assert read_any(path) == given
    assert os.listdir(tmp_path / "new") == ["results.json"]
    assert json.loads(path.read_text())["kind"] == "simulation"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"kind": "plan", "schema_version": 1}, "schema_version 1 of a plan; .* reads 2"),
        ({"kind": "poem"}, "of unknown kind 'poem'; known: comparison, simulation, plan, bench"),
        ({"kind": 3}, "of unknown kind 3"),
        ({"schema_version": 99}, "schema_version 99"),
        ({"more": 1}, "more is an unknown key"),
        ({"created": 3}, "created"),
        ({"cluster": {"name": "a"}}, "cluster.device is missing"),
    ],
)
def test_reading_is_strict(tmp_path, change, part):
    path = write(SIMULATION, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=part):
        read_any(path)
