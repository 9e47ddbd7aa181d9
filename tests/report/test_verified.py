"""The answer of `verify`: every verdict on one screen, and read back from its file."""

from pathlib import Path

import pytest

from expertlane.report import html, terminal
from expertlane.report.sections import report_of
from expertlane.results.file import read, write
from expertlane.results.record import DeploymentRecord
from expertlane.results.results import Results
from expertlane.results.verified_record import (
    ConditionRecord,
    CoverageRecord,
    ExpertRecord,
    LayerExperts,
    SignificanceRecord,
    TokenRecord,
    VerifiedRecord,
)

NAMES = ("alone", "again, alone", "4 at once", "16 at once", "32 at once", *["rank 0", "rank 1"])
URL = "http://127.0.0.1:8000"


def results_of(verdict, why=(), alarms=("size",)) -> Results:
    off = verdict == "differs"
    record = VerifiedRecord(
        verdict,
        URL,
        "vllm 0.32",
        "organisation/a-model-of-a-long-name-with-experts",
        "/models/organisation/a-model-of-a-long-name",
        "bfloat16",
        "checkpoint",
        is_measured=True,
        method="prompt_logprobs",
        why=why,
        conditions=tuple(
            ConditionRecord(
                name,
                "reference",
                48,
                7_100,
                0.0123,
                0.2,
                3.2,
                0.0121,
                0.19,
                0.1,
                alarms if off else (),
            )
            for name in NAMES
        ),
        tests=(
            SignificanceRecord("alone", "size", "", 9.5, 0.0),
            SignificanceRecord("alone", "far", "", 0.0, 1.0),
        ),
        worst=(TokenRecord("alone", 3, 17, 128_000, -11.5, -0.25, 0.01),) * 20 if off else (),
        experts=(ExpertRecord(3, 101, 412, 0.31, 0.012, 1e-9),) * 9 if off else (),
        least_seen=None if off else 0.031,
        least_seen_expert=None if off else 0.05,
        alarm=1e-4,
        false_alarms=0.01,
        num_excused=1,
        coverage=CoverageRecord(
            48,
            48 * 128,
            8,
            210,
            tuple(LayerExperts(layer, (3, 17, 101)) for layer in range(20)),
            tuple(range(3, 51)),
        ),
        skipped=("generated, 16 at once: no time within --budget-s",) * 3,
        wall_s=81.0,
    )
    question = {
        "model": record.model,
        "url": URL,
        "reference": record.reference,
        "seed": 3,
        "num_prompts": 48,
        "budget_s": 240.0,
    }
    deployment = DeploymentRecord(URL, None, None, "measured", verified=record)
    return Results.now("verify", "expertlane verify", question, [deployment])


@pytest.mark.parametrize(
    ("verdict", "why", "begins"),
    [
        ("same", (), "Same: it computes the model."),
        ("differs", ("Likely expert: 101 of MoE layer 3.",), "Differs beyond rounding of bfloat16"),
        ("can't tell", ("Rounding hides whatever is smaller than 3 nats.",), "Can't tell"),
    ],
)
def test_every_verdict_fits_a_screen_and_comes_first(verdict, why, begins, tmp_path):
    from rich.console import Console

    results = results_of(verdict, why)
    report = report_of(results)
    assert report.answer.headline.startswith(begins)
    console = Console(width=80, markup=False, emoji=False, highlight=False, record=True)
    with console.capture() as shown:
        terminal.show_answer(report, console, Path("report.html"))
    lines = shown.get().splitlines()
    assert len(lines) <= 40
    assert max(len(each.rstrip()) for each in lines) <= 80
    assert any(each.startswith(begins[:20]) for each in lines[:6])
    for sentence in why:
        assert sentence in " ".join(shown.get().split())
    reach = "Not covered: 60 experts of 6,144, which no prompt chose: 3 of MoE layer 0, "
    assert reach in " ".join(shown.get().split())
    layers = (
        "In the decoder MoE layer 3 is layer 6, 0 is layer 3, 1 is layer 4, …"
        if verdict == "differs"
        else "In the decoder MoE layer 0 is layer 3,"
    )
    assert layers in " ".join(shown.get().split())
    page = html.render(report)
    assert "3, 17, 101" in page
    assert begins[:20].replace("'", "&#39;") in page or begins[:20] in page
    write(results, tmp_path)
    assert read(tmp_path).deployments[0].verified == results.deployments[0].verified
