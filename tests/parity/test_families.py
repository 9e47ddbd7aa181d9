"""Contract 1 against transformers, for a checkpoint of every family."""

import pytest

from engine.model.families import FAMILIES
from expertlane.engine.model.checkpoint import Checkpoint
from parity.against_transformers import check_against_transformers

LAYOUTS = (
    "tp=1",
    pytest.param("dp=4,ep=4", marks=pytest.mark.numerical),
    "tp=2,ep=2",
    "pp=2,dp=2,ep=2",
    "tp=4",
)


@pytest.mark.smoke(5)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_steps", [24, pytest.param(64, marks=pytest.mark.full)])
def test_transformers_logits_and_tokens(
    pools, checkpoints, num_steps: int, family: str, layout: str
) -> None:
    folder = checkpoints.folder(family)
    check_against_transformers(pools, folder, Checkpoint(folder).model, layout, num_steps)
