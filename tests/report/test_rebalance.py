"""Decisions about moving experts, as a table."""

from dataclasses import replace

from example_results import usual
from expertlane.report.rebalance import rebalancing
from expertlane.results.rebalance import RebalanceResult

MOVED = RebalanceResult(
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
)
STAYED = replace(MOVED, step=19, switched=None, gain_s=0.1, load_after=None, experts_s_after=None)


def test_no_deployment_rebalances():
    assert rebalancing(usual().deployments) is None


def test_what_was_done_and_what_came_of_it():
    first, *others = usual().deployments
    section = rebalancing((first, replace(others[0], rebalances=(MOVED, STAYED))))
    moved, stayed = section.parts[0].rows
    assert moved[:7] == ("2", "8", "500", "250", "6.00 MB", "moved", "11")
    assert moved[7:] == ("1.75×", "1.25×", "1.20×", "20.0", "10.0")
    assert stayed[5:9] == ("stayed", "—", "1.75×", "—")
