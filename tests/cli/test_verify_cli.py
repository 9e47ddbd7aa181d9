"""`expertlane verify`: exit codes, one screen, files, mistakes."""

import json

import pytest

from client.fake_server import Fake
from endpoint.toy import Toy, noisy, toy_server

_SHORT = ("--quick", "--seed", "3")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """96 words, as many as a toy's tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    core = Tokenizer(models.WordLevel({f"w{each}": each for each in range(96)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def pair():
    """Two servers of one toy, as two implementations round it."""
    with toy_server(Toy(noise=2.0**-8)) as one, toy_server(noisy()) as other:
        yield one, other


def _asked(server, reference, tokenizer):
    return ("verify", server.url, "--reference", reference.url, "--tokenizer", str(tokenizer))


def test_the_same_is_0_and_fits_a_screen(run, pair, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*_asked(*pair, tokenizer), *_SHORT, "--out", ".")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert "Same:" in " ".join(lines[:6])
    assert {each.name for each in tmp_path.iterdir()} == {
        "report.html",
        "report.md",
        "results.json",
    }
    code, again, _ = run("report", str(tmp_path), "--out", str(tmp_path))
    assert code == 0
    assert "Same:" in again


def test_a_difference_is_1(run, pair, tokenizer, tmp_path):
    wrong = noisy(Toy(scales=((0, 1, 30.0), (1, 2, 30.0))))
    with toy_server(wrong) as server:
        asked = _asked(server, pair[0], tokenizer)
        code, out, err = run(*asked, *_SHORT, "--json", "--out", str(tmp_path))
    assert code == 1, err
    found = json.loads(out)
    assert found["kind"] == "verify"
    record = found["deployments"][0]["verified"]
    assert record["verdict"] == "differs"
    assert record["worst"]


def test_what_cannot_be_told_is_3(run, pair, tokenizer, tmp_path):
    with toy_server(Toy(noise=0.06, seed=11)) as server:
        code, out, err = run(
            *_asked(server, pair[0], tokenizer), *_SHORT, "-q", "--out", str(tmp_path)
        )
    assert code == 3, (out, err)
    assert out.startswith("Can't tell")


def test_mistakes_get_one_line(run, tmp_path, tokenizer):
    fake = Fake()
    fake.stop()
    url = fake.url
    for asked, word in (
        ((url, "--reference", "nowhere"), "checkpoint folder"),
        ((url, "--reference", str(tmp_path)), "--reference"),
        ((url, "--reference", url, "--tokenizer", str(tokenizer)), "cannot connect"),
        (("ftp://a", "--reference", url), "must be like"),
        ((url, "--reference", url, "--budget-s", "-1"), "budget"),
    ):
        code, out, err = run("verify", *asked)
        assert code == 2, (asked, err)
        assert not out
        assert word in err, (asked, err)
        assert len(err.splitlines()) == 1
