"""The page on what the paper's table would take."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cli.screen import tells

PATH = Path(__file__).parents[2] / "experiments" / "paper" / "what_it_takes.py"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("what_it_takes", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_terms_are_the_step(page):
    """Of the slowest rank each, so they can't be less than what all wait for."""
    case = page.Case()
    terms = page.terms_of(case, page.PROPOSAL)
    by_name = {term.name: term for term in terms}
    experts = by_name["experts"]
    assert experts.num == 4
    assert experts.work.startswith("1,073.7 MB")  # two matrices of 8192 × 32,768, float16
    assert experts.floor_s == pytest.approx(2 * 8192 * 32_768 * 2 / 3.35e12, rel=0.03)
    assert by_name["LM head"].num == 1
    assert terms[0] is experts
    total_s = sum(term.total_s.value for term in terms)
    step_s = page.step_of(case, page.PROPOSAL).round_s.value
    assert step_s - 0.35e-3 < total_s < 1.1 * step_s  # between steps, and launch of the graph
    for term in terms:
        assert term.floor_s <= 1.35 * term.seconds[1], term.name  # small reads live in caches
        assert term.seconds[0] <= term.seconds[1] <= term.seconds[2]


def test_the_paper_at_the_start_of_a_sequence(page):
    """EP 16 on 16 H100; physics is 2.1 ms of weights."""
    assert 3.2e-3 < page.step_of(page.Case(), page.PROPOSAL).round_s.value < 3.6e-3


def test_drained_micro_batches_read_weights_again(page):
    """So the factor against the baseline grows with them, and reaches the reported one."""
    cases = [page.Case(num_micro_batches=m) for m in (1, 4, 16)]
    factors = [page.factor_of(case) for case in cases]
    values = [factor.value for factor in factors]
    assert 1.2 < values[0] < values[1] < page.FACTOR < values[2]
    assert all(each.low < each.value < each.high for each in factors)
    rotating = page.factor_of(replace(cases[1], schedule="rotating"))
    assert rotating.value < values[1]  # no bubble


@pytest.mark.full
def test_the_page(page, monkeypatch, tmp_path, capsys):
    for name, few in (
        ("MICRO_BATCHES", (1, 8)),
        ("BATCHES", (1024,)),
        ("CONTEXTS", (1,)),
        ("TOP_KS", (1,)),
        ("RATES", ()),
    ):
        monkeypatch.setattr(page, name, few)
    assert page.main(["--out", str(tmp_path / "page.md")]) == 0
    assert capsys.readouterr().out.strip().endswith("page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| QKV projection | 402.7 MB" in text
    assert tells(text, "3.75×")
    for row in ("| 1,024 |", "| 1 |", "| top-1 |", f"| {page.ONE_DOMAIN} |"):
        assert row in text
    (tmp_path / "file").touch()
    assert page.main(["--out", str(tmp_path / "file" / "page.md")]) == 2
    assert capsys.readouterr().err.startswith("what_it_takes: ")
