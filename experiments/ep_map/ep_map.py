"""When does expert parallelism win? A map over model, load, devices and link, with measured points.

    python experiments/ep_map/ep_map.py --out results/ep_map
    python experiments/ep_map/ep_map.py --docs

Writes ep_map.md and ep_map.html into a folder, or the page and the pictures of these documents. All
numbers of the map are projected; measured.csv beside this has what others measured, which
pairs.py took from a file of public measurements.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from cells import (
    DEVICES,
    HARDWARE,
    MODELS,
    OUTPUT_LEN,
    PROMPT_LEN,
    SAME,
    SEQS_PER_DEVICE,
    Cell,
    Hardware,
    Pair,
    cells_of,
    decode_steps,
    projected_factor,
)

from expertlane.report import html, markdown
from expertlane.report.charts.colours import style_sheet
from expertlane.report.charts.svg import NARROW_PX, SMALL_PX, Spec, nominal, svg
from expertlane.report.document import (
    Answer,
    Chart,
    Legend,
    Multiples,
    Report,
    Section,
    Table,
    number,
    text,
)
from expertlane.report.numbers import counted, milliseconds, signed, times
from expertlane.spec.files import write_text
from expertlane.spec.ranges import SKEW_BOUNDS

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
OWN = HERE.parents[1] / "benchmarks" / "results" / "2026-11-26-bench_factor.json"
COMMAND = "python experiments/ep_map/ep_map.py"
TITLE = "When does expert parallelism win?"
COLOURS = {"EP": "--below", "no EP": "--above", "even": "--silver", "neither": "--card"}
SIDES = {
    "EP": "EP has more tokens/s",
    "no EP": "without EP has more",
    "even": f"within {SAME - 1:.0%}, or depends on routing",
}
MARKS = {"EP": "triangle-up", "no EP": "triangle-down", "even": "circle"}
ROW_PX, GAP_PX, TITLE_PX = 26, 14, 22
_EXPONENTS = ", ".join(f"{name} {config.usual_skew:g}" for name, (config, _) in MODELS.items())
HOW = (
    f"A square is one load on one cluster: requests of {PROMPT_LEN:,} prompt and {OUTPUT_LEN:,} "
    "output tokens, and a number of concurrent sequences per GPU. Its number is a ratio of output "
    "tokens/s: the best deployment with experts spread over GPUs (ep > 1), over the best without "
    "(ep = 1). Both use all of these GPUs, as expertlane plan screens them. Routing follows Zipf's "
    f"law with the usual exponent of the model ({_EXPONENTS}). A square is grey if the two are "
    f"within {SAME - 1:.0%}, or if exponent {SKEW_BOUNDS[0]:g} or {SKEW_BOUNDS[1]:g} would reverse "
    "their order."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute the map and write it; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder for ep_map.md and ep_map.html")
    where.add_argument("--docs", action="store_true", help="write the page of the documentation")
    options = parser.parse_args(arguments)
    with ProcessPoolExecutor() as processes:
        report, charts = made(list(product(MODELS, HARDWARE, DEVICES)), pairs(), processes.map)
    if options.docs:
        folder = DOCS / "_static"
        written = {
            folder / "when_does_ep_win.svg": picture(charts, SMALL_PX, len(HARDWARE)),
            folder / "when_does_ep_win_narrow.svg": picture(charts, NARROW_PX, 1),
            DOCS / "when_does_ep_win.md": page(report),
        }
    else:
        written = {
            options.out / "ep_map.md": markdown.render(report),
            options.out / "ep_map.html": html.render(report),
        }
    for path, content in written.items():
        print(write_text(path, content))
    return 0


def made(
    clusters: Sequence[tuple[str, Hardware, int]],
    measured: Sequence[Pair],
    over: Callable[..., Iterable[Any]] = map,
) -> tuple[Report, list[Chart]]:
    """The report, and the charts in it: a row of them for each model.

    Args:
        over: calls a function for each item, as `map` does.
    """
    largest_first = sorted(clusters, key=lambda each: -each[2])
    found = over(cells_of, *zip(*largest_first, strict=True))
    of_pairs = over(projected_factor, measured)
    cells = [cell for of_cluster in found for cell in of_cluster]
    regions = [region for each in panels(cells) for region in regions_of(each)]
    regions = [region for region in regions if region[0].side != "even"]
    whys = list(over(why, regions))
    judged = list(zip(measured, of_pairs, strict=True))
    charts = [chart(each, measured) for each in panels(cells)]
    headline = in_short(cells)
    sections = (
        Section(
            "In short, projected",
            (HOW, Multiples("", tuple(charts), legend=legend())),
            "top",
        ),
        Section("Each region and why, projected", (_regions(regions, whys),), "tables"),
        Section("Measured by others", measured_parts(judged), "tables"),
        Section("Measured by this engine", own_parts(), "tables"),
    )
    answer = Answer("the best with expert parallelism over the best without", headline)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Report(TITLE, answer, "projected", COMMAND, created, sections), charts


def pairs() -> list[Pair]:
    """What others measured, as measured.csv has it."""
    with (HERE / "measured.csv").open(encoding="utf-8", newline="") as file:
        kinds = Pair.__annotations__
        return [
            Pair(**{name: kinds[name](value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]


def panels(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells of each model on each hardware, in the order of both."""
    cells = list(cells)
    found = (
        [each for each in cells if (each.model, each.hardware) == of]
        for of in product(MODELS, HARDWARE)
    )
    return [each for each in found if each]


