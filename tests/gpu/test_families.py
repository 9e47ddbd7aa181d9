"""Checkpoints of every family on one GPU; skipped where there is none, or no transformers."""

from types import SimpleNamespace

import pytest

from expertlane.engine.local_ranks import LocalRanks
from expertlane.engine.pool import RankPool
from expertlane.model.checkpoint import Checkpoint

pytest.importorskip("transformers")

from model.families import FAMILIES
from parity.against_transformers import check_against_transformers

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_one_gpu(checkpoints, family: str) -> None:
    folder = checkpoints.folder(family)
    with RankPool(LocalRanks(1, 60.0, "float32"), 60.0) as pool:
        pools = SimpleNamespace(pool=lambda *_: pool)  # none of those that compute on the CPU
        check_against_transformers(pools, folder, Checkpoint(folder).model, "tp=1", num_steps=16)
