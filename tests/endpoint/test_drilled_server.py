"""Our own server, drilled: a rank that is killed or hangs costs no token, and `/health` is true."""

import sys

import pytest

from comparison.test_server_process import wait_gone
from expertlane.client.connection import Url
from expertlane.client.run import Target
from expertlane.comparison.engines.known import Expertlane
from expertlane.comparison.served import HOST, free_port, is_ready
from expertlane.comparison.server_process import ServerProcess
from expertlane.endpoint.drill import DrillOptions, drill
from expertlane.endpoint.faults import SignalFault
from expertlane.endpoint.processes import below, processes, rank_process
from expertlane.progress import Progress
from expertlane.results.drill_record import LOST
from expertlane.spec.layout import Layout
from expertlane.spec.workload import LengthRange, Load

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
LAYOUT = Layout.parse("dp=4,ep=4")
# A rank that hangs does so for longer than `/health` may be wrong.
START_S, TIMEOUT_S, STALL_S, HEALTH_S, HANG_S = 240.0, 12.0, 2.0, 8.0, 40.0
ASKED = DrillOptions(
    Load(12, LengthRange(12, 12), LengthRange(24, 40), batch=6), 0, 15.0, 40.0, HANG_S, HEALTH_S
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("signal", ["KILL", "STOP"])
def test_a_lost_rank_costs_no_token(tmp_path, signal):
    port = free_port()
    argv = [sys.executable, "-m", "expertlane", "serve", "paper-tiny", "--layout", str(LAYOUT)]
    argv += ["--timeout-s", f"{TIMEOUT_S:g}", "--stall-s", f"{STALL_S:g}"]
    argv += ["--port", str(port), "--oversubscribe"]
    url = Url(HOST, port, False, "")
    with ServerProcess(argv, {}, tmp_path) as process:
        process.wait_until(lambda: is_ready(url, "/health"), START_S)
        process.linger()

        def fault_of(root: int | None) -> SignalFault:
            assert root is not None
            rank = rank_process(root, [Expertlane.rank_title], LAYOUT, 2)
            assert rank.name == "expertlane r2"
            return SignalFault(rank.pid, signal, "rank 2")

        record = drill(Target(url), ASKED, fault_of, Progress()).record
        pids = [*below(process.guard_pid, processes())]
    assert not record.why_failed
    assert record.num_of(*LOST) == 0
    assert record.num_of("as before") > ASKED.load.num_requests
    assert record.num_of("as before") + record.num_of("tie") == sum(
        each.num for each in record.outcomes
    )
    assert record.changes.compared == "token ids"
    assert record.changes.tie_nats is not None
    assert record.is_running
    assert record.is_local
    assert record.left == ()
    assert record.pause_s > (TIMEOUT_S if signal == "STOP" else 0)
    if signal == "STOP":
        assert {*record.health.statuses} == {200, 503}
        assert STALL_S / 2 < record.health.well_but_silent_s < TIMEOUT_S / 2
    assert not wait_gone(pids)
