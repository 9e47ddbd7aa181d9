"""Checkpoints that outlive a test."""

import pytest

from model.families import Checkpoints


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """One tiny checkpoint a family."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))
