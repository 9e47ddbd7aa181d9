"""What plan prints where nothing else is asked for."""

import json
import re

import pytest

from cli.small_checkpoint import checkpoint

ASKED = ("--cluster", "h100x2", "--batch", "8", "--prompt-len", "16", "--output-len", "16")


@pytest.mark.smoke(1)
@pytest.mark.parametrize("columns", [80, 120])
def test_the_answer_fits_the_screen(run, tmp_path, monkeypatch, columns):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(columns))
    checkpoint(tmp_path / ("a-checkpoint-with-a-name-that-does-not-end" * 3))
    model = "./" + "a-checkpoint-with-a-name-that-does-not-end" * 3
    code, out, err = run("plan", model, *ASKED, "--slo", "tpot.mean=50ms", "--out", "there")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= columns
    assert lines[1].startswith("Use ") or lines[2].startswith("Use ")
    results = json.loads((tmp_path / "there" / "results.json").read_text())
    best = results["deployments"][0]
    assert best["over_best"] is None
    assert best["why"] == ""
    num_tied = results["plans"][0]["num_tied"]
    assert (results["plans"][0]["tie_break"] is None) == (num_tied == 1)


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(("paper-tiny", *ASKED), marks=pytest.mark.full),
        ("paper-small", "--cluster", "h100x4", "--batch", "32", "--skew", "0.4"),
        pytest.param(
            ("paper", "--cluster", "h200x16", "--batch", "256", "--slo", "tpot.mean=15ms"),
            marks=pytest.mark.full,
        ),
    ],
    ids=lambda asked: asked[0],
)
def test_rows_that_words_name_are_in_the_table(run, tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("plan", *asked)
    assert code == 0, err
    rows = re.findall(r"^(\d+)  \S", out, re.MULTILINE)
    assert rows[0] == "1"
    named = set(re.findall(r"#(\d+)", out))
    assert named
    assert named <= set(rows)
    _, _, after = out.partition("\n\n")[2].partition("\n\n")
    words = re.sub(r"(Disaggregated|Tokens/s by engine)[^\n]*(\n[^\n]+)*", "", after)
    assert re.findall(r"\b(?:dp|tp|pp|ep|replicas)=\d+", words) == []  # #N in their place


@pytest.mark.full
@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ((), "768 in / 256 out (the model's limit)"),
        (("--prompt-len", "1000"), "1,000 in / 24 out (the model's limit)"),
        (("--output-len", "1000"), "24 in / 1,000 out (the model's limit)"),
        (("--prompt-len", "16"), "16 in / 256 ±20% out |"),
    ],
)
def test_default_lengths_are_cut_to_what_the_model_has(run, tmp_path, monkeypatch, lengths, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("plan", "paper-small", "--cluster", "h100x2", "--batch", "8", *lengths)
    assert code == 0, err
    assert said in out
