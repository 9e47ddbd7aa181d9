"""`expertlane list`: what a command can be given."""

import json

import pytest

from cli.screen import fits_a_screen, tells
from expertlane.cost.laws import shipped_profiles
from expertlane.cost.laws.frameworks import frameworks
from expertlane.planner.candidates import valid_layouts
from expertlane.server.call_forms import CALL_FORMS, THOUGHT_FORMS
from expertlane.spec.hf_config import FAMILIES
from expertlane.spec.model import PRESETS

LAYOUTS = ("list", "layouts", "paper", "--cluster", "h100x16")


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("models", list(PRESETS)),
        ("families", list(FAMILIES)),
        ("profiles", list(shipped_profiles())),
        ("clusters", [f"{name}xN" for name in shipped_profiles()]),
        ("frameworks", list(frameworks())),
    ],
)
def test_all_of_them_on_a_screen_and_as_json(run, what, names):
    code, out, err = run("list", what)
    assert (code, err) == (0, "")
    assert fits_a_screen(out)
    rows = {line.split()[0] for line in out.splitlines() if line}
    words = {word.strip(",*") for word in out.split()}
    assert set(names) <= (words if what == "families" else rows)
    assert [row["name"] for row in json.loads(run("list", what, "--json")[1])] == names
    (line,) = run("list", what, "--quiet")[1].splitlines()
    assert what == "families" or all(name in line for name in names)


def test_what_a_family_can_do(run):
    found = {row["name"]: row for row in json.loads(run("list", "families", "--json")[1])}
    deepseek, kimi, mimo = (found[name] for name in ("deepseek_v3", "kimi_k25", "mimo_v2_flash"))
    assert deepseek["plan"]
    assert deepseek["run"]
    assert deepseek["serve"]
    assert deepseek["draft"]
    assert (deepseek["tools"][0], deepseek["reasoning"]) == ("deepseek_v3", ["think"])
    assert kimi["architectures"] == ["KimiK25ForConditionalGeneration"]
    assert kimi["plan"]
    assert not (kimi["run"])
    assert not (kimi["serve"])
    assert not (kimi["draft"])
    assert not (kimi["tools"])
    assert mimo["draft"]
    assert not mimo["run"]
    assert {name for row in found.values() for name in row["tools"]} <= set(CALL_FORMS)
    assert {name for row in found.values() for name in row["reasoning"]} <= set(THOUGHT_FORMS)
    full = run("list", "families", "--full")[1]
    assert {line.split()[0] for line in full.splitlines() if line.split()} >= set(FAMILIES)
    assert run("list", "families", "--quiet")[1].startswith("14 families run and are served; ")


def test_layouts_that_are_valid_and_what_they_hold(run):
    code, out, err = run(*LAYOUTS)
    assert (code, err) == (0, "")
    assert fits_a_screen(out)
    assert out.endswith("More: --full\n")
    assert tells(out, "75 --full")
    assert {"tp=16,ep=16", "dp=16,ep=16", "replicas=2,tp=8"} <= set(out.split())
    found = json.loads(run(*LAYOUTS, "--json")[1])
    valid = {str(each) for each in valid_layouts(PRESETS["paper"], 16)}
    assert {row["layout"] for row in found} == valid
    held = [row["num_sequences"] for row in found]
    assert held == sorted(held, reverse=True)
    assert held[0] > held[-1] == 0  # a copy on every rank has no room
    assert not found[-1]["fits"]
    full = run(*LAYOUTS, "--full")[1]
    assert sum(line.split()[:1] == [row["layout"]] for row in found for line in full.splitlines())
    shorter = json.loads(run(*LAYOUTS, "--max-model-len", "1024", "--json")[1])
    assert shorter[0]["num_sequences"] > held[0]
    # A step takes 8,192 tokens of a longer prompt, as steps of plan and simulate do.
    half = json.loads(run(*LAYOUTS, "--max-model-len", "8192", "--json")[1])
    activations = {row["layout"]: row["activation_bytes"] for row in found}
    assert activations == {row["layout"]: row["activation_bytes"] for row in half}
    assert activations["dp=16,ep=16"] == 2 * (8192 * 65_536 + 16_384 * 49_152)
    assert tells(out, "99 98 72.0 GB")


def test_alone_it_prints_its_help(run):
    code, out, err = run("list")
    assert (code, err) == (0, "")
    assert (code, out, err) == run("list", "--help")
