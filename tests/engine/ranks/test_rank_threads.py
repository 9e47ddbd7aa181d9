"""As many threads as cores: what ranks start while they compute, and where they are kept."""

import os
from pathlib import Path

import pytest

from expertlane.engine.llm import LLM
from expertlane.engine.ops.host import read_nodes
from expertlane.spec.sampling import SamplingParams

TASKS = Path("/proc")
ALLOWED = os.sched_getaffinity(0) if TASKS.exists() else set()
CORES = [core[0] for node in read_nodes(ALLOWED) for core in node][:2]

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="not two cores of Linux")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """All that this process may use meanwhile."""
    monkeypatch.setenv("EXPERTLANE_PIN", "1")  # other tests run beside this one
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    os.sched_setaffinity(0, CORES)
    yield
    os.sched_setaffinity(0, ALLOWED)


def threads_after_running(
    layout: str, dtype: str
) -> tuple[list[list[str]], list[set[int]], list[list[int]]]:
    """The threads of each rank, where all of them may run, and where it says that it is kept."""
    with LLM("paper-tiny", layout=layout, dtype=dtype) as llm:
        prompts = [[first] * 40 for first in range(1, 9)]  # prefill of many rows, then decode
        llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
        pids = [llm._pool.pid(rank) for rank in range(llm._pool.num_ranks)]
        threads = [os.listdir(TASKS / str(pid) / "task") for pid in pids]
        places = [set().union(*map(os.sched_getaffinity, map(int, each))) for each in threads]
    return threads, places, [each.cpus for each in llm.machine]


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        ("float32", ""),
        ("bfloat16", "torch"),
        pytest.param("bfloat16", "", marks=pytest.mark.full),
        pytest.param("float32", "torch", marks=pytest.mark.full),
    ],
)
def test_two_ranks_on_two_cores_have_two_threads(monkeypatch, backend, dtype):
    monkeypatch.setenv("EXPERTLANE_BACKEND", backend)
    threads, places, kept = threads_after_running("tp=2", dtype)
    assert [len(each) for each in threads] == [1, 1]
    assert places == [{CORES[0]}, {CORES[1]}]
    assert kept == [[CORES[0]], [CORES[1]]]


def test_one_rank_on_two_cores_has_a_thread_on_each():
    threads, places, kept = threads_after_running("tp=1", "float32")
    # Its own, OpenMP's second, and one that sleeps in a pool of torch's that nothing uses.
    assert 2 <= len(threads[0]) <= 3
    assert places == [set(CORES)]
    assert kept == [sorted(CORES)]


def test_more_ranks_than_cores_have_a_thread_each_and_are_moved_freely():
    threads, places, kept = threads_after_running("dp=3,ep=3", "float32")
    assert [len(each) for each in threads] == [1, 1, 1]
    assert places == [set(CORES)] * 3
    assert kept == [[], [], []]
