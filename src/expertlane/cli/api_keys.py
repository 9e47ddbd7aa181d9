"""Keys of an API: of a server that asks for them, or of one that is measured."""

from pathlib import Path

from expertlane.errors import UserError, naming
from expertlane.spec.files import read_text

API_KEY = "EXPERTLANE_API_KEY"
_MOST_BYTES = 2**16


def key_lines(path: Path) -> dict[str, str]:
    """The keys of a file, one a line, by where they stand.

    Raises:
        UserError: it cannot be read, or has none.
    """
    with naming("--api-key-file"):
        lines = read_text(path, _MOST_BYTES).splitlines()
    keys = {f"{path}, line {number}": line.strip() for number, line in enumerate(lines, 1)}
    keys = {where: key for where, key in keys.items() if key}
    if not keys:
        raise UserError(f"--api-key-file: {path} has no key; give one a line")
    return keys


def check_key(key: str, where: str) -> None:
    """Refuse what no header can carry.

    Raises:
        UserError: it is no word of printable ASCII.
    """
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{where} is no API key: it must be one word of printable ASCII")
