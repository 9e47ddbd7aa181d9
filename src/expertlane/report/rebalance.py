"""Experts that moved while requests ran: what was predicted, and what came of it."""

from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import NONE, bytes_si, milliseconds, times
from expertlane.results.rebalance import RebalanceResult
from expertlane.results.schema import DeploymentResult


def rebalancing(deployments: tuple[DeploymentResult, ...]) -> Section | None:
    """All decisions; None where no deployment rebalances."""
    rows = [
        _row(place, each)
        for place, deployment in enumerate(deployments, start=1)
        for each in deployment.rebalances
    ]
    if not rows:
        return None
    columns = (
        text("#"),
        number("step"),
        number("saves"),
        number("costs"),
        number("to move"),
        text("done"),
        number("in use"),
        number("load before"),
        number("after"),
        number("predicted"),
        number("experts before"),
        number("after"),
    )
    return Section(
        "Rebalancing",
        (
            Table("", columns, tuple(rows)),
            "Saves, costs: predicted, over as many steps as the decision was taken by. In use: "
            "from that step on, unless the work ended first. Load: the fullest rank over the "
            "mean, all layers, counted in as many steps before the decision and after the switch; "
            "predicted: after, if tokens came evenly from all ranks. Experts: processor time a "
            "step of the rank that spends most on experts.",
        ),
    )


def _row(place: int, each: RebalanceResult) -> tuple[str, ...]:
    after = NONE if each.load_after is None else times(each.load_after)
    experts_s = NONE if each.experts_s_after is None else milliseconds(each.experts_s_after)
    return (
        str(place),
        str(each.step),
        milliseconds(each.gain_s),
        milliseconds(each.cost_s),
        bytes_si(each.num_bytes),
        "moved" if each.gain_s > each.cost_s else "stayed",
        NONE if each.switched is None else str(each.switched),
        times(each.load_before),
        after,
        times(each.predicted_after),
        milliseconds(each.experts_s_before),
        experts_s,
    )
