"""Some deployments of an experiment alone."""

import pytest

from expertlane.errors import SpecError
from expertlane.spec.experiment import read_experiment, shipped_experiments

SMALL = read_experiment(shipped_experiments()["paper-small"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("EP 16", ["EP 16"]),
        ("8", ["EP 16"]),
        ("9, 8", ["EP 16", "EP 16 + overlap"]),  # in the experiment's order
        ("DP 2 × TP 8, EP 2,EP 16", ["DP 2 × TP 8, EP 2", "EP 16"]),
        ("tp 8 x pp 2, m=2 rotating,tp 8 x pp 2", ["TP 8 × PP 2", "TP 8 × PP 2, m=2 rotating"]),
    ],
)
def test_some_deployments_alone(text: str, names: list[str]) -> None:
    """Names have commas in them; the longest that fits is meant."""
    found = SMALL.only(text)
    assert [each.name for each in found.deployments] == names
    assert found.scaling == ()


@pytest.mark.parametrize("text", ["", "17", ",EP 16", "EP 16 EP 16", "8,EP 16", "EP"])
def test_names_that_there_are_not(text: str) -> None:
    with pytest.raises(SpecError):
        SMALL.only(text)
