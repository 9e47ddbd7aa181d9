"""Checkpoints of every family on one GPU; skipped where there is none, or no transformers."""

from types import SimpleNamespace

import pytest

from expertlane.engine.model.checkpoint import Checkpoint

pytest.importorskip("transformers")

from engine.model.families import FAMILIES
from parity.against_transformers import check_against_transformers
from parity.contract import check_contract
from parity.float8_reference import SIZES, case_of, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_one_gpu(checkpoints, ranks_of, family: str) -> None:
    folder = checkpoints.folder(family)
    pools = SimpleNamespace(pool=lambda *_: ranks_of(1, "float32"))  # none that computes on the CPU
    check_against_transformers(pools, folder, Checkpoint(folder).model, "tp=1", num_steps=16)


@pytest.mark.parametrize("family", SIZES)
def test_float8_activations_on_one_gpu(tmp_path, ranks_of, family: str) -> None:
    case = case_of(family, tmp_path)
    pools = SimpleNamespace(pool=lambda *_: ranks_of(1, "float32"))
    found = run(pools, case, "tp=1", case.rounded.tokens)
    check_contract(case.rounded, found.logits, found.tokens)
