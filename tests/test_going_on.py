"""`--go-on`: what has passed is left out, what failed is not, and other files begin anew."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import going_on
from going_on import Notes, pytest_collection_modifyitems, read_passed


def report(name, when="teardown", outcome="passed"):
    return SimpleNamespace(nodeid=name, when=when, failed=outcome == "failed")


class Item:
    def __init__(self, name, path="a.py", timeout_s=None):
        self.nodeid, self.path, self.config = (
            name,
            Path(path),
            SimpleNamespace(getini=lambda _: 300),
        )
        self._marks = {}
        if timeout_s is not None:
            self._marks = {"full": SimpleNamespace(), "timeout": SimpleNamespace(args=(timeout_s,))}

    def get_closest_marker(self, name):
        return self._marks.get(name)


def test_what_has_passed_is_left_out_and_the_longest_come_first(tmp_path, monkeypatch):
    file = tmp_path / "passed"
    assert read_passed(file) == set()
    notes = Notes(file)
    for each in (
        report("a", "setup"),
        report("a"),
        report("b", "call", "failed"),
        report("b"),
        report("c", "teardown", "failed"),
        report("d", "setup"),  # and then the run was interrupted
    ):
        notes.pytest_runtest_logreport(each)
    notes.pytest_sessionfinish(None, pytest.ExitCode.TESTS_FAILED)
    assert read_passed(file) == {"a"}
    left_out = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config = SimpleNamespace(getoption=lambda _: file, hook=hook)
    items = [
        Item("a"),
        Item("b"),
        Item("e", "b.py"),
        Item("f", "b.py", 900),
        Item("g", "c.py", 3600),
    ]
    pytest_collection_modifyitems(config, items)
    assert [each.nodeid for each in items] == ["g", "e", "f", "b"]
    assert [each.nodeid for each in left_out] == ["a"]
    monkeypatch.setattr(going_on, "_state", lambda: "other files")
    assert read_passed(file) == set()
    assert file.read_text() == "other files\n"
    notes.pytest_sessionfinish(None, pytest.ExitCode.OK)
    assert not file.exists()