def regions_of(panel: Sequence[Cell]) -> list[list[Cell]]:
    """A panel's cells by side, where both sides fit; the clearest cell first."""
    found = []
    for side in SIDES:
        own = [each for each in panel if each.side == side and each.factor is not None]
        own.sort(key=lambda each: each.factor or 0, reverse=side == "EP")
        if own:
            found.append(own)
    return found


def in_short(cells: Sequence[Cell]) -> str:
    """How often each side wins, and how far."""
    compared = [each for each in cells if each.factor is not None]
    of_side = {side: [each for each in compared if each.side == side] for side in SIDES}
    most = max(compared, key=lambda each: each.factor or 0)
    least = min(compared, key=lambda each: each.factor or 0)
    return (
        f"Of {counted(len(compared), 'combination')} of model, link, GPUs and load, EP has more "
        f"tokens/s in {len(of_side['EP'])}, a deployment without it in {len(of_side['no EP'])}; "
        f"{len(of_side['even'])} are within a factor of {SAME:g} or depend on the routing. The "
        f"highest ratio, with EP over without, is {times(most.factor or 0)}: {_where(most)}. "
        f"The lowest is {times(least.factor or 0)}: {_where(least)}."
    )


def _where(cell: Cell) -> str:
    return (
        f"{cell.model} on {cell.num_devices} {cell.hardware.name} with {cell.seqs_per_device:g} "
        "sequences per GPU"
    )


def why(region: Sequence[Cell]) -> str:
    """The decode steps of the clearest cell, and what EP saves and costs most in them."""
    clearest = region[0]
    steps = decode_steps(clearest)
    assert steps is not None, "both sides fit"
    assert clearest.with_ep is not None, "both sides fit"
    assert clearest.without is not None, "both sides fit"
    layouts = clearest.with_ep.candidate.layout, clearest.without.candidate.layout
    each_s = [step.round_s.value for step in steps]
    causes = {*steps[0].breakdown_s, *steps[1].breakdown_s}
    differences = {
        cause: steps[0].breakdown_s.get(cause, 0.0) - steps[1].breakdown_s.get(cause, 0.0)
        for cause in causes
    }
    told = sorted(differences, key=differences.__getitem__)
    least, most = (f"{cause} {signed(differences[cause] * 1e3)}" for cause in (told[0], told[-1]))
    sentence = (
        f"{clearest.num_devices} GPUs, {clearest.seqs_per_device:g} each: "
        f"{milliseconds(each_s[0])} ms as {layouts[0]}, {milliseconds(each_s[1])} as {layouts[1]}; "
        f"{least}, {most}"
    )
    if steps[0].num_seqs != steps[1].num_seqs:
        sentence += f"; memory holds {steps[0].num_seqs:,} and {steps[1].num_seqs:,} sequences"
    return sentence


def _regions(regions: Sequence[Sequence[Cell]], whys: Sequence[str]) -> Table:
    rows = list(zip(regions, whys, strict=True))
    columns = (
        text("model", lambda row: row[0][0].model),
        text("on", lambda row: row[0][0].hardware.name),
        text("region", lambda row: SIDES[row[0][0].side]),
        text("GPUs", lambda row: _span(each.num_devices for each in row[0])),
        text("sequences per GPU", lambda row: _span(each.seqs_per_device for each in row[0])),
        text("with over without EP", lambda row: _factors(row[0])),
        text("a decode step with and without EP; what EP saves and costs most", lambda row: row[1]),
    )
    return Table.of("", columns, rows)


