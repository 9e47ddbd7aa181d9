"""Experts that moved while requests ran: what was predicted, and what came of it."""

from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import NONE, bytes_si, milliseconds, times
from expertlane.results.rebalance import RebalanceResult
from expertlane.results.schema import DeploymentResult


def rebalancing(deployments: tuple[DeploymentResult, ...]) -> Section | None:
    """All decisions; None where no deployment rebalances."""
    taken = [
        (place, each)
        for place, deployment in enumerate(deployments, start=1)
        for each in deployment.rebalances
    ]
    if not taken:
        return None
    return Section(
        "Rebalancing",
        (
            _decisions(taken),
            _effects(taken),
            "The last repetition. Saves, costs: predicted, over as many steps as the decision was "
            "taken by. In use: from that step on; too late: the work ended before the experts "
            "were there. Load: the fullest rank over the mean, all layers, counted in as many "
            "steps before the decision and after the switch; predicted: after, if tokens came "
            "evenly from all ranks. Experts: processor time a step of the rank that spends most "
            "on experts.",
        ),
    )


def _decisions(taken: list[tuple[int, RebalanceResult]]) -> Table:
    columns = (
        text("#"),
        number("step"),
        number("saves ms"),
        number("costs ms"),
        number("to move"),
        text("done"),
        number("in use"),
    )
    rows = tuple(
        (
            str(place),
            str(each.step),
            milliseconds(each.gain_s),
            milliseconds(each.cost_s),
            bytes_si(each.num_bytes),
            _done(each),
            NONE if each.switched is None else str(each.switched),
        )
        for place, each in taken
    )
    return Table("Decisions", columns, rows)


def _done(each: RebalanceResult) -> str:
    if each.switched is not None:
        return "moved"
    return "too late" if each.gain_s > each.cost_s else "stayed"


def _effects(taken: list[tuple[int, RebalanceResult]]) -> Table:
    columns = (
        text("#"),
        number("step"),
        number("load before"),
        number("load after"),
        number("load predicted"),
        number("experts ms before"),
        number("experts ms after"),
    )
    rows = tuple(
        (
            str(place),
            str(each.step),
            times(each.load_before),
            NONE if each.load_after is None else times(each.load_after),
            times(each.predicted_after),
            milliseconds(each.experts_s_before),
            NONE if each.experts_s_after is None else milliseconds(each.experts_s_after),
        )
        for place, each in taken
    )
    return Table("Effects", columns, rows)
