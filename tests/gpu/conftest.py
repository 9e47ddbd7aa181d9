"""Where these tests run: on a GPU; or small ones on a CPU, when `make gpu` is rehearsed."""

import os
import sys
from pathlib import Path

import pytest
import torch

from expertlane.engine.ops import backend
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.pool import RankPool

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

HAS_GPU = torch.cuda.is_available()
IS_REHEARSED = not HAS_GPU and bool(os.environ.get("EXPERTLANE_REHEARSE"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` in this folder where there is neither."""
    for item in items:
        if item.get_closest_marker("gpu") and not (HAS_GPU or IS_REHEARSED):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(scope="module")
def ranks_of():
    """Pools of some ranks in a dtype, with variables of their own; float16 is not rehearsed."""
    pools = {}

    def make(num_ranks: int, dtype: str, **variables: str) -> RankPool:
        if dtype == "float16" and not HAS_GPU:
            pytest.skip("float16 needs a GPU")
        key = num_ranks, dtype, *variables.items()
        if key not in pools or pools[key].is_closed:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                pools[key] = RankPool(LocalRanks(num_ranks, 60.0, dtype), 60.0)
        return pools[key]

    yield make
    for pool in pools.values():
        pool.close()


@pytest.fixture
def with_torch(monkeypatch):
    """Has torch compute in this process from now on."""

    def choose() -> None:
        monkeypatch.setenv("EXPERTLANE_BACKEND", "torch")
        forget()

    def forget() -> None:
        backend.backend_of_cuda.cache_clear()
        backend.backend_of_cpu.cache_clear()

    yield choose
    monkeypatch.undo()
    forget()
