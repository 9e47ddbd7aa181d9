"""The commands that the documents of this repository name, read from their Markdown.

A command is a line of a block of code that a shell would run, or words in backticks that begin as
one: a program that comes with expertlane, `make`, or the path of a script. The log and the
changelog describe the past, so they may name commands that no longer exist.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HISTORY = {"log.md", "changelog.md"}
SCRIPT_FOLDERS = ("benchmarks", "calibration", "experiments", "docs")

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SHELLS = {"", "bash", "console", "sh"}
_WORDS = re.compile(r"`([^`\n]+)`")
_PROGRAMS = re.compile(
    r"(?:\w+=\S+ )*(?:\S*/)?(?:make|expertlane|torchrun|python3?(?: -P)? (?:-m )?[\w/.]+)\s"
)
_SCRIPT = re.compile(r"(?:benchmarks|calibration|experiments|docs|tests)/[\w/]+\.py\b")


def documents() -> list[Path]:
    """The documents that describe the present."""
    pages = [path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts]
    kept = sorted(path for path in pages if path.name not in HISTORY)
    first = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [*first, *kept, ROOT / "experiments" / "paper" / "README.md"]


def blocks(text: str) -> list[str]:
    """The blocks of code that a shell would run, their lines whole."""
    found = [code for language, code in _BLOCK.findall(text) if language in _SHELLS]
    return [code.replace("\\\n", " ") for code in found]


def program_of(page: str, word: str) -> str:
    """The one program in Python of a page that holds a word."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (found,) = (code for kind, code in _BLOCK.findall(text) if kind == "python" and word in code)
    return str(found)


def commands_in(text: str) -> list[str]:
    """The command lines of a document, as written, without comments."""
    lines = [line for code in blocks(text) for line in code.splitlines()]
    lines += _WORDS.findall(_BLOCK.sub("", text))
    parts = [part for line in lines for part in _parts(line.strip().removeprefix("$ "))]
    return [part for part in parts if _PROGRAMS.match(f"{part} ") or _SCRIPT.match(part)]


def _parts(line: str) -> list[str]:
    """The commands of a line, between `&&`, up to a pipe, a redirection or an ampersand."""
    whole = re.sub(r"\s#\s.*", "", line)
    return [re.split(r"\s[|>&](?:\s|$)", part)[0].strip() for part in whole.split("&&")]


def kept_results(root: Path = ROOT) -> dict[Path, int]:
    """Folders and files of results in the checkout, and when they were written."""
    folders = [root / "results", root / "benchmarks" / "results"]
    paths = [path for each in folders if each.exists() for path in (each, *each.rglob("*"))]
    return {path: path.stat().st_mtime_ns for path in paths}


@dataclass(frozen=True)
class Command:
    """A command line taken apart.

    Attributes:
        kind: `make`, `expertlane`, or `script`.
        name: the target, the command, or the script's path in the repository.
        words: what follows.
    """

    kind: str
    name: str
    words: tuple[str, ...]

    @classmethod
    def of(cls, line: str) -> "Command | None":
        """The command of a line; None where it names nothing of this repository's."""
        words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        program, rest = words[0].rpartition("/")[2], words[1:]
        if program == "torchrun":
            program, rest = "python", rest[rest.index("-m") :] if "-m" in rest else []
        if program.startswith("python"):
            rest = rest[1:] if rest[:1] == ["-P"] else rest
            if rest[:1] == ["-m"] and rest[1:2] == ["expertlane"]:
                program, rest = "expertlane", rest[2:]
            elif rest[:1] == ["-m"] and rest[1:]:
                path = f"tests/{rest[1].replace('.', '/')}.py"
                return cls("script", path, (*rest[2:],)) if (ROOT / path).exists() else None
            else:
                words = rest
        if program in ("make", "expertlane"):
            return cls(program, rest[0], (*rest[1:],)) if rest else None
        if words and _SCRIPT.fullmatch(words[0]):
            return cls("script", words[0], (*words[1:],))
        return None


def named() -> dict[Command, list[str]]:
    """All commands, each with the documents that name it."""
    found: dict[Command, list[str]] = {}
    for path in documents():
        for line in commands_in(path.read_text(encoding="utf-8")):
            if (command := Command.of(line)) is not None:
                found.setdefault(command, []).append(str(path.relative_to(ROOT)))
    return found


def scripts() -> set[str]:
    """The scripts of this repository that are run as programs, outside tests."""
    every = (path for folder in SCRIPT_FOLDERS for path in (ROOT / folder).rglob("*.py"))
    main = re.compile(r"^if __name__ == .__main__.:", re.MULTILINE)
    return {
        str(path.relative_to(ROOT))
        for path in every
        if main.search(path.read_text(encoding="utf-8")) and "_build" not in path.parts
    }
