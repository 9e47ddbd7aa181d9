"""Rows that `measure.py` and `judge.py` write while they run: a line of JSON for each result.

A run that was ended goes on where its file ends.
"""

import json
from pathlib import Path
from typing import Any

from network import JudgeError


class Rows:
    """Rows by kind, in the order in which they came.

    Args:
        path: of the file; made if it is not there.
        head: machine and versions, which must be the same for all rows of the file.

    Raises:
        JudgeError: the file was written with another head.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path = path
        lines = self._lines()
        if not lines:
            path.write_text(json.dumps(head) + "\n")
        elif (kept := json.loads(lines[0])) != head:
            raise JudgeError(f"{path} is of {kept}, not of {head}; take another folder")
        else:  # a run that was ended may have left half a line
            path.write_text("".join(lines))

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def _lines(self) -> list[str]:
        """Those that are whole."""
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]

    def all(self) -> list[tuple[str, Any]]:
        """Kinds and rows."""
        return [each for line in self._lines()[1:] for each in json.loads(line).items()]

    def of(self, kind: str) -> list[Any]:
        """Those of a kind."""
        return [row for each, row in self.all() if each == kind]


def add(path: Path, kind: str, row: Any) -> None:
    """Keep a row in the file; any process may."""
    with path.open("a") as file:
        file.write(json.dumps({kind: row}) + "\n")