def _span(values: Iterable[float]) -> str:
    low, *_, high = [*sorted(found := set(values)), max(found)]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _factors(cells: Sequence[Cell]) -> str:
    found = [each.factor for each in cells if each.factor is not None]
    low, high = min(found), max(found)
    first, last = times(low), times(high)
    return last if first == last else f"{first.removesuffix('×')} to {last}"


def measured_parts(judged: Sequence[tuple[Pair, float | None]]) -> tuple[str | Table, ...]:
    """The pairs, and in how many of them the model has the order right."""
    told = [(pair.factor, found) for pair, found in judged if found is not None]
    clear = [each for each in told if _side(each[0]) != "even"]
    right = sum((one > 1) == (other > 1) for one, other in clear)
    columns = (
        text("on", lambda row: f"{row[0].num_devices} {row[0].hardware.upper()}"),
        text("framework", lambda row: row[0].framework),
        text("type", lambda row: row[0].dtype),
        number("prompt", lambda row: row[0].prompt_len, "{:,}".format),
        number("output", lambda row: row[0].output_len, "{:,}".format),
        number("sequences", lambda row: row[0].num_seqs, "{:,}".format),
        number("days apart", lambda row: row[0].days),
        number("measured", lambda row: row[0].factor, times),
        number("projected", lambda row: row[1], times),
    )
    words = (
        f"DeepSeek-R1 with experts spread over GPUs (ep = tp), over the same with each expert "
        f"split across all GPUs (ep = 1), at one load. Attention is tensor-parallel in both. "
        f"{counted(len(judged), 'pair')} of public measurements. The two of a pair were measured "
        "on different days; where those are far apart, with different releases of the framework. "
        f"Of the {len(clear)} pairs that differ by more than {SAME - 1:.0%}, the projection of the "
        f"same two layouts has the same order in {right}.{_of_even(told)}"
    )
    return words, Table.of("Output tokens/s with EP over without", columns, judged)


def _of_even(told: Sequence[tuple[float, float]]) -> str:
    even = [found for factor, found in told if _side(factor) == "even"]
    if not even:
        return ""
    return (
        f" The other {len(even)} were measured within that; of them the projection says "
        f"{times(min(even))} to {times(max(even))}."
    )


def own_parts() -> tuple[str | Table, ...]:
    """What bench_factor.py (docs/log.md) measured, where its results are beside this."""
    if not OWN.exists():
        return ()
    columns = (
        number("sequences", lambda case: case["batch"], "{:,}".format),
        text("router", lambda case: f"skew {case['skew']:g}" if case["skew"] else "balanced"),
        number("EP 16 over the best baseline", _own_factor, times),
    )
    words = (
        "A small copy of the paper's model on 16 real ranks of a CPU, in virtual time: computation "
        "is measured, links are those of 16 H100 in two nodes. DP 2 × TP 8, EP 2 is the best "
        "baseline everywhere. EP 16 has one expert per rank, so with a skewed router there is "
        "nothing to balance."
    )
    cases = json.loads(OWN.read_text(encoding="utf-8"))["cases"]
    return words, Table.of("", columns, cases)


def _own_factor(case: dict[str, Any]) -> float:
    at_scale: float = next(
        each["over_best_baseline"] for each in case["factors"] if each["scale"] == case["scale"]
    )
    return at_scale


def _side(factor: float) -> str:
    return "EP" if factor >= SAME else "no EP" if factor <= 1 / SAME else "even"


def chart(panel: Sequence[Cell], measured: Sequence[Pair]) -> Chart:
    """One model on one hardware: GPUs down, load across."""
    first = panel[0]
    title = f"{first.model}, {first.hardware.name}"
    values = [_value(each) for each in panel]
    points = [] if first.model != "DeepSeek-V3" else _points(first.hardware, measured)
    columns = (
        number("GPUs", lambda each: each.num_devices),
        number("sequences per GPU", lambda each: f"{each.seqs_per_device:g}"),
        text("more tokens/s", lambda each: each.side),
        number("with over without EP", lambda each: each.factor, times),
        text("best with EP", lambda each: each.with_ep and str(each.with_ep.candidate)),
        text("best without", lambda each: each.without and str(each.without.candidate)),
    )
    return Chart(
        title,
        f"Output tokens/s with expert parallelism over without, of {title}.",
        _spec(values, points),
        Table.of(title, columns, panel),
        note=first.hardware.link,
    )


def _value(cell: Cell) -> Spec:
    return {
        "load": f"{cell.seqs_per_device:g}",
        "gpus": str(cell.num_devices),
        "side": cell.side,
        "said": "" if cell.factor is None else f"{cell.factor:.2f}",
    }


