"""One schema for all: which records may stand in a file, and how they are found again."""

import subprocess
import sys
from dataclasses import replace

import pytest

import example_projection
import example_results as example
from cli.screen import telling
from example_pages import KINDS
from expertlane.errors import UserError
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.file import read, write
from expertlane.results.record import EXPERIMENT, SCALING, Conditions

MODULES = ("estimate", "record", "results", "metrics", "traffic", "file")


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_what_is_read_is_what_was_written(tmp_path, make):
    given = make()
    assert read(write(given, tmp_path)) == given


def test_a_projection_beside_a_measurement():
    measured, projected = example.usual(), example_projection.usual()
    both = measured.beside(projected)
    assert both.select("measured") == measured.deployments
    assert both.select("projected") == projected.deployments
    assert (both.machine, both.cluster) == (measured.machine, projected.cluster)
    assert both.question["experiment"] == measured.question["experiment"]
    assert both.question["skew"] == 1.0
    assert {each.source for each in both.assumptions} == {"measured", "projected"}


def test_results_that_cannot_be():
    given = example.usual()
    with pytest.raises(UserError, match=telling("without deployment")):
        replace(given, deployments=())
    with pytest.raises(UserError, match=telling("deployment twice")):
        replace(given, deployments=given.deployments[:1] * 2)
    with pytest.raises(UserError, match=telling("measured machine")):
        replace(given, machine=None)
    with pytest.raises(UserError, match=telling("projected cluster")):
        replace(example_projection.usual(), cluster=None)


def test_records_by_source_role_and_conditions():
    measured, projected = example.usual(), example_projection.usual()
    assert [each.name for each in measured.select("measured", SCALING)] == ["EP 1"]
    assert len(measured.select("measured", EXPERIMENT)) == 4
    assert projected.conditions[0] == Conditions(2, "graph", "balanced", "float16", "float16")
    assert len(projected.select("projected", EXPERIMENT, projected.conditions[0])) == 4
    first = projected.deployments[0]
    assert tuple({step.context: None for step in first.steps[1:]}) == example_projection.CONTEXTS
    assert first.decode_of(10_000, 768).fits
    assert first.decode_of(10_000, 5) is None


def test_cause_shares_add_up_to_1():
    for deployment in example.usual().deployments:
        for steps in deployment.steps:
            assert sum(steps.shares.values()) == pytest.approx(1)


def test_estimates():
    projected = Estimate.between((4.0, 2.0, 1.0))
    assert projected == Estimate(2.0, 1.0, 4.0)
    assert projected / 2 == Estimate(1.0, 0.5, 2.0)
    assert projected * 2 == Estimate(4.0, 2.0, 8.0)
    assert 8 / projected == Estimate(4.0, 2.0, 8.0)
    assert projected.bounds == (1.0, 2.0, 4.0)
    assert Estimate(3.0).bounds == (3.0, 3.0, 3.0)
    assert 6 / (Estimate(3.0) / 2) == Estimate(4.0)


def test_a_summary_of_many():
    assert Summary.of([]) is None
    summary = Summary.of([float(value) for value in range(101)])
    assert summary == Summary(Estimate(50), Estimate(50), Estimate(95), Estimate(99))


def test_oversubscription():
    assert example.machine(num_cores=2).is_oversubscribed
    assert example.machine(num_cores=2).ranks_per_core == 8
    assert not example.machine(num_cores=16).is_oversubscribed
    assert not replace(example.machine(), device="NVIDIA H100").is_oversubscribed


def test_torch_and_pydantic_are_not_imported():
    modules = ", ".join(f"expertlane.results.{name}" for name in MODULES)
    code = f"import {modules}, sys; print({{'torch', 'pydantic'}} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
