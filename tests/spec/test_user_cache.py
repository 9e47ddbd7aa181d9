"""Where the cache of a user is."""

from pathlib import Path

import pytest

from expertlane.spec.files import user_cache


@pytest.mark.parametrize("named", ["", "relative", "./also"])
def test_what_is_not_absolute_does_not_count(monkeypatch, tmp_path, named):
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "expertlane"


def test_an_absolute_one_counts(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert user_cache() == Path("/some/where/expertlane")
