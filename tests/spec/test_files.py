"""Files are written whole, and in no other file's place; where a user's cache is."""

import os
from pathlib import Path

import pytest

from cli.screen import telling
from expertlane.errors import UserError
from expertlane.spec.files import user_cache, write_text


def test_a_new_file_and_its_folder(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    assert write_text(path, "text") == path
    assert path.read_text() == "text"
    assert os.listdir(path.parent) == ["file"]


def test_a_pipe_is_not_replaced(tmp_path):
    """A device neither: as root, `--out /dev/null` put a file in its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=telling("/pipe regular")):
        write_text(pipe, "text")
    assert os.listdir(tmp_path) == ["pipe"]
    assert pipe.is_fifo()


def test_a_link_stays_a_link(tmp_path):
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(file)
    write_text(link, "one")
    write_text(link, "two")
    assert link.is_symlink()
    assert file.read_text() == "two"


@pytest.mark.parametrize("name", ["loop", "x" * 5000])
def test_a_name_that_cannot_be(tmp_path, name):
    if name == "loop":
        (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match=r"^cannot write "):
        write_text(tmp_path / name, "text")


@pytest.mark.parametrize("named", ["", "relative", "./also"])
def test_what_is_not_absolute_does_not_count(monkeypatch, tmp_path, named):
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "expertlane"


def test_an_absolute_one_counts(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert user_cache() == Path("/some/where/expertlane")
