"""The answer of a comparison fits a screen of 40 lines and 80 columns, whatever was compared."""

import re
from dataclasses import replace

import pytest

import example_projection
import example_results as example
from cli.screen import in_order
from expertlane.report.answer import compact, compact_range
from expertlane.report.document import Chart, Table
from expertlane.report.sections import report_of
from expertlane.results.estimate import Estimate
from expertlane.results.hardware import VirtualTime
from expertlane.results.record import EXPERIMENT
from expertlane.results.results import Results, WorkloadVerdict
from expertlane.spec.deployment import Deployment
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause
from report.shown import answer_lines

LONG = "a deployment whose name is as long as a name can get before it is a sentence"


def shown(results: Results) -> list[str]:
    return answer_lines(report_of(results))


def many(num: int, name: str = "{}") -> Results:
    """Deployments of which the second half are proposals."""
    made = [
        Deployment(name.format(place), Layout(dp=2, ep=2), is_baseline=place < num // 2)
        for place in range(num)
    ]
    return example.results([(each, 0.1 + 0.01 * place) for place, each in enumerate(made)])


def served(num_running: dict[int, int]) -> Results:
    """Deployments under the whole workload: 8,000, 4,000, 2,000 and 1,000 tokens/s.

    Args:
        num_running: sequences that those have memory for that do not hold all, from 1.
    """
    given = example_projection.usual()
    usual = given.conditions[0]
    own = given.select("projected", EXPERIMENT, usual)
    rows = list(given.deployments)
    for place, each in enumerate(own):
        tps = Estimate(1e3, 0.5e3, 2e3) * 2.0 ** (3 - place)
        running = num_running.get(place + 1, example_projection.NUM_SEQS)
        load = example_projection.serving(running, tps, Estimate(0.1, 0.05, 0.2))
        rows[rows.index(each)] = replace(each, serving=load)
    verdict = WorkloadVerdict(
        "EP 16",
        {"DP 2 × TP 8, EP 2": Estimate(0.5, 0.45, 0.55), "TP 8 × PP 2": Estimate(0.25, 0.2, 0.3)},
        {"imbalance in prefill": 300e-6, "weight reads in decode": -50e-6},
    )
    return replace(given, deployments=tuple(rows), workload=verdict)


SURE = Estimate(1.06, 1.04, 1.09)
VIRTUAL = VirtualTime("h100", 1.5, 59.0, ())
CASES = {
    "usual": example.usual(),
    "one": example.results([(example.EXPERT, 0.2)]),
    "prefill": example.results([(example.TENSOR, 0.4), (example.EXPERT, 0.1)], output_len=1),
    "one, prefill": example.results([(example.EXPERT, 0.1)], output_len=1),
    "ten": example.with_pair(many(10), SURE),
    "ten with long names": example.with_pair(many(10, LONG + " {}"), SURE),
    "thirty": example.with_pair(many(30, "deployment number {} of all"), SURE),
    "projected": example_projection.usual(),
    "whole workload": served({}),
    "whole workload, little memory": served({1: 200, 2: 300, 3: 40}),
}
CASES |= {
    f"{name}, virtual": example.in_virtual_time(results, VIRTUAL)
    for name, results in CASES.items()
    if results.machine is not None
}
CASES |= {
    f"{name}, and {other}": results.beside(CASES[other])
    for name, results in CASES.items()
    for other in ("projected", "whole workload, little memory")
    if results.machine is not None
}
CASES |= {
    f"{name}, disturbed": replace(results, foreign_cpu_share=0.7)
    for name, results in CASES.items()
    if results.machine is not None
}


@pytest.mark.smoke(20)
@pytest.mark.parametrize("name", CASES)
def test_it_fits_a_screen(name: str) -> None:
    lines = shown(CASES[name])
    assert len(lines) <= 40, "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert lines[-1].endswith("report.html")
    words = " ".join(lines)
    assert "as fast as" in words or "nothing to compare it with" in words


def test_parts_add_up_and_the_largest_against_it_stays() -> None:
    saved = {
        Cause.ATTENTION: -0.060,
        Cause.ROUTER: -0.050,
        Cause.EXPERTS: -0.040,
        Cause.HEAD: -0.030,
        Cause.TP_COLLECTIVES: -0.090,
        Cause.PIPELINE_BUBBLE: -0.070,
        Cause.ENGINE: -0.001,  # 0.25 % of the step
        Cause.WAITING: 0.012,
        Cause.DISPATCH_COMBINE: 0.008,
    }
    sure = {cause: Estimate(s, s - 1e-4, s + 1e-4) for cause, s in saved.items()}
    two = example.results([(example.TENSOR, 0.4), (example.EXPERT, 0.1)])
    lines = shown(example.with_pair(two, SURE, sure))
    at = next(place for place, line in enumerate(lines) if line.startswith("Why, ms per step"))
    assert in_order(lines[at], "TP 8 × PP 2 400 EP 16 100")
    assert lines[at + 1 :][:2] == [
        "  TP collectives −90.0   bubble −70.0   attention −60.0   router −50.0",
        "  experts −40.0   waiting +12.0   other −2.00",
    ]
    parts = re.findall(r"[−+][\d.]+", " ".join(lines[at + 1 : at + 3]))
    assert sum(float(each.replace("−", "-")) for each in parts) == pytest.approx(100 - 400)


def test_a_disturbed_run_is_told_below_the_headline() -> None:
    lines = shown(replace(example.usual(), foreign_cpu_share=0.7))
    assert any("70%" in line for line in lines[:6])
    assert not any(line.startswith("Other processes") for line in shown(example.usual()))


def test_the_two_of_the_verdict_have_the_same_numbers_everywhere() -> None:
    two = example.results([(example.TENSOR, 0.4), (example.EXPERT, 0.1)])
    causes_s = {Cause.PIPELINE_BUBBLE: Estimate(-0.057, -0.060, -0.054)}
    given = example.with_pair(two, SURE, causes_s)
    own = replace(given.pairs[0], step_s=0.31, other_step_s=0.38)  # by other times than a table
    report = report_of(replace(given, pairs=(own,)))
    assert "EP 16 is 1.06× as fast" in report.answer.headline
    assert report.answer.parts[0].rows[1][-2] == "1.06"  # rel
    why, causes = report.answer.parts[1].lines
    assert in_order(why, "TP 8 × PP 2 380 EP 16 310")
    assert causes == "  bubble −57.0   other −13.0"
    tables = [part for each in report.sections for part in each.parts if isinstance(part, Table)]
    factors = [
        row[[column.heading for column in each.columns].index("× best base")]
        for each in tables
        for row in each.rows
        if "× best base" in [column.heading for column in each.columns]
    ]
    assert factors == ["1.00", "1.06"]
    waterfall = next(
        part
        for each in report.of_place("first")
        for part in each.parts
        if isinstance(part, Chart)
        and part.table is not None
        and "from, by, to" in [c.heading for c in part.table.columns]
    )
    assert [*waterfall.table.rows] == [
        ("TP 8 × PP 2", "380"),
        ("pipeline bubble", "−57.0"),
        ("other", "−13.0"),
        ("EP 16", "310"),
    ]


def test_the_whole_workload_comes_first_and_says_what_memory_holds() -> None:
    lines = shown(CASES["whole workload, little memory"])
    text = " ".join(lines)
    assert lines[1:3] == [
        "EP 16 is 0.25× as fast as TP 8 × PP 2 (0.20–0.30) and 0.50× as fast as the best",
        "baseline, DP 2 × TP 8, EP 2 (0.45–0.55), over the whole workload, projected for",
    ]
    assert in_order(text, "deployment tok/s bounds seqs TPOT TTFT rel")
    (row,) = (line for line in lines if line.startswith("DP 2 × TP 8, EP 2 "))
    assert in_order(row, "DP 2 × TP 8 EP 2 4,000 300 100 1.00")
    assert in_order(text, "Why µs DP 2 × TP 8 EP 2 250 EP 16 500 weight −50.0 imbalance +300")
    assert in_order(text, "Of 1,024 40 EP 16 300 DP 2 × TP 8 EP 2 200 TP 8 × PP 2 others wait")
    assert "others wait" not in " ".join(shown(CASES["whole workload"]))


def test_of_too_many_the_pair_the_first_and_the_fastest_are_shown() -> None:
    lines = shown(CASES["thirty"])
    for number in (1, 2, 30):
        assert any(line.startswith(f"#{number} deployment number") for line in lines)
    assert "14 more deployments: --full." in " ".join(lines)


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
