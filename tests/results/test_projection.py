"""A projection on disk."""

from dataclasses import replace
from pathlib import Path

import pytest

import example_projection as example
import example_results
from expertlane.errors import UserError
from expertlane.results.file import read, write


def test_a_projection_alone_is_read_as_it_was_written(tmp_path: Path) -> None:
    given = example.results({"hidden_size": 64})
    assert read(write(given, tmp_path)) == given


def test_a_projection_beside_a_measurement(tmp_path: Path) -> None:
    given = replace(example_results.usual(), projection=example.usual())
    assert read(write(given, tmp_path)) == given


def test_results_of_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="results without a deployment"):
        replace(example.results({}), projection=None)
    with pytest.raises(UserError, match="a projection without a deployment"):
        replace(example.usual(), deployments=())
    with pytest.raises(UserError, match="without the machine"):
        replace(example_results.usual(), machine=None)


def test_rows_by_conditions() -> None:
    projection = example.usual()
    assert projection.top_ks == (2, 1)
    assert projection.contexts == example.CONTEXTS
    assert projection.conditions[0] == (2, "graph", "balanced")
    assert [row.top_k for row in projection.usual(1)] == [1] * 4
    fitting = projection.deployments[0].decode_of(10_000, 768)
    assert fitting is not None
    assert fitting.fits
    assert projection.deployments[0].decode_of(10_000, 5) is None