def _points(hardware: Hardware, measured: Sequence[Pair]) -> list[Spec]:
    return [
        {"load": f"{each.place:g}", "gpus": str(each.num_devices), "mark": _side(each.factor)}
        for each in measured
        if each.hardware == hardware.profile and each.num_devices in DEVICES
    ]


def _spec(values: list[Spec], points: list[Spec]) -> Spec:
    axis = {"labelAngle": 0, "ticks": False, "domain": False}
    scale = {"paddingInner": 0.06, "paddingOuter": 0}
    loads, gpus = [f"{each:g}" for each in SEQS_PER_DEVICE], [*map(str, reversed(DEVICES))]
    at = {
        "x": nominal("load", "sequences per GPU")
        | {"axis": axis, "scale": scale | {"domain": loads}},
        "y": nominal("gpus", "GPUs") | {"axis": axis, "scale": scale | {"domain": gpus}},
    }
    side = {"field": "side", "type": "nominal", "legend": None}
    side["scale"] = {"domain": list(COLOURS), "range": list(COLOURS.values())}
    layers: list[Spec] = [
        {
            "mark": {"type": "rect", "fillOpacity": 0.55},
            "encoding": at | {"color": side},
        },
        {
            "mark": {"type": "text", "color": "--ink", "fontSize": 11},
            "encoding": at | {"text": {"field": "said"}},
        },
    ]
    for name, shape in MARKS.items():
        own = [each for each in points if each["mark"] == name]
        mark = {"type": "point", "shape": shape, "size": 26, "filled": True, "color": "--ink"}
        place = {"xOffset": -13, "yOffset": -8, "opacity": 1}
        if own:
            layers.append({"data": {"values": own}, "mark": mark | place, "encoding": at})
    return {"data": {"values": values}, "height": ROW_PX * len(DEVICES), "layer": layers}


def legend() -> list[Legend]:
    """What colours and marks stand for."""
    shades = [Legend(words, COLOURS[side], opacity=0.55) for side, words in SIDES.items()]
    return [
        *shades,
        Legend("▲ measured: EP faster; ▼ slower; ● within 5%", "--card", opacity=0.0),
    ]


def picture(charts: Sequence[Chart], width_px: int, num_columns: int) -> str:
    """All charts in one SVG file, on a background of its own, light or dark as a reader's."""
    height = ROW_PX * len(DEVICES) + 44
    parts, pitch = [], height + TITLE_PX + GAP_PX
    for place, each in enumerate(charts):
        x = GAP_PX + place % num_columns * (width_px + GAP_PX)
        y = GAP_PX + place // num_columns * pitch
        drawn = str(svg(each.spec, f"map-{place}", width_px))
        size = f'<svg x="{x}" y="{y + TITLE_PX}" width="{width_px}" height="{height}" '
        parts.append(_words(x, y + 14, each.title, 'font-weight="600"'))
        parts.append(re.sub(r"^<svg ", size + 'preserveAspectRatio="xMinYMin" ', drawn))
    y = GAP_PX + -(-len(charts) // num_columns) * pitch
    for words, colour in [(SIDES[side], COLOURS[side]) for side in SIDES]:
        parts.append(
            f'<rect x="{GAP_PX}" y="{y}" width="14" height="14" fill="var({colour})" '
            'fill-opacity="0.55"/>' + _words(GAP_PX + 22, y + 12, words)
        )
        y += 20
    parts.append(_words(GAP_PX, y + 12, "▲ measured by others: EP faster; ▼ slower; ● within 5 %"))
    width = GAP_PX + num_columns * (width_px + GAP_PX)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 26}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12"><title>{TITLE}</title>'
        f"<style>{style_sheet()}</style>"
        f'<rect width="{width}" height="{y + 26}" rx="10" fill="var(--card)"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _words(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="var(--ink)" {more}>{words}</text>'


def page(report: Report) -> str:
    """The documentation's page: the answer, the picture, then the report's words."""
    head, _, rest = markdown.render(report).partition("\n\n")
    alternative = "A map for each model and link: output tokens/s with EP over without."
    shown = (
        '<picture><source media="(max-width: 46em)" '
        'srcset="_static/when_does_ep_win_narrow.svg">\n'
        f'<img class="map" src="_static/when_does_ep_win.svg" alt="{alternative}"></picture>'
    )
    links = " ".join(f"{each.name}: {each.link}." for each in HARDWARE)
    made_by = f"Written by `{COMMAND} --docs`; `--out FOLDER` writes it as a report. {links}"
    return "\n\n".join([head, f"**{report.answer.headline}**", shown, made_by, rest])


if __name__ == "__main__":
    sys.exit(main())
