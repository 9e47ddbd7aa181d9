"""Standard streams that are full, closed or without a reader; signals from the first moment on."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import example_pages
from cli.screen import one_line, tells
from expertlane.cli.output import guard_streams, print_json, stdout_console
from expertlane.results.file import write

PYTHON = shlex.quote(sys.executable)
SIMULATE = "simulate paper-tiny --layout tp=1 --cluster h100x1 --prompt-len 8 --output-len 4"
SIMULATE += " --batch 4 --num-requests 8"
FILES = ["report.html", "report.md", "results.json"]
FULL = "standard output No space left"


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Let a shell run `EXPERTLANE …` in a folder."""
    return subprocess.run(
        ["bash", "-c", command.replace("EXPERTLANE", f"{PYTHON} -m expertlane")],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def made(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with results of which no report is made yet."""
    write(example_pages.serving(), tmp_path / "kept")
    return tmp_path / "kept"


def long(*values: object) -> object:
    """A combination of what others cover by themselves."""
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("arguments", "full"),
    [
        ("--version", "full"),
        ("--help", "full, both"),
        ("compare --help", "full"),
        (SIMULATE, "full"),
        (SIMULATE, "full, both"),
        (f"{SIMULATE} --json", "full"),
        long("--version", "full, both"),
        long("--help", "full"),
        long("compare --help", "full, both"),
        long(f"{SIMULATE} --json", "full, both"),
    ],
)
def test_a_full_disk_is_one_line_and_exit_code_1(tmp_path, arguments, full):
    both = " 2> /dev/full" if full == "full, both" else ""
    to = " --out kept" if "simulate" in arguments else ""
    done = shell(f"EXPERTLANE {arguments}{to} > /dev/full{both}", tmp_path)
    assert done.returncode == 1
    lines = [each for each in done.stderr.splitlines() if not each.startswith("simulating")]
    assert lines == [] if both else one_line("\n".join([*lines, ""]), FULL)
    if "simulate" in arguments:
        assert made(tmp_path / "kept") == FILES


@pytest.mark.full
@pytest.mark.parametrize("as_json", ["", long(" --json")])
def test_a_pipe_without_a_reader_ends_in_141_without_a_word(tmp_path, kept, as_json):
    command = "{ sleep 0.5; EXPERTLANE %s; echo $? > code; } | true"
    done = shell(command % f"{SIMULATE} --out kept{as_json}", tmp_path)
    assert (tmp_path / "code").read_text() == "141\n"
    assert [each.partition(":")[0] for each in done.stderr.splitlines()] == [
        "simulating a steady state"
    ]
    assert made(kept) == FILES
    done = shell(command % f"report kept{as_json}", tmp_path)
    assert (tmp_path / "code").read_text() == "141\n"
    assert done.stderr == ""
    assert made(kept) == FILES


CLOSED = (">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2> /dev/full", ">&- 2> /dev/full")


@pytest.mark.smoke(1)
@pytest.mark.parametrize("streams", CLOSED)
def test_what_files_hold_needs_no_streams(tmp_path, kept, streams):
    done = shell(f"EXPERTLANE report kept {streams}", tmp_path)
    told = "" if "2>" in streams else "written: kept/report.md, kept/report.html\n"
    assert (done.returncode, done.stderr) == (0, told)
    assert bool(done.stdout) is (">&-" not in streams.replace("2>&-", ""))
    assert made(kept) == FILES
    assert b"written" not in (kept / "results.json").read_bytes()


@pytest.mark.full  # the first is also a case of the test before
@pytest.mark.parametrize("form", ["", "--quiet", "--full", "--json"])
def test_all_forms_of_it(tmp_path, kept, form):
    done = shell(f"EXPERTLANE report kept {form} >&-", tmp_path)
    assert (done.returncode, done.stderr) == (0, "written: kept/report.md, kept/report.html\n")


@pytest.mark.smoke(2)
@pytest.mark.parametrize("streams", CLOSED)
@pytest.mark.parametrize("arguments", ["--help", "--version", "list models", "diff kept kept"])
def test_output_that_nothing_else_holds_fails(tmp_path, kept, arguments, streams):
    done = shell(f"EXPERTLANE {arguments} {streams}", tmp_path)
    is_lost = ">&-" in streams.replace("2>&-", "")
    assert done.returncode == is_lost
    assert not is_lost or done.stdout == ""
    if is_lost and "2>" not in streams:
        assert one_line(done.stderr, "standard output closed")


def test_a_full_disk_leaves_the_answer_on_the_screen(tmp_path):
    done = shell(f"ulimit -f 1; EXPERTLANE {SIMULATE} --quiet --out made", tmp_path)
    assert done.returncode == 2
    assert "tokens/s" in done.stdout
    assert tells(done.stderr.splitlines()[-1], "cannot write made/results.json File too large")
    assert made(tmp_path / "made") == []


@pytest.mark.full
def test_a_text_that_is_lost_and_a_server_that_needs_no_output(tmp_path):
    """What `generate` wrote nowhere fails; a service may have no standard output."""
    generate = "generate paper-tiny --token-ids 1,2,3 --max-tokens 2 --temperature 0"
    for more in ("", " --json", " --record-routing kept/routing.npz"):
        done = shell(f"EXPERTLANE {generate}{more} >&-", tmp_path)
        assert done.returncode == 1
        (line,) = [each for each in done.stderr.splitlines() if "error" in each]
        assert one_line(f"{line}\n", "standard output closed")
        assert "Traceback" not in done.stderr
    assert made(tmp_path / "kept") == ["routing.npz"]
    served = "EXPERTLANE serve paper-tiny --port 0 >&- 2> errors &"
    is_up = "until grep -q computing errors; do sleep 0.1; done; sleep 1"
    done = shell(f"{served} {is_up}; kill %1; wait %1; echo $?", tmp_path)
    assert done.stdout == "0\n"
    assert "error" not in (tmp_path / "errors").read_text()


@pytest.mark.parametrize("streams", ["2>&-", "2> /dev/full", ">&- 2>&-"])
def test_a_mistake_that_cannot_be_told_keeps_its_exit_code(tmp_path, streams):
    assert shell(f"EXPERTLANE report none {streams}", tmp_path).returncode == 2


@pytest.mark.full
@pytest.mark.parametrize(
    "environment",
    [
        long({"PYTHONIOENCODING": "ascii"}),
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
)
def test_what_an_encoding_cannot_carry_is_replaced(tmp_path, environment):
    done = shell(f"EXPERTLANE {SIMULATE}", tmp_path, **environment)
    assert (done.returncode, done.stderr.count("\n")) == (0, 2)
    if environment.get("PYTHONIOENCODING") != "latin-1":
        assert done.stdout.isascii()
        assert "h100x1" in done.stdout
    done = shell("EXPERTLANE report 'né×語'", tmp_path, **environment)
    assert done.returncode == 2
    assert "no" in done.stderr


def test_json_says_the_same_in_ascii(monkeypatch):
    values = {"name": "TP 8 × PP 2 語 😀", "bad": "\x9b31m\u202e\x7f\x1b"}
    for encoding in ("ascii", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        print_json(json.dumps(values, ensure_ascii=False) + "\n")
        shown = raw.getvalue().decode(encoding)
        assert json.loads(shown) == values
        assert not set(shown) & set(values["bad"].replace("31m", ""))


def test_streams_that_others_put_in_place_stay(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    guard_streams()
    assert sys.stdout is stream


def test_a_name_that_is_not_utf_8(tmp_path):
    done = shell(f"EXPERTLANE {SIMULATE} --out $'kept\\xff'", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (0, 2)
    (folder,) = os.listdir(os.fsencode(tmp_path))
    results = json.loads((tmp_path / os.fsdecode(folder) / "results.json").read_bytes())
    assert results["command"].endswith("--out 'kept\ufffd'")


SIGNAL_AT_IMPORT = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
from expertlane.cli.main import main
sys.argv = ["expertlane", *{arguments!r}.split()]
main()
"""


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
LATER = ("expertlane.cli.plan", "numpy", "expertlane.report.terminal")


@pytest.mark.smoke(3)
@pytest.mark.parametrize(
    ("module", "number"),
    [
        *(("typer", number) for number in CODES),
        *zip(LATER, CODES, strict=True),
        *(long(LATER[i], number) for i in range(3) for j, number in enumerate(CODES) if i != j),
    ],
)
def test_a_signal_during_imports(tmp_path, module, number):
    program = SIGNAL_AT_IMPORT.format(module=module, number=int(number), arguments=SIMULATE)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    code = CODES[number]
    assert (done.returncode, done.stdout) == (code, "")
    lines = [each for each in done.stderr.splitlines() if not each.startswith("simulating")]
    said = "interrupted" if code == 130 else f"ended by {number.name}"
    assert lines in ([], [f"expertlane: error: {said}"])


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    program = SIGNAL_AT_IMPORT.format(module="typer", number=1, arguments="--version")
    done = shell(f"trap '' HUP; exec {PYTHON} -c {shlex.quote(program)}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("expertlane ")


def test_names_are_no_markup(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    stdout_console().print("[red]a[/red] [link=http://x]b :smile:")
    assert shown.getvalue() == "[red]a[/red] [link=http://x]b :smile:\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_line_on_stderr_does_not_wait_for_the_end(tmp_path, unbuffered):
    path = tmp_path / "errors"
    code = (
        "import sys; from expertlane.cli.output import guard_streams; guard_streams(); "
        "print('a line', file=sys.stderr); print(open(sys.argv[1]).read())"
    )
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", code, str(path)]
    with path.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
    assert done.stdout == b"a line\n\n"
