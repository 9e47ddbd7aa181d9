"""Service level objectives: limits of latency statistics."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from expertlane.errors import UserError
from expertlane.spec.ranges import RANGES, Strict, shown

LatencyMetric = Literal["ttft", "tpot", "itl", "e2e"]
Statistic = Literal["mean", "median", "p90", "p95", "p99"]

_EXAMPLE = "ttft.p95=500ms,tpot.mean=20ms"
_UNITS_S = {"ms": 1e-3, "s": 1.0}  # `ms` first: it ends in `s` too


@dataclass(frozen=True)
class SLO(Strict):
    """A statistic of a latency over all requests of a load, and its limit.

    One request meets it if its own latency is within the limit; of its ITL, that statistic.
    """

    metric: LatencyMetric
    statistic: Statistic
    limit_s: float

    def __str__(self) -> str:
        return f"{self.metric.upper()} {self.statistic} ≤ {self.limit}"

    @property
    def limit(self) -> str:
        """The limit with its unit: `500 ms`, `10 s`."""
        return f"{self.limit_s:g} s" if self.limit_s >= 1 else f"{1e3 * self.limit_s:g} ms"

    @property
    def name(self) -> str:
        """Metric and statistic, as in the option: `ttft.p95`."""
        return f"{self.metric}.{self.statistic}"


def parse_slos(texts: Iterable[str], option: str = "--slo") -> tuple[SLO, ...]:
    """Read `ttft.p95=500ms,tpot.mean=20ms`, each text with one objective or several.

    Args:
        option: the option's name in messages.

    Raises:
        UserError: one is malformed, or given twice.
    """
    found: dict[str, SLO] = {}
    for part in (part for text in texts for part in text.split(",")):
        slo = _parse(part.strip(), option)
        if slo.name in found:
            raise UserError(f"{option}: {slo.name} is given twice")
        found[slo.name] = slo
    return tuple(found.values())


def _parse(text: str, option: str) -> SLO:
    name, _, limit = text.partition("=")
    metric, _, statistic = (part.strip() for part in name.lower().partition("."))
    statistic = "median" if statistic == "p50" else statistic
    if not statistic and metric in get_args(LatencyMetric):
        first, *others = (f".{each}" for each in get_args(Statistic))
        raise UserError(
            f"{option} is {shown(text)}: of which statistic? write "
            f"{metric}{first}={limit.strip()}, or {', '.join(others)}"
        )
    for what, word, valid in (
        ("latency", metric, get_args(LatencyMetric)),
        ("statistic", statistic, get_args(Statistic)),
    ):
        if word not in valid:
            raise UserError(
                f"{option} is {shown(text)}: no {what} is called {shown(word)}; valid: "
                f"{', '.join(valid)}; an example: {_EXAMPLE}"
            )
    limit, allowed = limit.strip().lower(), RANGES["limit_s"]
    unit = next((unit for unit in _UNITS_S if limit.endswith(unit)), None)
    number = None if unit is None else allowed.parse(limit.removesuffix(unit))
    if unit is None or number is None:
        raise UserError(
            f"{option} is {shown(text)}: the limit must be {allowed}, with its unit, ms or s; an "
            f"example: {_EXAMPLE}"
        )
    return SLO(metric, statistic, number * _UNITS_S[unit])  # type: ignore[arg-type]
