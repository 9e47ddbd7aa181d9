"""How far tokens spread: on how many ranks the experts of a token are."""

from collections.abc import Mapping, Sequence
from itertools import cycle

from expertlane.report.charts.colours import SERIES
from expertlane.report.charts.encoding import Spec, colour, nominal, quantity, tooltip
from expertlane.report.document import Chart, Heading, Legend, Table
from expertlane.report.numbers import figures, percent

_HEIGHT_PX = 200


def fan_out_chart(title: str, tokens: Mapping[str, Sequence[int]]) -> Chart | None:
    """A histogram a deployment, side by side; None where nothing was counted.

    Args:
        tokens: by deployment, [num_ranks + 1]; tokens that reached 0, 1, 2 … ranks.
    """
    shares = {name: [num / sum(each) for num in each] for name, each in tokens.items() if any(each)}
    if not shares:
        return None
    most = max(place for each in shares.values() for place, share in enumerate(each) if share)
    reached = range(1, most + 1)
    by_place = {
        name: [each[place] if place < len(each) else 0.0 for place in reached]
        for name, each in shares.items()
    }
    legend = list(map(Legend, shares, cycle(SERIES)))
    return Chart(
        title,
        "Shares of tokens by how many ranks they reach. In the mean: "
        + "; ".join(f"{name} {figures(_mean(each))}" for name, each in shares.items())
        + ".",
        _spec(by_place, reached, legend),
        Table(
            title,
            (Heading("deployment", False), *map(Heading, ["mean", *map(str, reached)])),
            tuple(
                (name, figures(_mean(shares[name])), *map(percent, each))
                for name, each in by_place.items()
            ),
        ),
        legend=legend,
        note="A token counts once a layer; its own rank counts if it has one of its experts.",
    )


def _mean(shares: Sequence[float]) -> float:
    return sum(place * share for place, share in enumerate(shares))


def _spec(
    by_place: Mapping[str, Sequence[float]], reached: range, legend: Sequence[Legend]
) -> Spec:
    values = [
        {"deployment": name, "ranks": place, "share": share, "shown": percent(share)}
        for name, each in by_place.items()
        for place, share in zip(reached, each, strict=True)
    ]
    ranks = nominal("ranks", "ranks reached by a token") | {"axis": {"labelAngle": 0}}
    return {
        "data": {"values": values},
        "height": _HEIGHT_PX,
        "mark": {"type": "bar"},
        "encoding": {
            "x": ranks,
            "xOffset": nominal("deployment"),
            "y": quantity("share", "share of tokens", {"format": "%"}),
            "color": colour("deployment", legend),
            "tooltip": tooltip(deployment="deployment", ranks="ranks", shown="tokens"),
        },
    }
