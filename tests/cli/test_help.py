"""Help of every command: what a user sees first, and that it fits."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from cli.screen import refused
from expertlane.cli.app import app
from expertlane.cli.help import Panel, panels_of, value_of

MOST_FIRST = 12  # options before the advanced ones


def commands(group=None, path=()):
    group = group or typer.main.get_command(app)
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


ALL = dict(commands())
each_command = pytest.mark.parametrize("path", ALL, ids=lambda path: " ".join(path) or "all")


def panels(path):
    command = ALL[path]
    return panels_of(command, command.context_class(command, info_name="it"))


@each_command
def test_it_fits_80_columns_and_no_word_is_broken(run, path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    code, out, err = run(*path, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert [line for line in out.splitlines() if line != line.rstrip()] == []
    words = out.split()
    for options in panels(path).values():
        for each in options:
            assert value_of(each) in " ".join(words)
            assert set(each.opts) <= {word.strip(",") for word in words}


@each_command
def test_columns_is_respected(run, path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "48")
    for line in run(*path, "-h")[1].splitlines():
        assert len(line) <= 48 or " " not in line.strip(), line  # a word that long stays whole


@each_command
def test_few_options_come_first(run, path):
    names = list(panels(path))
    assert names == [panel for panel in Panel if panel in names]
    first = [
        each
        for panel, options in panels(path).items()
        for each in options
        if not panel.startswith("Advanced") and "--help" not in each.opts
    ]
    assert len(first) <= MOST_FIRST
    headings = re.findall(r"^(\w[\w :]*):$", run(*path, "-h")[1], re.MULTILINE)
    advanced = [each.startswith("Advanced") for each in headings]
    assert advanced == sorted(advanced)


@each_command
def test_lines_that_are_kept_as_they_are_are_short(path):
    blocks = re.findall(r"\x08\n(.*?)(?:\n\n|$)", inspect.cleandoc(ALL[path].help), re.DOTALL)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 80] == []


@each_command
def test_every_value_has_a_name(path):
    for options in panels(path).values():
        for each in options:
            assert getattr(each, "is_flag", False) or value_of(each), each.name


@each_command
def test_no_option_has_a_range_of_its_own(run, path):
    assert not re.search(r"x *[<>]|[<>]=? *x\b", run(*path, "--help")[1]), "see RANGES"


def test_resume_is_of_the_results_that_are_kept():
    named = [each.name for each in panels(("compare",))[Panel.MORE_OUTPUT]]
    assert "resume" in named


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (("simulate", "--redundant"), "--num-redundant-experts"),
        (("generate", "--rebalance"), "--rebalance-steps"),
        (("plan", "--jsno"), "--json"),
    ],
)
def test_a_wrong_option_is_told_the_near_one(run, wrong, right):
    assert refused(run(*wrong), f"{wrong[-1]} {right}")


@pytest.mark.parametrize(
    ("option", "given", "meant"),
    [
        ("--dtype", "fp8", "float8"),
        ("--dtype", "FP16", "float16"),
        ("--dtype", "half", "float16"),
        ("--dtype", "bf16", "bfloat16"),
        ("--dtype", "fp4", "nvfp4 or mxfp4"),
        ("--dtype", "w4a16", "int4"),
        ("--kv-dtype", "fp8_e4m3", "float8"),
        ("--engine", "sgl", "sglang"),
        ("--engine", "TensorRT-LLM", "trtllm"),
        ("--framework", "tensorrt", "trt or dynamo-trt"),
        ("--framework", "sgl", "sglang or dynamo-sglang"),
    ],
)
def test_names_of_other_programs_are_told_ours(run, option, given, meant):
    told = run("plan", "paper-tiny", option, given)
    assert refused(told, given)
    assert f"did you mean {meant}?" in told[2]


@pytest.mark.parametrize("given", ["fp8", "blue"])
def test_only_what_is_valid_is_meant(run, given):
    told = run("generate", "paper-tiny", "--token-ids", "1", "--dtype", given)
    assert refused(told, f"--dtype {given} float32 --help")
    assert "mean" not in told[2]


def completed(words):
    """What bash is offered after these words."""
    source = str(Path(__file__).parents[2] / "src")
    script = "import sys; sys.argv[0] = 'expertlane'; from expertlane.cli.main import main; main()"
    environment = {
        "PYTHONPATH": source,
        "_EXPERTLANE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    return done.stdout.split()


@pytest.mark.full
def test_a_shell_completes_commands_options_and_values():
    assert completed("expertlane si") == ["simulate"]
    assert "--num-redundant-experts" in completed("expertlane simulate --num-")
    assert completed("expertlane plan paper-t") == ["paper-tiny"]
    assert "h100x16" in completed("expertlane plan paper --cluster h100")
    of = "expertlane simulate paper --cluster h100x2 --layout dp="
    assert completed(of) == ["dp=2", "dp=2,ep=2"]


def test_every_command_has_the_options_of_output():
    wanted = {"--full", "--quiet", "--json"}
    for path, command in ALL.items():
        if not hasattr(command, "commands"):
            has = {name for each in command.params for name in each.opts} & wanted
            assert has == ({"--json"} if path in (("generate",), ("serve",)) else wanted), path


def test_completion_is_of_the_command_however_it_is_run():
    # As from a prompt: the shell is told by the parent process.
    command = ["bash", "-c", f"{sys.executable} -m expertlane --show-completion; true"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "_EXPERTLANE_COMPLETE=complete_bash" in shown
    assert "PYTHON" not in shown


LIBRARIES = {"torch", "numpy", "pydantic", "rich", "tokenizers", "jinja2"}


@pytest.mark.parametrize("command", [(), ("compare",), ("generate",), ("bench",)])
def test_help_imports_nothing_heavy(command):
    code = """
import sys
from expertlane.cli.main import main
try:
    main()
finally:
    print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=True
    )
    allowed = {"pydantic"} if command else set()
    assert LIBRARIES & set(done.stderr.split()) <= allowed
