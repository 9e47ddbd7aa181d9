"""Where the keys of a server come from."""

import pytest

from expertlane.cli.serve import _Options
from expertlane.cli.server_options import API_KEY
from expertlane.errors import UserError


def keys(**given):
    return _Options(**{"api_key": None, "api_key_file": None} | given).api_keys()


def test_keys_are_those_given_else_the_one_around(monkeypatch, tmp_path):
    monkeypatch.setenv(API_KEY, "around")
    path = tmp_path / "keys"
    path.write_text("one\n\n  two \n")
    assert keys() == ("around",)
    assert keys(api_key_file=path) == ("one", "two")
    assert keys(api_key=["three"], api_key_file=path) == ("three", "one", "two")
    monkeypatch.delenv(API_KEY)
    assert keys() == ()


@pytest.mark.parametrize("text", ["", "\n", "a b", "é", "a\x00"])
def test_what_is_no_key_is_not_repeated(monkeypatch, tmp_path, text):
    monkeypatch.delenv(API_KEY, raising=False)
    path = tmp_path / "keys"
    path.write_text(f"{text}\n")
    with pytest.raises(UserError) as caught:
        keys(api_key_file=path)
    assert "key" in str(caught.value)
    assert not text.strip() or text not in str(caught.value)
