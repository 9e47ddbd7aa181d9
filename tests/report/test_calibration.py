"""The answer of a calibration."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from cli.screen import fits_a_screen, tells
from expertlane.cost.laws.profile import read_profile
from expertlane.report import terminal
from expertlane.report.calibration import Rounds, report_of


def shown(num_rounds, num_disturbed, *, full=False):
    rounds = Rounds(
        dtype="bfloat16",
        num_rounds=num_rounds,
        most_rounds=5,
        num_kept=200,
        num_disturbed=num_disturbed,
        foreign_cpu_share=0.4,
        again_s=0.0,
    )
    report = report_of(read_profile("h100"), rounds, Path("mine.toml"), "", "2026-11-26")
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    if full:
        terminal.show(report, console)
    else:
        terminal.draw_answer(report.answer, console)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def test_the_answer_fits_a_screen_and_says_how_sure_it_is():
    out = shown(5, 0)
    assert fits_a_screen(out)
    assert out.startswith("h100 | 8 × NVIDIA H100 SXM 80 GB, bfloat16 | 5 of 5 rounds\n")
    assert tells(out, "rank 989 TFLOP/s 3.35 TB/s memory 450 GB/s")
    assert tells(out, "No disturbed 200")
    assert out.endswith("Next: expertlane plan MODEL --cluster mine.tomlx8")


def test_a_busy_machine_and_few_rounds_are_told():
    words = " ".join(shown(2, 30).split())
    assert tells(words, "15% 200 40%")
    assert tells(words, "2 5")


@pytest.mark.parametrize("law", ["gemm.bfloat16", "all_to_all"])
def test_all_laws_are_shown_in_full(law):
    assert law in shown(5, 0, full=True)
