"""The paper's study, on the public Python API."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import example_pages
import example_projection
import example_results
from cli.screen import in_order, telling, tells
from expertlane.errors import UserError
from expertlane.report import markdown
from expertlane.report.compared import projected
from expertlane.results.file import write
from report.shown import section, tables, words

PATH = Path(__file__).parents[2] / "experiments" / "paper" / "study.py"
study = runpy.run_path(str(PATH), run_name="study")


def of(*results):
    return study["study_of"](results)


def test_the_goals_are_judged_whatever_the_source():
    measured, modelled = of(example_pages.both()).sections[:2]
    assert measured.heading.endswith("measured (this machine)")
    said = words(measured)
    assert tells(said, "16 experts layer #3 #4")
    assert tells(said, "one expert rank #3 #4")
    assert in_order(said, "25% #3 160 #4 120")
    assert tells(said, "TPS rank 0.0781×")
    assert tells(modelled.heading, "projected h100x16 top-2")
    assert in_order(words(modelled), "weights GPU 6.00 GB #1 #2 #3 #4")
    for each in (measured, modelled):
        assert len(tables(each)[0].rows) == 4


def test_overlap_that_costs_or_has_nothing_to_hide():
    given = example_results.results(
        [
            (example_results.TENSOR, 0.2),
            (example_results.EXPERT, 0.1),
            (example_results.OVERLAP, 0.12),
        ]
    )
    assert "Overlap costs 20.0 ms: #2 takes" in words(of(given).sections[0])
    (pair,) = projected(example_projection.usual()).overlapped
    free = replace(pair, off=replace(pair.off, step=replace(pair.off.step, breakdown_s={})))
    assert tells(study["hidden"](free), "Nothing #3 8.00")


def test_where_the_reported_factor_would_come_from():
    results = example_pages.projected()
    found = study["combinations"]([results])
    assert len(found) == 2 * 2 * 4 * 8
    reaching = [each for each in found if each.reaches]
    assert {each.baseline.name for each in reaching} == {"TP 8 × PP 2"}
    assert {each.comparison.conditions.routing for each in reaching} == {"balanced"}
    assert len(reaching) == 2 * 4 * 4  # both proposals, all contexts, top-k and execution
    best = study["against_best"](found)
    assert len(best) == 2 * 4 * 8
    assert max(each.factor.value for each in best) == pytest.approx(4 / 1.9)

    text = words(section(of(results), "Projected: where 3.75× would come from"))
    assert "128 combinations (2 baselines × 2 proposals × 4 contexts × 2 top-ks" in text
    assert "32 reach 3.75×" in text
    assert "share: baseline TP 8 × PP 2 (all), routing balanced (all)" in text
    assert tells(text, "best baseline 0 64")
    numbers = words(section(of(results), "Projected: the reported numbers"))
    assert tells(numbers, "120,000 TPS within")
    assert tells(numbers, "2.2 above")


def test_another_model_is_not_held_against_the_paper():
    results = example_pages.projected()
    question = {
        **results.question,
        "experiment": {**results.question["experiment"], "model": {"name": "small"}},
    }
    text = markdown.render(of(replace(results, question=question)))
    assert tells(text, "another model")
    assert "would come from" not in text


def test_other_experiments_are_refused():
    alone = example_results.results([(example_results.EXPERT, 0.1)])
    with pytest.raises(UserError, match=telling("paper's expertlane compare")):
        of(alone)


def test_it_runs(tmp_path):
    write(example_results.usual(), tmp_path)
    command = [sys.executable, str(PATH), str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {*done.stdout.split()} == {str(tmp_path / f"study.{kind}") for kind in ("md", "html")}
    assert (tmp_path / "study.md").read_text(encoding="utf-8").startswith("# ")
    done = subprocess.run([*command[:2], str(tmp_path / "none")], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
