"""Run the commands whose output README and the guides show, and write what they print into them.

`python docs/printed.py [WORD …]` runs all, or those with one of these words. Run it on an idle
machine after a change of what commands print.

An output is a block of text below a line that begins with `Printed on`; the command is the first
one of `expertlane` in the block of shell commands before that. Where the line says `first 12 lines`
only those are kept.
"""

import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from expertlane.results.hardware import cpu_name

ROOT = Path(__file__).parents[1]
COLUMNS = 80
_SHELL = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PRINTED = re.compile(
    r"^Printed on [^\n]*?(?P<cut>, first (?P<num>\d+) lines)?\):\n\n```text\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Printed:
    """What a command printed.

    Attributes:
        when: in words: the date, the machine, and seconds of CPU.
    """

    text: str
    when: str


@cache
def run(command: str) -> Printed:
    """Run a command of `expertlane` beside the files of this checkout; results are not kept.

    Raises:
        RuntimeError: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        for each in ROOT.iterdir():
            if each.name != "results":
                Path(folder, each.name).symlink_to(each)
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)],
            cwd=folder,
            env=os.environ | {"COLUMNS": str(COLUMNS)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cores = len(os.sched_getaffinity(0))
    now = datetime.now(UTC)
    when = f"{now.day} {now:%B %Y} ({cpu_name()}, {cores} cores, {cpu_s:.0f} s of CPU"
    return Printed(done.stdout, when)


def commands_of(text: str) -> list[tuple[re.Match[str], str]]:
    """Each output in a document with its command.

    Raises:
        ValueError: there is none before it.
    """
    found = []
    for match in _PRINTED.finditer(text):
        blocks = [each[1] for each in _SHELL.finditer(text, 0, match.start())]
        lines = blocks[-1].replace("\\\n", " ").splitlines() if blocks else []
        of_lines = [line.partition(" #")[0] for line in lines if line.startswith("expertlane ")]
        if not of_lines:
            raise ValueError(f"no command before {match[0].splitlines()[0]!r}")
        found.append((match, " ".join(of_lines[0].split())))
    return found


def renewed(text: str, words: Sequence[str] = (), run: Callable[[str], Printed] = run) -> str:
    """A document with the outputs of those commands that have one of these words, or of all."""
    for match, command in reversed(commands_of(text)):
        if words and not any(word in command for word in words):
            continue
        printed = run(command)
        lines = printed.text.strip("\n").splitlines()
        cut = match["cut"] or ""
        if cut:
            lines = lines[: int(match["num"])]
        block = "\n".join(line.rstrip() for line in lines)
        whole = f"Printed on {printed.when}{cut}):\n\n```text\n{block}\n```"
        text = text[: match.start()] + whole + text[match.end() :]
    return text


def documents() -> list[Path]:
    """Those with such an output."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs" / "commands").glob("*.md"))]
    return [path for path in pages if _PRINTED.search(path.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    for document in documents():
        before = document.read_text(encoding="utf-8")
        document.write_text(renewed(before, sys.argv[1:]), encoding="utf-8")
