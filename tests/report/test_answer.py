"""The answer of a comparison fits a screen of 40 lines and 80 columns, whatever was compared."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import example_projection
import example_results as example
from expertlane.report import terminal
from expertlane.report.answer import compact, compact_range
from expertlane.report.document import Figure
from expertlane.report.sections import report_of
from expertlane.results.estimate import Estimate
from expertlane.results.pair import PairRecord
from expertlane.results.results import Results, VirtualTime
from expertlane.spec.deployment import Deployment
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause, Phase

LONG = "a deployment whose name is as long as a name can get before it is a sentence"


def shown(results: Results) -> list[str]:
    """The lines of a terminal of 80 columns."""
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    terminal.show_answer(report_of(results), console, Path("results/example/report.html"))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def with_pair(results: Results, ratio: Estimate, **causes_s: Estimate) -> Results:
    """The same with its first proposal and its first baseline measured in turns."""
    own = results.select("measured")
    one = next(each for each in own if not each.is_baseline)
    other = next(each for each in own if each.is_baseline)
    steps_s = one.decode.round_s.value, other.decode.round_s.value
    by_cause = {Cause[name]: each for name, each in causes_s.items()}
    pair = PairRecord("measured", one.name, other.name, Phase.DECODE, 5, ratio, *steps_s, by_cause)
    return replace(results, pairs=(pair,))


def in_virtual_time(results: Results) -> Results:
    """The same records in virtual time too."""
    virtual = tuple(replace(each, source="virtual") for each in results.select("measured"))
    return replace(
        results,
        deployments=results.deployments + virtual,
        pairs=results.pairs + tuple(replace(each, source="virtual") for each in results.pairs),
        virtual_time=VirtualTime("h100", 1.5, 59.0, ()),
    )


def many(num: int, name: str = "{}") -> Results:
    """Deployments of which the second half are proposals."""
    made = [
        Deployment(name.format(place), Layout(dp=2, ep=2), is_baseline=place < num // 2)
        for place in range(num)
    ]
    return example.results([(each, 0.1 + 0.01 * place) for place, each in enumerate(made)])


SURE = Estimate(1.06, 1.04, 1.09)
CASES = {
    "usual": example.usual(),
    "one": example.results([(example.EXPERT, 0.2)]),
    "prefill": example.results([(example.TENSOR, 0.4), (example.EXPERT, 0.1)], output_len=1),
    "one, prefill": example.results([(example.EXPERT, 0.1)], output_len=1),
    "ten": with_pair(many(10), SURE),
    "ten with long names": with_pair(many(10, LONG + " {}"), SURE),
    "thirty": with_pair(many(30, "deployment number {} of all"), SURE),
    "projected": example_projection.usual(),
}
CASES |= {
    f"{name}, virtual": in_virtual_time(results)
    for name, results in CASES.items()
    if name != "projected"
}
CASES |= {
    f"{name}, and projected": results.beside(example_projection.usual())
    for name, results in CASES.items()
    if name != "projected"
}


@pytest.mark.parametrize("name", CASES)
def test_it_fits_a_screen(name: str) -> None:
    lines = shown(CASES[name])
    assert len(lines) <= 40, "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert lines[-1].endswith("report.html")
    words = " ".join(lines)
    assert "as fast as" in words or "nothing to compare it with" in words


@pytest.mark.parametrize("name", CASES)
def test_no_word_is_broken(name: str) -> None:
    """Every word on the screen is one that the report has."""
    answer = report_of(CASES[name]).answer
    known = {*re.findall(r"\S+", f"{answer.setting} {answer.headline}")}
    for part in answer.parts:
        if isinstance(part, str):
            known.update(part.split())
        elif isinstance(part, Figure):
            known.update(" ".join(part.lines).split())
        else:
            cells = [each.heading for each in part.columns]
            known.update(" ".join([*cells, *(cell for row in part.rows for cell in row)]).split())
    known.update(["More:", "--full,", "or", "results/example/report.html"])
    assert {word for line in shown(CASES[name]) for word in line.split()} <= known


def test_who_wins_by_how_much_how_surely_on_what_clock_and_why() -> None:
    given = with_pair(
        example.results([(example.TENSOR, 0.4), (example.EXPERT, 0.1)]),
        SURE,
        PIPELINE_BUBBLE=Estimate(-0.057, -0.060, -0.054),
        DISPATCH_COMBINE=Estimate(0.022, 0.020, 0.024),
        ROUTER=Estimate(0.001, -0.001, 0.003),  # no more than noise
    )
    assert shown(in_virtual_time(given)) == [
        "example, top-2 | 16 ranks on 2 cores | virtual time, links scaled from h100",
        "EP 16 is 1.06× as fast as TP 8 × PP 2 in decode, virtual time (1.04–1.09, 5",
        "runs).",
        "",
        "deployment   tok/s  min–max  TPOT  p95   TTFT   rel  largest cost",
        "TP 8 × PP 2   40.0        —   400  400  4,000  1.00  experts 50%",
        "EP 16          160        —   100  100  1,000  1.06  experts 50%",
        "",
        "Why, ms per step: TP 8 × PP 2 400 → EP 16 100",
        "  bubble -57.0   dispatch +22.0",
        "",
        "rel: against TP 8 × PP 2. In brackets: 90 % intervals.",
        "",
        "EP 16 is 1.06× as fast as TP 8 × PP 2 in decode, wall time (1.04–1.09, 5 runs).",
        "Which to believe: virtual time for a cluster (a core per rank, links as of",
        "h100), wall time for this machine (16 ranks on 2 cores).",
        "",
        "More: --full, or results/example/report.html",
    ]


def test_not_significant_and_nothing_but_noise() -> None:
    given = with_pair(
        example.results([(example.TENSOR, 0.1), (example.EXPERT, 0.1)]),
        Estimate(1.02, 0.98, 1.06),
        EXPERTS=Estimate(-0.002, -0.005, 0.001),
    )
    lines = shown(given)
    assert lines[1].startswith("Not significant: EP 16 is 1.02× as fast as TP 8 × PP 2 in decode")
    why = "Why, ms per step: TP 8 × PP 2 100 → EP 16 100; no cause differs by more than"
    assert any(line.startswith(why) for line in lines)


def test_of_too_many_the_pair_the_first_and_the_fastest_are_shown() -> None:
    lines = shown(CASES["thirty"])
    for number in (1, 2, 16):
        assert any(line.startswith(f"#{number} deployment number") for line in lines)
    assert "14 more deployments: --full." in " ".join(lines)


def test_long_names_have_their_numbers() -> None:
    lines = shown(CASES["ten with long names"])
    assert any(line.startswith("#10 a deployment whos…") for line in lines)


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.500"), (438.2, "438"), (9_999.0, "9,999"), (42_123.0, "42.1k")]
)
def test_rates(value: float, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(5.0), "—"),
        (Estimate(5.0, 5.0, 5.0), "—"),
        (Estimate(500.0, 438.0, 568.0), "438–568"),
        (Estimate(41e3, 39_123.0, 42_441.0), "39.1–42.4k"),
    ],
)
def test_ranges(estimate: Estimate, text: str) -> None:
    assert compact_range(estimate) == text
