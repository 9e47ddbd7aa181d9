"""Tokens per second while the layout of a running engine changes, and the pause of each change.

    python benchmarks/bench_scale.py [LAYOUT ...] [--seconds 10] [--runs 1] [--picture scale.svg]

One engine (`paper-small`, random weights) decodes 16 requests all the time; ended ones are followed
by others. After every `--seconds` the layout becomes the next one: in one run all at once, in the
next one prepared ahead, in turns. A pause is the longest time between two steps that brought tokens
from the switch on; of it, `scaling` is until new ranks are up, `loading` until all ranks have their
weights, `replaying` until a step is committed. Ranks share the cores of this machine, so more ranks
do not make it faster here.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_recovery import MODEL, Clients
from rich.console import Console
from rich.table import Table

from expertlane import __version__
from expertlane.engine.elastic.scaling import LayoutChange
from expertlane.engine.llm import LLM
from expertlane.schedule.request import Chunk
from expertlane.spec.layout import Layout
from expertlane.spec.names import Origin

BIN_S = 0.5
LAYOUTS = ["dp=2,ep=2", "dp=4,ep=4", "dp=8,ep=8", "dp=3,ep=3", "dp=16,ep=16"]
_LEAST_S = 0.1  # of a rate
_WIDTH, _HEIGHT, _LEFT, _LOW = 640, 200, 40, 30  # of the picture, and of its margins


def measure(layouts: Sequence[str], seconds: float, *, ahead: bool) -> dict[str, Any]:
    """Times of all tokens, and of the changes.

    Args:
        ahead: ranks make their weights before the layout changes.
    """
    with LLM(
        MODEL, layout=layouts[0], oversubscribe=True, on_failure="replace", num_blocks=1024
    ) as llm:
        clients, times = Clients(llm), []
        step = llm.engine.step

        def counted_step(*given: Any, **more: Any) -> list[Chunk]:
            chunks = step(*given, **more)
            times.extend([time.perf_counter() - began_s] * len(chunks))
            return chunks

        llm.engine.step = counted_step  # type: ignore[method-assign]
        began_s = time.perf_counter()
        asked, switched = [], []
        for layout in [*layouts[1:], None]:
            until_s = time.perf_counter() + seconds
            while time.perf_counter() < until_s:
                clients.step()
            if layout is not None:
                asked.append(time.perf_counter() - began_s)
                if ahead:
                    llm.scaling.prepare(Layout.parse(layout))
                    while not llm.scaling.advance():
                        clients.step()
                switched.append(time.perf_counter() - began_s)
                llm.scale(layout)
        changes = llm.scaling.changes
        return {
            "layouts": list(layouts),
            "ahead": ahead,
            "asked_s": asked,
            "switched_s": switched,
            "changes": [
                _facts(each)
                | {
                    "pause_s": _pause(times, at_s),
                    "rate_share": None
                    if not ahead
                    else _rate(times, asked_s, at_s) / _rate(times, asked_s - seconds, asked_s),
                }
                for each, asked_s, at_s in zip(changes, asked, switched, strict=True)
            ],
            "tokens_per_s": (_bins(times) / BIN_S).tolist(),
        }


def _facts(change: LayoutChange) -> dict[str, Any]:
    return {
        "to": str(change.after),
        "ahead_s": change.ahead_s,
        "state_s": {state.value: seconds for state, seconds in change.record.seconds().items()},
        "num_requests": change.record.num_requests,
        "bytes_from": {origin.value: change.bytes_from(origin) for origin in Origin},
    }


def _rate(times: Sequence[float], begin_s: float, end_s: float) -> float:
    """Tokens per second."""
    first, last = np.searchsorted(times, [begin_s, end_s])
    return float(last - first) / max(end_s - begin_s, _LEAST_S)


def _pause(times: Sequence[float], at_s: float) -> float:
    """The longest time without a token, from the last one before a moment on."""
    first = max(0, int(np.searchsorted(times, at_s)) - 1)
    return max(b - a for a, b in pairwise(times[first : first + 200]))


def _bins(times: Sequence[float]) -> np.ndarray:
    return np.bincount((np.array(times) / BIN_S).astype(int))


def picture(found: dict[str, Any]) -> str:
    """Tokens per second over time, with the layouts; each from the switch to it on."""
    rates = found["tokens_per_s"]
    total_s, most = BIN_S * len(rates), max(rates)
    right, high = _WIDTH - 10, _HEIGHT - _LOW

    def x(seconds: float) -> float:
        return round(_LEFT + (right - _LEFT) * seconds / total_s, 1)

    def y(rate: float) -> float:
        return round(high - (high - 24) * rate / most, 1)

    steps = [f"{x(i * BIN_S)},{y(r)} {x((i + 1) * BIN_S)},{y(r)}" for i, r in enumerate(rates)]
    begins = [0.0, *found["switched_s"]]
    text = 'font-family="sans-serif" font-size="11" fill="currentColor"'
    marks = [
        f'<line x1="{x(at)}" x2="{x(at)}" y1="16" y2="{high}" stroke="currentColor" '
        f'stroke-dasharray="2 3"/><text x="{x(at) + 3}" y="12" {text}>{layout}</text>'
        for at, layout in zip(begins, found["layouts"], strict=True)
    ]
    axis = [
        f'<text x="{x(at)}" y="{high + 14}" {text}>{at} s</text>'
        for at in range(0, int(total_s), 10)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'role="img" style="color: #555">',
            "<title>Tokens per second while the layout changes</title>",
            f'<text x="2" y="{y(most) + 4}" {text}>{most:,.0f}</text>',
            f'<text x="2" y="{high}" {text}>0</text>',
            *marks,
            *axis,
            f'<polyline points="{" ".join(steps)}" fill="none" stroke="#0072b2" '
            'stroke-width="1.5"/>',
            f'<text x="{_LEFT}" y="{_HEIGHT - 2}" {text}>tokens per second, in bins of '
            f"{BIN_S} s</text>",
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("layouts", nargs="*", default=LAYOUTS)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each layout")
    parser.add_argument("--runs", type=int, default=1, help="of each kind, in turns")
    parser.add_argument("--picture", type=Path, help="an SVG file")
    given = parser.parse_args()
    found = [
        measure(given.layouts, given.seconds, ahead=ahead)
        for _ in range(given.runs)
        for ahead in (False, True)
    ]
    Console().print(table(found))
    if given.picture is not None:
        given.picture.write_text(picture(found[-1]))
    print(json.dumps({"benchmark": "scale", "version": __version__, "results": found}))


def table(found: Sequence[dict[str, Any]]) -> Table:
    """A row for each change: medians over runs, all at once and prepared."""
    shown = Table(
        *("to", "pause s, at once and ahead", "preparing s", "tokens/s meanwhile"),
        *("loading s", "computed again", "MB kept, ahead, read"),
    )
    for number in range(len(found[0]["changes"])):
        at_once, ahead = (
            [run["changes"][number] for run in found if run["ahead"] is which]
            for which in (False, True)
        )
        pauses = [median(each["pause_s"] for each in of) for of in (at_once, ahead)]
        loading = [median(each["state_s"]["loading"] for each in of) for of in (at_once, ahead)]
        sizes = (ahead[0]["bytes_from"][which] / 1e6 for which in ("kept", "ahead", "read"))
        shown.add_row(
            ahead[0]["to"],
            ", ".join(f"{pause:.2f}" for pause in pauses),
            f"{median(each['ahead_s'] for each in ahead):.1f}",
            f"{median(each['rate_share'] for each in ahead):.0%}",
            ", ".join(f"{seconds:.2f}" for seconds in loading),
            str(ahead[0]["num_requests"]),
            ", ".join(f"{size:,.0f}" for size in sizes),
        )
    return shown


if __name__ == "__main__":
    main()
