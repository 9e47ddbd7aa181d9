"""Ranks and reference runs that outlive a test, since both take long to make."""

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its kernels run as Python
    os.environ["TRITON_INTERPRET"] = "1"

from distributed.on_ranks import local_ranks
from engine.imported import Imported
from expertlane.engine.pool import RankPool
from expertlane.spec.model import ModelConfig
from expertlane.spec.workload import Workload
from going_on import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401
from parity.reference import ReferenceModel, ReferenceRun

_TIMEOUT_S = 60.0

# The same draws in every run, none of them judged by how long it takes.
hypothesis.settings.register_profile(
    "tests",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Of this process: two on matrices this small are fifty times slower where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Also where a shell has started the tests in the background, and had SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class PoolKeeper:
    """Keeps one pool of ranks a dtype; the ranks keep their process groups by layout.

    Args:
        imported: what their fork servers are forked from.
    """

    def __init__(self, imported: Imported) -> None:
        self._imported = imported
        self._pools: dict[str, RankPool] = {}

    def pool(self, num_ranks: int, dtype: str = "float32") -> RankPool:
        """At least `num_ranks` ranks: those there are, or new ones if a failed case ended them."""
        pool = self._pools.get(dtype)
        if pool is None or pool.is_closed or pool.num_ranks < num_ranks:
            if pool is not None:
                pool.close()
            with self._imported.serving():
                pool = RankPool(local_ranks(num_ranks, _TIMEOUT_S, dtype), _TIMEOUT_S)
            self._pools[dtype] = pool
        return pool

    def close(self) -> None:
        """End all ranks."""
        for pool in self._pools.values():
            pool.close()


class ReferenceRuns:
    """Greedy generations of the reference, each computed once."""

    def __init__(self) -> None:
        self._models: dict[tuple[ModelConfig, int, bool], ReferenceModel] = {}
        self._runs: dict[tuple[ModelConfig, Workload, int, bool], ReferenceRun] = {}

    def model(self, model: ModelConfig, seed: int, rounded: bool = False) -> ReferenceModel:
        """The reference with the weights of `seed`, perhaps rounded to int8."""
        if (model, seed, rounded) not in self._models:
            self._models[model, seed, rounded] = ReferenceModel(model, seed, rounded=rounded)
        return self._models[model, seed, rounded]

    def run(
        self, model: ModelConfig, workload: Workload, seed: int, rounded: bool = False
    ) -> ReferenceRun:
        """What the reference makes of a workload."""
        key = model, workload, seed, rounded
        if key not in self._runs:
            prompts = workload.prompt_token_ids(model.vocab_size)
            of_weights = self.model(model, seed, rounded)
            self._runs[key] = of_weights.generate(prompts, workload.output_len)
        return self._runs[key]


@pytest.fixture(scope="session")
def imported() -> Iterator[Imported]:
    """A process that has imported torch, for what is forked instead of started."""
    process = Imported()
    yield process
    process.close()


@pytest.fixture(scope="module")
def forked_servers(imported: Imported) -> Iterator[None]:
    """Fork servers that this process starts are forked: without the 2 s that an import takes."""
    with imported.serving():
        yield


@pytest.fixture(scope="session")
def pools(imported: Imported) -> Iterator[PoolKeeper]:
    """Ranks that persist from test to test."""
    keeper = PoolKeeper(imported)
    yield keeper
    keeper.close()


@pytest.fixture(scope="session")
def references() -> ReferenceRuns:
    """What runs are held against."""
    return ReferenceRuns()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, for tests that are marked `chromium.NEEDS_CHROMIUM`."""
    from playwright.sync_api import sync_playwright

    from chromium import CHROMIUM, QUIET

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """One tiny checkpoint a family."""
    from model.families import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))
