"""Decisions about moving experts, as a table."""

from dataclasses import replace

from example_results import usual
from expertlane.report.compared import run
from expertlane.report.traffic import rebalancing
from expertlane.results.record import DeploymentRecord, RebalanceRecord

MOVED = RebalanceRecord(
    replica=0,
    step=8,
    switched=11,
    gain_s=0.5,
    cost_s=0.25,
    num_bytes=6_000_000,
    predicted_before=1.7,
    predicted_after=1.2,
    load_before=1.75,
    load_after=1.25,
    experts_s_before=0.02,
    experts_s_after=0.01,
    paid_s=0.125,
)
NOT_MOVED = {"switched": None, "load_after": None, "experts_s_after": None, "paid_s": None}
STAYED = replace(MOVED, step=19, gain_s=0.1, **NOT_MOVED)


def of(*records: DeploymentRecord):
    return rebalancing(run(replace(usual(), deployments=records), "measured"))


def test_no_deployment_rebalances():
    assert not of(*usual().deployments).parts


def test_what_was_done_and_what_came_of_it():
    first, *others = usual().deployments
    section = of(first, replace(others[0], rebalances=(MOVED, STAYED)))
    decisions, effects, _ = section.parts
    assert decisions.rows == (
        ("2", "8", "500", "250", "6.00 MB", "moved", "11"),
        ("2", "19", "100", "250", "6.00 MB", "not worth it", "—"),
    )
    assert effects.rows == (
        ("2", "8", "1.75×", "1.25×", "1.20×", "20.0", "10.0", "125"),
        ("2", "19", "1.75×", "—", "1.20×", "20.0", "—", "—"),
    )


def test_moves_that_the_work_did_not_wait_for():
    too_late = replace(MOVED, **NOT_MOVED)
    section = of(replace(usual().deployments[0], rebalances=(too_late,)))
    assert section.parts[0].rows[0][5:] == ("too late", "—")
