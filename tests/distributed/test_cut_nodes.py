"""A server on two hosts with networks of their own, one of which is cut off, or lost."""

import os
import signal

import pytest

from distributed.cut_nodes import (
    cut_off_and_back,
    end,
    lose_fork_server,
    lose_host,
    serve_without,
    served,
)
from distributed.namespaces import why_not

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def _can_have_networks():
    if why := why_not():
        pytest.skip(why)


@pytest.mark.parametrize("by", ["torchrun", "variables"])
def test_a_host_comes_back_and_no_token_is_another_one(by):
    with served(by=by) as run:
        run.start_all()
        for act in (cut_off_and_back, lose_fork_server, lose_host, end):
            act(run)
            assert run.faults() == [], run.report()


@pytest.mark.parametrize("mute", [0, 1])
def test_a_cut_in_one_direction_is_one_for_both(mute):
    with served(by="variables") as run:
        run.start_all()
        run.hosts.mute(mute)
        run.see_line("it is lost", "; recovering")
        run.see_ranks("its ranks are dead", 0)
        run.hosts.unmute(mute)
        run.see_line("node 1 is back", "is back after")
        run.see_tokens("clients have whole answers")
        run.stop_clients()
        assert run.faults() == [], run.report()


def test_the_first_host_serves_alone_while_the_other_is_cut_off():
    with served(by="variables", options=("--on-failure", "shrink")) as run:
        run.start_all()
        serve_without(run)
        end(run)
        assert run.faults() == [], run.report()


def test_a_host_that_stays_cut_off_ends_all_on_both_sides():
    with served(by="variables", rejoin_s=20.0) as run:
        run.start_all()
        run.hosts.cut()
        run.see_line("the end", "did not come back within 20 s; all ranks were ended")
        for host in range(2):
            run.see(f"no process is left on host {host}", lambda at=host: not run.hosts.pids(at))


def test_a_cut_is_noticed_after_the_bound_where_that_is_shorter():
    with served(by="variables", options=("--timeout-s", "3")) as run:
        run.start_all()
        run.hosts.cut()
        run.see_line("it is lost", "has not answered for")
        run.hosts.mend()
        run.see_line("node 1 is back", "is back after")
        run.see_tokens("clients have whole answers")
        run.stop_clients()
        assert run.faults() == [], run.report()


def test_the_first_host_can_be_told_to_end_while_the_other_is_cut_off():
    with served(by="variables", rejoin_s=1000.0, options=("--drain-s", "2")) as run:
        run.start_all()
        run.hosts.cut()
        run.see_line("it is lost", "; recovering")
        (first,) = run.hosts.processes[0]
        os.killpg(first.pid, signal.SIGTERM)
        run.see("no process is left on host 0", lambda: not run.hosts.pids(0))
        assert not any("Traceback" in line for line in run.said(0)), run.report()
