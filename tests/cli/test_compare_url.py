"""`expertlane compare --url` without an experiment: what it prints, writes and refuses."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.screen import one_line, tells
from client.fake_server import answer, error, fakes, whole
from engine.ranks.processes import wait_until
from expertlane.results.file import read

SHORT = ["--prompt-len", "4", "--output-len", "3", "--batch", "2", "--num-requests", "4"]
KEY = "sk-a-secret"


@pytest.fixture
def fake():
    with fakes() as make:
        yield make


@pytest.fixture(autouse=True)
def around(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXPERTLANE_API_KEY", raising=False)


def slow(seconds):
    async def generate(asked, number):
        await asyncio.sleep(seconds)
        async for part in answer(asked, number):
            yield part

    return generate


def test_two_servers_with_names(run, fake, tmp_path):
    name = "<script>alert(1)</script>"
    first, second = fake(slow(0.03), models=(name,)), fake(models=(name,))
    asked = ["compare", "--url", f"tp=8={first.url}/v1/", "--url", f"my b={second.url}", *SHORT]
    code, out, err = run(*asked, "--repeat", "5", "--model", name, "--tokenizer", tokens(tmp_path))
    assert code == 0, err
    lines = out.splitlines()
    assert tells(" ".join(out.split()), "2 requests at once, 4 in / 3 out")
    assert "my b gives" in " ".join(out.split()), "the faster one first"
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    folder = tmp_path / "results" / "compare-tp-8-my-b"
    results = read(folder)
    assert results.question["model"] == name
    assert [each.name for each in results.deployments] == ["tp=8", "my b"]
    for each in results.deployments:
        (serving,) = each.serving
        assert (serving.num_requests, serving.num_output_tokens) == (20, 60)
        assert each.layout is None
    page = (folder / "report.html").read_text("utf-8")
    assert name not in page
    assert "&lt;script&gt;alert(1)" in page
    # The same prompts for both in a round; new ones in each.
    prompts = [[str(each["prompt"]) for each in server.asked] for server in (first, second)]
    assert sorted(prompts[0]) == sorted(prompts[1])
    assert len(set(prompts[0])) > 20
    for command in (["report", folder], ["diff", folder, folder]):
        code, out, err = run(*map(str, command))
        assert code == 0, err


def tokens(folder):
    from engine.stub_runner import letters

    path = folder / "tokenizer"
    path.mkdir()
    letters()._core.save(str(path / "tokenizer.json"))
    return str(path)


def test_prompts_differ_from_run_to_run_unless_a_seed_is_given(run, fake):
    def prompts(*more):
        server = fake()
        code, _, err = run("compare", "--url", server.url, *SHORT, "--repeat", "1", *more)
        assert code == 0, err
        return [each["prompt"] for each in server.asked[1:]]

    assert prompts() != prompts()
    assert prompts("--seed", "7") == prompts("--seed", "7")


def test_an_open_loop_of_one_server_without_a_name(run, fake):
    server = fake()
    asked = ["compare", "--url", server.url, "--rate", "200", "--num-requests", "5", "--json"]
    code, out, err = run(*asked, "--prompt-len", "2:6", "--output-len", "2", "--repeat", "1")
    assert code == 0, err
    found = json.loads(out)
    (record,) = found["deployments"]
    assert record["name"] == f"127.0.0.1:{server.port}"
    assert record["serving"][0]["rate"] == 200
    assert found["question"]["workload"]["prompt_len"] == "2:6"


def test_keys_of_each_server(run, fake, tmp_path):
    first, second = fake(), fake()
    for name in ("one", "other"):
        (tmp_path / name).write_text(f"{KEY}-{name}\n")
    keys = ["--api-key-file", "one", "--api-key-file", "tp=2=other"]
    urls = ["--url", f"a={first.url}", "--url", f"tp=2={second.url}"]
    code, _, err = run("compare", *urls, *keys, *SHORT, "--repeat", "1", "--out", "found")
    assert code == 0, err
    assert set(first.keys) == {f"bearer {KEY}-one"}
    assert set(second.keys) == {f"bearer {KEY}-other"}
    assert not any(KEY in each.read_text() for each in Path("found").iterdir() if each.is_file())


def test_a_model_that_one_does_not_have(run, fake):
    urls = ["--url", f"a={fake().url}", "--url", f"b={fake(models=('another',)).url}"]
    code, _, err = run("compare", *urls, "--model", "paper-tiny", *SHORT)
    assert code == 2
    assert one_line(err, "--url b paper-tiny another")


def test_adapters_are_no_models_of_their_own(run, fake, monkeypatch):
    server = fake()
    cards = [{"id": "paper-tiny"}, {"id": "paper-tiny-lora", "parent": "paper-tiny"}]
    own = server._about
    models = {"/v1/models": whole({"data": cards})}
    monkeypatch.setattr(server, "_about", lambda route: models.get(route) or own(route))
    code, _, err = run("compare", "--url", server.url, *SHORT, "--repeat", "1")
    assert code == 0, err
    assert {each["model"] for each in server.asked} == {"paper-tiny"}


def test_servers_with_several_models_each(run, fake, tmp_path):
    first, second = fake(models=("one", "more")), fake(models=("another", "most"))
    third = fake(models=("only",))
    urls = [
        f"--url={name}={each.url}" for name, each in zip("abc", (first, second, third), strict=True)
    ]
    asked = ["compare", *urls, *SHORT, "--repeat", "1", "--tokenizer", tokens(tmp_path)]
    code, _, err = run(*asked)
    assert code == 2
    assert one_line(err, "--url a one more")
    code, out, err = run(*asked, "--served-model", "a=more", "--served-model", "b=another")
    assert code == 0, err
    assert "Servers name different models: a: more; b: another; c: only." in " ".join(out.split())
    for server, name in ((first, "more"), (second, "another"), (third, "only")):
        assert {each["model"] for each in server.asked} == {name}


def test_servers_of_two_models(run, fake, tmp_path):
    first, second = fake(models=("one",)), fake(models=("another",))
    urls = ["--url", f"a={first.url}", "--url", f"b={second.url}", "--flush-caches"]
    asked = ["compare", *urls, *SHORT, "--repeat", "1", "--tokenizer", tokens(tmp_path)]
    code, out, err = run(*asked)
    assert code == 0, err
    words = " ".join(out.split())
    assert "Servers name different models: a: one; b: another." in words
    assert "The prefix cache of a, b could not be emptied" in words


def test_one_that_dies_midway_keeps_its_rounds(run, fake):
    async def dies(asked, number):
        if number > 12:
            yield error(500, "worker is lost")
            return
        async for part in answer(asked, number):
            yield part

    urls = ["--url", f"a={fake().url}", "--url", f"b={fake(dies).url}"]
    code, out, err = run("compare", *urls, *SHORT, "--repeat", "3", "--json")
    assert code == 0, err
    good, bad = json.loads(out)["deployments"]
    assert good["serving"][0]["client"]["num_rounds"] == 3
    assert 1 <= bad["serving"][0]["client"]["num_rounds"] < 3
    assert "worker is lost" in bad["server"]["failure"]


MISTAKES = {
    "gone": ("a={url} b=http://127.0.0.1:1", [], "http://127.0.0.1:1 connection"),
    "one server": ("a={url} b={url}/v1", [], "--url b a {url} prefix cache"),
    "one name": ("a={url} a=http://127.0.0.1:1", [], "--url a twice"),
    "no URL": ("a=ftp://x", [], "--url ftp://x http://127.0.0.1:8000"),
    "empty name": ("=http://x", [], "--url =http://x tp8="),
    "several": ("a={url}", ["--batch", "1,2"], "--batch one bench"),
    "both": ("a={url}", ["--batch", "1", "--rate", "1"], "--batch --rate"),
    "experiment": ("a={url}", ["paper-small", "--batch", "1"], "--batch EXPERIMENT paper-small"),
    "projection": ("a={url}", ["--project"], "--project EXPERIMENT"),
    "deployments": ("a={url}", ["--only", "1"], "--only EXPERIMENT"),
    "no engine": ("a={url}", ["--engine-args", "-x"], "--engine-args --engine"),
    "no engine's cache": ("a={url}", ["--kv-tokens", "64"], "--kv-tokens --engine"),
    "no such model": ("a={url}", ["--served-model", "a=none"], "--url a none paper-tiny"),
    "engine": ("a={url}", ["--engine", "vllm"], "--engine vllm EXPERIMENT plan"),
    "ranks": ("a={url}", ["--trace"], "--trace ranks --url"),
    "nothing to start": ("a={url}", ["--dry-run"], "--dry-run --engine"),
    "no key": ("a={url}", ["--api-key-file", "b=none"], "--api-key-file b=none"),
}


@pytest.mark.parametrize(("urls", "more", "line"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(run, fake, urls, more, line):
    url = fake().url
    given = [word for each in urls.format(url=url).split() for word in ("--url", each)]
    code, out, err = run("compare", *more, *given)
    assert (code, out) == (2, "")
    assert one_line(err, line.format(url=url))
    assert not Path("results").exists()


def test_a_load_is_for_servers(run):
    code, out, err = run("compare", "--prompt-len", "4")
    assert (code, out) == (2, "")
    assert one_line(err, "--prompt-len --url")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_what_there_is(fake, tmp_path, number):
    """The server answers the first two rounds, and keeps the third waiting."""

    async def stalls(asked, request):
        if request > 13:  # a look first, then with each round, a warm-up of two and rounds of four
            await asyncio.sleep(120)
        async for part in answer(asked, request):
            yield part

    server = fake(stalls)
    asked = ["compare", "--url", f"a={server.url}", *SHORT, "--out", "found"]
    process = subprocess.Popen(
        [sys.executable, "-m", "expertlane", *asked],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "80"},
    )
    try:
        assert wait_until(lambda: len(server.asked) > 14)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert "Partial: interrupted before all was measured." in " ".join(out.split())
    (record,) = read(tmp_path / "found").deployments
    assert record.serving[0].client.num_rounds == 2
