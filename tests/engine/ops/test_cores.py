"""Cores of ranks: shares of made-up machines; pinning on this one."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertlane.engine.ops import host
from expertlane.engine.ops.host import divide, pin, read_nodes, share_of
from expertlane.errors import UserError

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system pins no process"
)


def machine(folder: Path, nodes: list[str], siblings: dict[int, str] | None = None) -> Path:
    """A tree as in `/sys/devices/system`.

    Args:
        nodes: the list of hardware threads of each.
        siblings: of each hardware thread, the list of those of its core.
    """
    for number, cpus in enumerate(nodes):
        place = folder / f"node/node{number}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(cpus + "\n")
    for cpu, of_core in (siblings or {}).items():
        place = folder / f"cpu/cpu{cpu}/topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(of_core + "\n")
    return folder


def test_a_system_that_tells_nothing_has_one_node_of_single_cores(tmp_path):
    assert read_nodes({0, 2, 3}, tmp_path) == [[(0,), (2,), (3,)]]
    assert read_nodes((), tmp_path) == []


def test_nodes_and_hardware_threads(tmp_path):
    """Two sockets of two cores of two threads, numbered as Linux does it on most servers."""
    siblings = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    there = machine(tmp_path, ["0-1,4-5", "2-3,6-7"], siblings)
    assert read_nodes(range(8), there) == [[(0, 4), (1, 5)], [(2, 6), (3, 7)]]
    # Of a core that is allowed in part there is that part; of a node that is not, nothing.
    assert read_nodes({1, 2, 5}, there) == [[(1, 5)], [(2,)]]
    assert read_nodes({4, 5}, there) == [[(4,), (5,)]]


def test_a_hardware_thread_of_no_node_still_counts(tmp_path):
    there = machine(tmp_path, ["0-1"])
    assert read_nodes({0, 1, 7}, there) == [[(0,), (1,)], [(7,)]]


def test_ten_nodes_are_in_order_of_their_numbers(tmp_path):
    there = machine(tmp_path, [str(node) for node in range(11)])
    assert read_nodes(range(11), there) == [[(node,)] for node in range(11)]


def cores_of(*sizes: int) -> list[list[tuple[int, ...]]]:
    """Nodes of so many cores each."""
    numbers = iter(range(sum(sizes)))
    return [[(next(numbers),) for _ in range(size)] for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "first_and_size"),
    [
        ((2,), 1, [(0, 2)]),
        ((2,), 2, [(0, 1), (1, 1)]),
        ((8, 8), 2, [(0, 8), (8, 8)]),
        ((8, 8), 4, [(0, 4), (4, 4), (8, 4), (12, 4)]),
        ((5, 5), 4, [(0, 2), (2, 2), (5, 2), (7, 2)]),  # a core of each node is left over
        ((8, 8), 3, [(0, 5), (5, 5), (10, 5)]),  # the second has cores of both nodes
        ((12, 4), 2, [(0, 8), (8, 8)]),
        ((8, 8), 1, [(0, 16)]),
        ((2,), 3, []),
        ((), 1, []),
    ],
)
def test_shares(sizes, num_ranks, first_and_size):
    shares = divide(cores_of(*sizes), num_ranks)
    assert shares == [
        [(core,) for core in range(first, first + size)] for first, size in first_and_size
    ]


@given(st.lists(st.integers(1, 9), max_size=4), st.integers(1, 12))
def test_shares_are_equal_and_have_no_core_in_common(sizes, num_ranks):
    nodes = cores_of(*sizes)
    shares = divide(nodes, num_ranks)
    assert len(shares) == (num_ranks if num_ranks <= sum(sizes) else 0)
    used = list(chain.from_iterable(shares))
    assert len(set(used)) == len(used)
    assert {len(share) for share in shares} <= {sum(sizes) // num_ranks}
    each = sum(sizes) // num_ranks
    if each and sum(size // each for size in sizes) >= num_ranks:
        assert all(any({*share} <= {*node} for node in nodes) for share in shares)


@pytest.fixture
def eight(monkeypatch, tmp_path):
    """Four cores of two hardware threads in two nodes, all allowed."""
    siblings = {cpu: f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}" for cpu in range(8)}
    monkeypatch.delenv("EXPERTLANE_PIN", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(host, "num_cores", lambda: 8)
    return machine(tmp_path, ["0-3", "4-7"], siblings)


def test_a_rank_gets_a_thread_a_core_and_all_hardware_threads_of_it(eight):
    assert share_of(0, 1, eight) == host.Share(8, 4, tuple(range(8)))
    assert share_of(1, 2, eight) == host.Share(8, 2, (4, 5, 6, 7))
    assert share_of(3, 4, eight) == host.Share(8, 1, (6, 7))


def test_more_ranks_than_cores_stay_where_they_are_put(eight):
    assert share_of(4, 5, eight) == host.Share(8, 1, ())


def test_cores_of_a_container_with_a_quota_are_others_too(eight, monkeypatch):
    monkeypatch.setattr(host, "num_cores", lambda: 3)
    assert share_of(0, 1, eight) == host.Share(3, 3, ())
    assert share_of(1, 2, eight) == host.Share(3, 1, ())


def test_pinning_can_be_switched_off(eight, monkeypatch):
    monkeypatch.setenv("EXPERTLANE_PIN", "0")
    assert share_of(1, 2, eight) == host.Share(8, 2, ())
    monkeypatch.setenv("EXPERTLANE_PIN", "no")
    with pytest.raises(UserError, match="EXPERTLANE_PIN is 'no'; valid: 0, 1"):
        share_of(1, 2, eight)


def test_a_system_without_affinity(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(host, "num_cores", lambda: 4)
    assert share_of(1, 2, tmp_path) == host.Share(4, 2, ())
    assert not pin(())


# Pins itself, and a thread that it has already, to what its arguments say; then waits.
_PINNED = """
import os, sys, threading, time
from pathlib import Path
from expertlane.engine.ops.host import pin
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
is_pinned = pin([int(sys.argv[2])], Path(sys.argv[1]))
threads = map(int, os.listdir("/proc/self/task"))
print(is_pinned, *sorted(set().union(*map(os.sched_getaffinity, threads))), flush=True)
sys.stdin.read()
"""


class Pinned:
    """A process that has tried to pin itself."""

    def __init__(self, system: Path, cpu: int, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PINNED, str(system), str(cpu)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"EXPERTLANE_PIN": ""} | variables,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline().split()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


@needs_affinity
def test_one_engine_at_a_time_is_pinned_to_a_core(tmp_path):
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one core: nothing to pin to")
    first, floating = allowed[0], [str(cpu) for cpu in allowed]
    for cpu in allowed:
        (tmp_path / f"cpu/cpu{cpu}").mkdir(parents=True)
    with Pinned(tmp_path, first) as one:
        assert one.said == ["True", str(first)]  # both of its threads
        with Pinned(tmp_path, first) as other:
            assert other.said == ["False", *floating]
        with Pinned(tmp_path, first, EXPERTLANE_PIN="1") as other:
            assert other.said == ["True", str(first)]
        with Pinned(tmp_path, allowed[1]) as other:
            assert other.said == ["True", str(allowed[1])]
    with Pinned(tmp_path, first) as other:  # the first has ended
        assert other.said == ["True", str(first)]


@needs_affinity
def test_where_nobody_can_hold_a_core_ranks_are_pinned(tmp_path):
    first = min(os.sched_getaffinity(0))
    with Pinned(tmp_path, first) as one, Pinned(tmp_path, first) as other:
        assert one.said == other.said == ["True", str(first)]
