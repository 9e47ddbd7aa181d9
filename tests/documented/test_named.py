"""Every command that a document names exists, and some test runs it at a small size."""

import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from documented.commands import ROOT, Command, commands_in, kept_results, named, scripts
from documented.smokes import COVERED, FIRST_PAGES, MORE, PARTS, SMOKES
from expertlane.cli.app import app

NAMED = named()
# Words in backticks that look like a command, but are not one.
NOT_COMMANDS = {
    Command("expertlane", "r3", ()): "a process's name",
    Command("expertlane", "COMMAND", ("--help",)): "any command",
}
PROGRAMS = {"--help", "--install-completion", "--version"}  # options of expertlane itself


def of_kind(kind: str) -> list[Command]:
    return sorted(
        (each for each in NAMED if each.kind == kind and each not in NOT_COMMANDS),
        key=lambda each: (each.name, each.words),
    )


def test_the_documents_are_read_as_a_shell_would_read_them():
    text = (
        "Run `make check`, `PYTHONPATH=src:tests python -m faults.runs FILE` or "
        "`benchmarks/bench_engine.py CHECKPOINT`, not `makeshift` or `expertlane`.\n"
        "```bash\n$ .venv/bin/expertlane serve tiny \\\n    --port 1 &   # it stays\n"
        "expertlane list models && expertlane plan a | head\n```\n"
        "```text\nexpertlane plan b\n```\n"
    )
    assert [found for line in commands_in(text) if (found := Command.of(line))] == [
        Command("expertlane", "serve", ("tiny", "--port", "1")),
        Command("expertlane", "list", ("models",)),
        Command("expertlane", "plan", ("a",)),
        Command("make", "check", ()),
        Command("script", "tests/faults/runs.py", ("FILE",)),
        Command("script", "benchmarks/bench_engine.py", ("CHECKPOINT",)),
    ]
    assert Command.of("torchrun --nnodes 2 -m expertlane compare a.toml") == Command(
        "expertlane", "compare", ("a.toml",)
    )


def words(command: Command) -> str:
    return " ".join((command.name, *command.words))


def is_program(path: Path) -> bool:
    return re.search(r"^if __name__ == .__main__.:", path.read_text(), re.MULTILINE) is not None


def test_every_script_that_is_named_is_run_small_by_a_test():
    known = SMOKES.keys() | COVERED.keys() | PARTS.keys()
    for command in of_kind("script"):
        path = ROOT / command.name
        assert path.exists(), (command, NAMED[command])
        if is_program(path) and not path.name.startswith("test_"):
            assert command.name in known, f"add it to tests/documented/smokes.py: {command.name}"
    assert scripts() <= known, "add them to tests/documented/smokes.py"


def test_what_is_said_of_scripts_is_of_scripts_that_are_there():
    every = [*SMOKES, *COVERED, *PARTS]
    assert len(every) == len(set(every))
    assert all((ROOT / name).exists() for name in every)
    for script, test in COVERED.items():
        assert Path(script).stem in (ROOT / test).read_text(), (script, test)
    for script, parent in PARTS.items():
        sources = [path.read_text() for path in (ROOT / parent).parent.rglob("*.py")]
        assert any(re.search(rf"\b{Path(script).stem}\b", each) for each in sources), script
        assert parent in SMOKES


WITH_OPTIONS = [each for each in of_kind("script") if "--" in words(each)]


@pytest.mark.parametrize("command", WITH_OPTIONS, ids=words)
def test_a_script_has_the_options_that_are_named(command):
    source = (ROOT / command.name).read_text()
    if command.name == "benchmarks/bench_serve.py":  # it adds those of bench_engine.py
        source += (ROOT / "benchmarks/bench_engine.py").read_text()
    for word in command.words:
        assert not word.startswith("--") or f'"{word}"' in source, word


def parsed(command: Command) -> None:
    """Have the command parse its command line without running."""
    group, words = typer.main.get_command(app), [command.name, *command.words]
    while hasattr(group, "commands"):
        assert words, command
        assert words[0] in group.commands, f"expertlane has no command {words[0]}"
        group = group.commands[words.pop(0)]
    try:
        if not {"-h", "--help"} & {*words}:
            group.make_context(command.name, words)
    except Exception as error:
        if type(error).__name__ != "MissingParameter":  # a sentence may name an option alone
            raise


WITH_WORDS = [each for each in of_kind("expertlane") if each.words and each.name not in PROGRAMS]


@pytest.mark.parametrize("command", WITH_WORDS, ids=words)
def test_a_command_takes_what_is_named(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsed(command)


def test_results_that_a_test_leaves_in_the_checkout_are_noticed(tmp_path):
    """By the fixture `elsewhere`, which ends every run of tests: an empty folder too."""
    seen = [kept_results(tmp_path)]
    for each in ("results", "results/mine", "benchmarks/results"):
        (tmp_path / each).mkdir(parents=True)
        seen.append(kept_results(tmp_path))
    (tmp_path / "benchmarks/results/new.json").touch()
    seen.append(kept_results(tmp_path))
    assert all(after != before for before, after in pairwise(seen))
    assert kept_results(tmp_path) == seen[-1]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("plan paper --no-such 3", "No such option: --no-such"),
        ("serve paper --port high", "valid integer"),
        ("list nothing", "no command nothing"),
    ],
)
def test_what_a_command_does_not_take_is_noticed(line, why):
    with pytest.raises(Exception, match=why):
        parsed(Command.of(f"expertlane {line}"))


def test_every_name_of_a_command_is_one():
    names = {command.name for command in typer.main.get_command(app).commands.values()}
    assert {each.name for each in of_kind("expertlane")} <= names | PROGRAMS


def test_what_the_validation_names_the_first_pages_have_too():
    of_first = {each for each, where in NAMED.items() if FIRST_PAGES & {*where}}
    of_validation = {
        each.name for each in of_kind("expertlane") if "docs/validation.md" in NAMED[each]
    }
    assert of_validation <= {each.name for each in of_first}
    assert set(MORE) <= {*map(words, of_first)}


@pytest.mark.parametrize("target", [each.name for each in of_kind("make")])
def test_make_has_the_target_and_what_it_runs_is_run_small(target):
    asked = ["make", "--dry-run", "--always-make", "--no-print-directory", target]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    recipe = [line.strip().lstrip("@") for line in done.stdout.splitlines()]
    for command in filter(
        None, map(Command.of, commands_in("```\n" + "\n".join(recipe) + "\n```"))
    ):
        if command.kind == "script":
            assert command.name in SMOKES.keys() | COVERED.keys()
        elif command.kind == "expertlane":
            assert command in NAMED
