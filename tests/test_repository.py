"""What a newcomer sees holds together: experiments, packages, make targets, links."""

import math
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from expertlane.spec.deployment import Options
from expertlane.spec.experiment import read_experiment, shipped_experiments
from expertlane.spec.files import strict_json
from expertlane.spec.layout import Layout

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *(each for each in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in each.parts),
]


def test_the_skewed_experiment_compares_the_proposal_with_and_without_balancing():
    experiment = read_experiment(ROOT / "experiments" / "paper-small-skewed.toml")
    assert experiment.name in shipped_experiments()
    assert experiment.model.routing.router_skew > 0
    assert {str(each.layout) for each in experiment.deployments} == {"dp=16,ep=16"}
    _, copies, balanced, _ = experiment.deployments
    assert replace(balanced.options, rebalance_steps=0) == copies.options


@pytest.mark.parametrize(
    "path",
    [ROOT / "experiments" / f"{name}.toml" for name in ("paper", "paper-small")],
    ids=lambda p: p.stem,
)
def test_experiments_compare_the_papers_deployments(path: Path):
    experiment = read_experiment(path)

    assert experiment.name == path.stem
    assert path.stem in shipped_experiments()
    assert experiment.num_ranks == 16
    assert [str(each.layout) for each in experiment.deployments if each.is_baseline] == [
        *["pp=2,tp=8"] * 6,
        "dp=2,tp=8,ep=2",
    ]
    baselines = [each.options for each in experiment.deployments[:5]]
    assert [(o.num_micro_batches, o.micro_batch_schedule) for o in baselines] == [
        (1, "drained"),
        (2, "drained"),
        (4, "drained"),
        (2, "rotating"),
        (4, "rotating"),
    ]
    assert experiment.deployments[5].options == Options(overlap=True)
    proposal = [each for each in experiment.deployments if not each.is_baseline]
    assert {each.layout for each in proposal} == {Layout(dp=16, ep=16)}
    forms = ["all_to_all", "hierarchical", "all_gather"]  # all for the projection at full size
    assert [(each.options.dispatch, each.options.overlap) for each in proposal] == [
        (form, overlap)
        for form in (forms if experiment.name == "paper" else forms[:1])
        for overlap in (False, True)
    ]
    assert [each.layout for each in experiment.scaling] == [
        Layout(dp=n, ep=n) for n in (1, 2, 4, 8)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_documents_name_only_what_exists(path: Path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    files = re.findall(r"`((?:src|tests|docs|experiments|benchmarks)/[\w./-]+)`", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_of_the_package_that_are_named_exist(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    files = set(re.findall(r"`([a-z][\w/]*/[\w.]+\.\w+)`", text))
    package = ROOT / "src" / "expertlane"
    assert len(files) > 50
    assert not {each for each in files if not ((ROOT / each).exists() or (package / each).exists())}


def test_the_readme_gives_the_make_targets():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"compare"} <= named <= targets


def test_make_test_full_runs_the_long_tests_of_every_file():
    shown = subprocess.run(
        ["make", "--dry-run", "--always-make", "test-full"],
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    run = {
        path
        for name in re.findall(r"-m full --failed-first (\S+)", shown)
        for place in ROOT.glob(name)
        for path in ([place] if place.is_file() else place.rglob("test_*.py"))
    }
    assert run == {*(ROOT / "tests").rglob("test_*.py")}


# What is read again at once, or shown in a message; no file or output for others.
OTHER_JSON = {
    "chat_template.py",
    "experiment.py",
    "file.py",
    "fork_server.py",
    "checkpoint.py",
    "limited_process.py",
    "chat_sandbox.py",
}


def test_json_is_written_in_one_way():
    source = ROOT / "src" / "expertlane"
    found = {
        path.name
        for path in source.rglob("*.py")
        if re.search(r"\bjson\.dumps?\(", path.read_text(encoding="utf-8"))
    }
    assert found <= OTHER_JSON | {"files.py"}
    for value in (math.nan, [{"a": math.inf}], {"b": -math.inf}):
        with pytest.raises(ValueError, match="not JSON compliant"):
            strict_json(value)
    assert strict_json({"a": [1.5, None]}, separators=(",", ":")) == '{"a":[1.5,null]}'


def test_docstrings_name_modules_that_exist():
    """In backticks, `engine.ranks.pool` for example, with or without a name of the module."""
    package = ROOT / "src" / "expertlane"
    rooms = {each.parent.name for each in package.glob("*/__init__.py")}
    missing = []
    for path in package.rglob("*.py"):
        for name in re.findall(r"`((?:\w+\.)+\w+)`", path.read_text(encoding="utf-8")):
            parts = name.split(".")
            if parts[0] not in rooms or parts[-1] in ("json", "md", "html", "toml"):
                continue
            ends = [package.joinpath(*parts[:length]) for length in range(len(parts), 1, -1)][:2]
            if not any(each.is_dir() or each.with_suffix(".py").exists() for each in ends):
                missing.append(f"{path.relative_to(package)}: {name}")
    assert not missing
