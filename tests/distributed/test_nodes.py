"""Ranks of two nodes, both on this machine: contracts 1 and 3 beyond the launcher's own node."""

import re
import signal
import threading
import time
from functools import partial

import numpy as np
import psutil
import pytest

from cli.screen import telling
from distributed.on_ranks import Echo, FailWhileOthersWait, RanksOnNodes, Stay
from distributed.running import LONG, LONG_MODEL, deployment, run_deployment
from engine.ranks.processes import wait_until
from expertlane.engine.launch import describe_ranks
from expertlane.engine.ranks.pool import RankPool
from expertlane.errors import RankError, TerminatedError, UserError
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload
from parity.contract import check_contract

TINY = PRESETS["paper-tiny"]
WORKLOAD = Workload(num_sequences=9, prompt_len=5, output_len=3, seed=7)
TIMEOUT_S = 2.5


@pytest.fixture(scope="module")
def two_nodes():
    with RankPool(RanksOnNodes(2, 2, 60.0), 60.0) as pool:
        yield pool


def test_ranks_are_forked_from_a_process_without_threads(two_nodes):
    """One that another thread of it has locked out, as of the resolver, would wait for ever."""
    assert psutil.Process(two_nodes.pid(0)).parent().num_threads() == 1


def sent_bytes(run):
    """By rank, over all steps: replicas' steps may end in another order."""
    records = [record for step in run.steps for record in step.outcome.records]
    return [sum(each.sent_bytes for each in records if each.rank == rank) for rank in range(4)]


@pytest.mark.smoke(3)
@pytest.mark.numerical
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dp=4,ep=4", {"overlap": True}),
        ("dp=4,ep=4", {"dispatch": "hierarchical"}),
        ("dp=4,ep=4", {"dispatch": "all_gather"}),
        ("tp=4", {}),  # every collective spans the nodes
        ("pp=2,tp=2", {"num_micro_batches": 2, "micro_batch_schedule": "rotating"}),
        ("tp=2,pp=2", {"num_micro_batches": 2}),
        ("dp=2,tp=2,ep=2", {}),
        ("replicas=2,dp=2,ep=2", {}),
    ],
)
def test_results_are_the_reference_s_and_bit_for_bit_those_of_one_node(
    two_nodes, pools, references, layout, options
):
    reference = references.run(TINY, WORKLOAD, 0)
    chosen = deployment(layout, **options)
    runs = [
        run_deployment(
            pool,
            TINY,
            chosen,
            WORKLOAD,
            forced=reference.tokens,
            return_logits=True,
            ranks_per_node=2,
        )
        for pool in (two_nodes, pools.pool(4))
    ]
    check_contract(reference, runs[0].logits, runs[0].tokens)
    np.testing.assert_array_equal(runs[0].logits, runs[1].logits)
    np.testing.assert_array_equal(*map(sent_bytes, runs))


@pytest.mark.numerical
def test_ranks_know_their_nodes(two_nodes):
    machines = describe_ranks(two_nodes)
    assert [each.ranks_per_node for each in machines] == [2] * 4
    name = machines[0].backend
    assert name.startswith("shared_memory")
    assert name.endswith(", gloo between nodes")
    assert [two_nodes.pid(rank) is None for rank in range(4)] == [False, False, True, True]


class TwoNodes:
    """A pool of two nodes whose ranks run something long, and the processes behind it."""

    def __init__(self):
        self.ranks = RanksOnNodes(2, 2, TIMEOUT_S)
        (supervisor,) = self.ranks.supervisors
        supervisor = psutil.Process(supervisor.pid)
        server = psutil.Process(self.ranks._server.pid)
        self.pool = RankPool(self.ranks, TIMEOUT_S)
        here, there = (
            sorted(child.pid for child in each.children())[-2:]  # the store's host came first
            for each in (server, supervisor)
        )
        self.processes = {"fork server": server, "supervisor": supervisor}
        for rank, pid in enumerate(here + there):
            self.processes[f"rank {rank}"] = psutil.Process(pid)

    def error_after(self, process, number):
        """Signal a process while ranks are in a step: the error that ends them, and seconds."""
        at_s = []

        def act():
            assert wait_until(lambda: self.ranks.board.position(2).step >= 3)
            at_s.append(time.monotonic())
            self.processes[process].send_signal(number)

        thread = threading.Thread(target=act)
        thread.start()
        with pytest.raises((RankError, TerminatedError)) as caught:
            run_deployment(self.pool, LONG_MODEL, deployment("dp=2,tp=2,ep=2"), LONG)
        took_s = time.monotonic() - at_s[0]
        thread.join()
        return caught.value, took_s

    def are_gone(self):
        """Whether no process is left, in a moment."""
        return not psutil.wait_procs(self.processes.values(), timeout=60)[1]

    def close(self):
        """End all, whatever state they are in."""
        for each in self.processes.values():
            if each.is_running():
                each.kill()
        self.pool.close()


@pytest.fixture
def long_run():
    started = TwoNodes()
    yield started
    started.close()


_full = partial(pytest.param, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("process", "number", "said"),
    [
        ("rank 3", signal.SIGKILL, r"rank 3 .* SIGKILL .*step \d+, (layer \d, )?stage .*"),
        ("supervisor", signal.SIGKILL, r".*supervisor.* node 1 .*127\.0\.0\.1.* gone.*"),
        _full("rank 2", signal.SIGSTOP, r"rank 2 hung .*step \d+, .*stage .*2\.5 s.*"),
        _full("supervisor", signal.SIGSTOP, r".*supervisor.* node 1 .*127\.0\.0\.1.* hung.*4\.5.*"),
        _full("fork server", signal.SIGSTOP, r".*fork server.* hung.*2\.5.*"),
        _full("supervisor", signal.SIGTERM, r".*SIGTERM.*"),
    ],
)
def test_all_end_with_a_process_of_a_node(long_run, process, number, said):
    """Also where its ranks would go on: they end a supervisor that is stopped."""
    error, took_s = long_run.error_after(process, number)
    assert took_s < (TIMEOUT_S if number == signal.SIGSTOP else 0) + 10
    if number == signal.SIGSTOP and process != "fork server":
        assert took_s >= TIMEOUT_S
    assert isinstance(error, TerminatedError) == (number == signal.SIGTERM)
    assert re.match(said, str(error))
    assert number == signal.SIGTERM or "all ranks" in str(error)
    assert long_run.are_gone()


def test_calls_between_the_nodes(long_run):
    assert long_run.pool.call(Echo("x")) == [(rank, "x") for rank in range(4)]
    with pytest.raises(
        RankError, match=telling("rank 2 failed layer 0 stage router ValueError: broken")
    ):
        long_run.pool.call(FailWhileOthersWait(2))
    assert long_run.are_gone()


@pytest.mark.full
def test_a_silent_rank_of_another_node_tells_where_it_is(long_run):
    with pytest.raises(RankError, match=telling("rank 3 hung step 5 layer 1 stage attention")):
        long_run.pool.call(Stay(60), ranks=[3])
    assert long_run.are_gone()


def test_closing_leaves_nothing(long_run):
    long_run.pool.close()
    assert long_run.are_gone()
    assert long_run.ranks.supervisors[0].returncode == 0


@pytest.mark.full
def test_a_mistake_that_ranks_of_another_node_find():
    with pytest.raises(UserError, match=r"^dtype float16 needs a GPU"):
        RankPool(RanksOnNodes(2, 1, TIMEOUT_S, "float16"), TIMEOUT_S)
