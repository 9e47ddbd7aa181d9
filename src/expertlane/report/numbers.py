"""Formats of numbers: three significant digits, SI units, a dash for none."""

import math
import textwrap

from expertlane.results.estimate import Estimate

NONE = "—"
COLUMNS = 80  # columns of a line that fits any terminal
Amount = float | Estimate  # an estimate's likely value is what is written

MINUS = "−"
_MANY = 10_000
_ROUNDING_S = 1e-12
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def figures(amount: Amount) -> str:
    """Three significant digits, never in powers of ten: `1,234`, `12.3`, `0.0123`."""
    value = likely(amount)
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    num_decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return _with_minus(f"{rounded if abs(value) < 1000 else value:,.{num_decimals}f}")


def _with_minus(number: str) -> str:
    """The number with a minus sign as wide as a plus."""
    return number.replace("-", MINUS)


def likely(amount: Amount) -> float:
    """The likely value, without its bounds."""
    return amount.value if isinstance(amount, Estimate) else amount


def signed(value: float) -> str:
    """`figures` with a sign in front."""
    return ("+" if value > 0 else "") + figures(value)


def milliseconds(seconds: Amount) -> str:
    """Seconds as milliseconds, the unit left to the column; less than a picosecond is rounding."""
    value = likely(seconds)
    return figures(1e3 * value if abs(value) >= _ROUNDING_S else 0.0)


def duration(seconds: Amount) -> str:
    """`350 ms`, `14 s`, `1 m 8 s`, `2 h 5 m`."""
    value = likely(seconds)
    if value < 1:
        return f"{figures(1e3 * value)} ms"
    if value < 9.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} m" if hours else f"{minutes} m {rest} s"


def whole(count: float) -> str:
    """`1,234`."""
    return f"{count:,.0f}"


def percent(share: float) -> str:
    """`41%`; small shares keep a digit."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return _with_minus(f"{share:.1%}" if 0 < abs(share) < 0.0995 else f"{share:.0%}")


def times(factor: float) -> str:
    """`3.75×`."""
    return f"{figures(factor)}×"


def bytes_si(num_bytes: float) -> str:
    """`1.23 MB`; powers of 1000."""
    return _scaled(num_bytes, "B")


def rate_si(per_second: float, unit: str) -> str:
    """`12.3 GFLOP/s`."""
    return _scaled(per_second, f"{unit}/s")


def _scaled(value: float, unit: str) -> str:
    rounded = float(f"{value:.3g}")  # so that 999.9 k becomes 1.00 M
    for scale, prefix in _SI:
        if abs(rounded) >= scale:
            return f"{figures(rounded / scale)} {prefix}{unit}"
    return f"{figures(rounded)} {unit}"


def low_high(estimate: Estimate) -> str:
    """`4.79–8.87`; a dash where nothing is known of bounds, or there is no range."""
    if estimate.low is None or estimate.high is None or estimate.low == estimate.high:
        return NONE
    return f"{figures(estimate.low)}–{figures(estimate.high)}"


def low_high_ms(seconds: Estimate) -> str:
    """`low_high` in milliseconds."""
    return low_high(seconds * 1e3)


def low_high_thousands(estimate: Estimate) -> str:
    """`low_high` in thousands."""
    return low_high(estimate / 1e3)


def with_bounds(estimate: Estimate) -> str:
    """`6.40 (3.20–12.8)`; the number alone where there is no range."""
    bounds = low_high(estimate)
    return figures(estimate) if bounds == NONE else f"{figures(estimate)} ({bounds})"


def compact(amount: Amount) -> str:
    """`112.7k` from ten thousand on, `1.13M` from a million on, else `figures`."""
    value = likely(amount)
    if abs(value) < _MANY:
        return figures(value)
    return f"{value / 1e3:.1f}k" if abs(value) < 100 * _MANY else f"{value / 1e6:.2f}M"


def low_high_compact(estimate: Estimate) -> str:
    """`76–138k` from ten thousand on, else `low_high`."""
    low, _, high = estimate.bounds
    if estimate.low is None or low < _MANY or low == high:
        return low_high(estimate)
    return f"{low / 1e3:,.0f}–{high / 1e3:,.0f}k"


def shortened(name: str, width: int) -> str:
    """A name with its middle left out where it is wider."""
    if len(name) <= width:
        return name
    begin = (width - 1) // 2
    return f"{name[:begin]}…{name[len(name) - (width - 1 - begin) :]}"


def setting_lines(setting: str, width: int = COLUMNS) -> list[str]:
    """A setting's lines, which end at its bars; the last one has none."""

    def height(line: str) -> int:
        return len(textwrap.wrap(line, width, break_on_hyphens=False))

    first, *others = setting.split(" | ")
    lines = [first]
    for place, piece in enumerate(others, 1):
        joined = f"{lines[-1]} | {piece}"
        end = " |" if place < len(others) else ""
        if height(f"{joined}{end}") > height(f"{lines[-1]} |"):
            lines.append(piece)
        else:
            lines[-1] = joined
    return lines


def counted(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def span(values: set[int]) -> str:
    """`5` or `5–6`; a dash of none."""
    if not values:
        return NONE
    least, most = min(values), max(values)
    return f"{least}" if least == most else f"{least}–{most}"
