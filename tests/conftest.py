"""Hooks and fixtures of all tests: markers, forked processes, shared ranks and reference runs."""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its kernels run as Python
    os.environ["TRITON_INTERPRET"] = "1"

from distributed.on_ranks import local_ranks
from documented.commands import kept_results
from expertlane.engine.ranks.pool import RankPool
from expertlane.spec.model import ModelConfig
from expertlane.spec.workload import Workload
from forked import Forks
from parity.reference import ReferenceModel, ReferenceRun

_TIMEOUT_S = 60.0
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--start-anew", action="store_true", help="start Python processes, fork none")


# The same draws in every run, none of them judged by how long it takes.
hypothesis.settings.register_profile(
    "tests",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


gc.disable()  # while 13,000 tests are collected: a fifth less time


def pytest_collection_finish() -> None:
    """Collect garbage from here on, of what tests make alone."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> object:
    """Of a test marked `smoke(n)`, mark all cases as `full` except n that are evenly spaced.

    With `-m "not full"` those that are `full` are not collected at all.
    """
    cases = yield
    if not isinstance(cases, list):  # a class, or nothing
        return cases
    short = [each for each in cases if not each.get_closest_marker("full")]
    if short and (smoke := short[0].get_closest_marker("smoke")):
        (wanted,) = smoke.args
        stride = max(1, len(short) // wanted)  # a shift each, else it may meet one value alone
        kept = {place * len(short) // wanted + place % stride for place in range(wanted)}
        for place, item in enumerate(short):
            if place not in kept:
                item.add_marker(pytest.mark.full)
        short = [item for place, item in enumerate(short) if place in kept]
    return short if collector.config.getoption("markexpr") == "not full" else cases


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One torch thread: two are fifty times slower on small matrices where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Signals end tests that a shell started in the background too, where it has them ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Remove the signal handlers that a command leaves, which would end later tests at once."""
    before = {number: signal.getsignal(number) for number in _HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class PoolKeeper:
    """Keeps one pool of ranks per dtype; the ranks keep their process groups by layout."""

    def __init__(self) -> None:
        self._pools: dict[str, RankPool] = {}

    def pool(self, num_ranks: int, dtype: str = "float32") -> RankPool:
        """At least `num_ranks` ranks: those there are, or new ones if a failed case ended them."""
        pool = self._pools.get(dtype)
        if pool is None or pool.is_closed or pool.num_ranks < num_ranks:
            if pool is not None:
                pool.close()
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
        """The reference's tokens and logits for a workload."""
        key = model, workload, seed, rounded
        if key not in self._runs:
            prompts = workload.prompt_token_ids(model.vocab_size)
            of_weights = self.model(model, seed, rounded)
            self._runs[key] = of_weights.generate(prompts, workload.output_len)
        return self._runs[key]


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests work in a temporary folder, and write nothing into the checkout's own results."""
    before = kept_results()
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        yield
    assert kept_results() == before


@pytest.fixture(scope="session", autouse=True)
def forks(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Forks]:
    """Python processes that tests start are forks, unless `--start-anew` is given."""
    forks = Forks(tmp_path_factory.mktemp("command_lines"))
    if pytestconfig.getoption("start_anew") or sys.platform != "linux":
        yield forks
        return
    with forks.in_place():
        yield forks
    forks.close()


@pytest.fixture(autouse=True)
def as_marked(request: pytest.FixtureRequest, forks: Forks) -> Iterator[None]:
    """Tests marked `starts_anew` start new Python processes."""
    if request.node.get_closest_marker("starts_anew") is None:
        yield
        return
    with forks.paused():
        yield


@pytest.fixture(scope="session")
def pools(forks: Forks) -> Iterator[PoolKeeper]:
    """Ranks that persist from test to test."""
    keeper = PoolKeeper()
    yield keeper
    keeper.close()


@pytest.fixture(scope="session")
def references() -> ReferenceRuns:
    """Reference runs, computed once."""
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
    """One tiny checkpoint per family."""
    from engine.model.families import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))
