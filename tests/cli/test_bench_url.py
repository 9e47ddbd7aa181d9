"""`expertlane bench --url`: what it prints, writes and refuses, and what Ctrl-C leaves."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.screen import one_line, tells
from client.fake_server import answer, error, fakes, page
from engine.ranks.processes import wait_until
from expertlane.results.file import read

SHORT = ["--prompt-len", "4", "--output-len", "3", "--num-requests", "6", "--batch", "2"]
CHAT = ["--endpoint", "chat"]
KEY = "sk-a-secret"


@pytest.fixture
def fake():
    with fakes() as make:
        yield make


@pytest.fixture(autouse=True)
def around(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXPERTLANE_API_KEY", raising=False)


def test_results_of_one_server(run, fake, monkeypatch, tmp_path):
    monkeypatch.setenv("EXPERTLANE_API_KEY", KEY)
    server = fake()
    asked = ["bench", "--url", server.url, *SHORT, "--slo", "ttft.p95=1000s", "--price", "3"]
    code, out, err = run(*asked, "--json", "--out", "found", "--export", "csv")
    assert code == 0, err
    results = read(tmp_path / "found")
    found = json.loads(out)
    (serving,) = found["deployments"][0]["serving"]
    assert found["deployments"][0]["layout"] is None
    assert found["machine"] is None
    assert found["question"]["urls"] == [server.url]
    assert serving["client"]["requests"]["output_lens"] == [3] * 6
    assert serving["usd_per_million_output"]["value"] > 0
    assert results.deployments[0].serving[0].num_output_tokens == 18
    assert set(server.keys) == {f"Bearer {KEY}".lower()}
    written = list((tmp_path / "found").iterdir())
    assert {each.name for each in written} >= {"results.json", "report.html", "results.csv"}
    assert not any(KEY in each.read_text("utf-8") for each in written)

    code, out, _ = run(*asked)
    lines = out.splitlines()
    assert code == 0
    assert f"paper-tiny | {server.url} | completions" in lines[0]
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    code, out, _ = run("diff", "found", "found")
    assert code == 0, out


def test_two_servers_and_their_page(run, fake, tmp_path):
    name = "<script>alert(1)</script>"
    first, second = fake(models=(name,)), fake(models=(name,))
    key = tmp_path / "key"
    key.write_text(f"{KEY}\n")
    asked = ["bench", "--url", first.url, "--compare", second.url, *SHORT, "--out", "found"]
    asked += ["--tokenizer", str(letters(tmp_path)), "--api-key-file", str(key)]
    code, out, err = run(*asked)
    assert code == 0, err
    assert f"A: {first.url} | B: {second.url}" in " ".join(out.split())
    assert "At batch 2 A gives" in out
    assert "significant difference" in " ".join(out.split())
    assert len(out.splitlines()) <= 40
    page = (tmp_path / "found" / "report.html").read_text("utf-8")
    assert name not in page
    assert "&lt;script&gt;alert(1)" in page
    results = read(tmp_path / "found")
    assert len(results.ratios) >= 5
    assert {each.num_rounds for each in results.ratios} == {5}
    assert second.keys[-1] == f"bearer {KEY}"


RANK = "<script>alert(2)</script>"


def test_what_the_server_counted_is_in_results_and_page(run, fake, tmp_path):
    """Every reading is one request later: then others use the server."""
    num_reads = 0

    def metrics():
        nonlocal num_reads
        num_reads += 1
        return page(
            f'vllm:request_success_total{{engine="{RANK}",finished_reason="length"}} '
            f"{100 * num_reads}\n"
            f'vllm:generation_tokens_total{{engine="{RANK}"}} 9\n'
            'vllm:generation_tokens_total{engine="1"} 9\n'
            "vllm:num_preemptions_total 0\n"
        )

    server = fake(metrics=metrics)
    asked = ["bench", "--url", server.url, *SHORT, "--out", "found", "--flush-caches"]
    code, out, err = run(*asked)
    assert code == 0, err
    assert tells(" ".join(out.split()), "Other traffic requests of other clients")
    assert len(out.splitlines()) <= 40
    shown = (tmp_path / "found" / "report.html").read_text("utf-8")
    assert RANK not in shown
    assert "&lt;script&gt;alert(2)" in shown
    assert "Server metrics" in shown
    assert f"The prefix cache of {server.url} could not be emptied" in shown
    (serving,) = read(tmp_path / "found").deployments[0].serving
    assert set(serving.engine.by_rank) == {RANK, "1"}
    assert serving.engine.num_others > 0
    code, out, err = run("report", "found", "--export", "csv", "--out", "again")
    assert code == 0, err
    assert RANK not in out


def test_results_written_before_servers_were_asked_are_read(run, fake, tmp_path):
    assert run("bench", "--url", fake().url, *SHORT, "--out", "found")[0] == 0
    path = tmp_path / "found" / "results.json"
    found = json.loads(path.read_text())
    del found["deployments"][0]["serving"][0]["engine"]
    path.write_text(json.dumps(found))
    assert read(path).deployments[0].serving[0].engine is None


def letters(folder):
    """A folder with a tokenizer of single letters."""
    from engine.stub_runner import letters as tokenizer

    path = folder / "tokenizer"
    path.mkdir()
    tokenizer()._core.save(str(path / "tokenizer.json"))
    return path


def test_a_chat_gets_text(run, fake, tmp_path):
    async def chat(asked, number):
        if "messages" not in asked:
            yield error(400, "messages is missing")
            return
        text = asked["messages"][0]["content"]
        async for part in answer(asked | {"prompt": [*text, "role", "end"]}, number):
            yield part

    server = fake(chat)
    folder = str(letters(tmp_path))
    code, out, err = run("bench", "--url", server.url, *CHAT, "--tokenizer", folder, *SHORT)
    assert code == 0, err
    lens = [len(each["messages"][0]["content"]) for each in server.asked[1:]]
    assert set(lens) == {2}  # of 4 tokens the template adds two
    assert " | chat | " in out


def test_recorded_requests_come_when_they_did_and_share_what_they_shared(run, fake, tmp_path):
    server = fake()
    trace = tmp_path / "trace.jsonl"
    rows = [(0, 520, 2, [1, 2]), (10, 600, 3, [1, 3]), (20, 5, 1, [])]
    names = "timestamp", "input_length", "output_length", "hash_ids"
    trace.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    asked = ["bench", "--url", server.url, "--requests", str(trace), "--num-warm-up", "0"]
    code, out, err = run(*asked, "--json")
    assert code == 0, err
    (serving,) = json.loads(out)["deployments"][0]["serving"]
    assert (serving["batch"], serving["rate"]) == (None, None)
    requests = serving["client"]["requests"]
    assert requests["due_s"] == [0, 0.01, 0.02]
    assert requests["prompt_lens"] == [520, 600, 5]
    first, second, _ = (each["prompt"] for each in server.asked[1:])
    assert first[:512] == second[:512]
    assert first[512:520] != second[512:520]


MISTAKES = {
    "no model": ([], "MODEL missing --url"),
    "no server": (["paper-tiny", *CHAT], "--endpoint --url"),
    "no URL": (["--url", "ftp://h"], "--url ftp://h http://127.0.0.1:8000"),
    "engine": (["--url", "{url}", "--layout", "tp=2"], "--layout"),
    "engine too": (["--url", "{url}", "--num-blocks", "9"], "--num-blocks"),
    "gone": (["--url", "http://127.0.0.1:1"], "http://127.0.0.1:1 connection"),
    "model": (["other", "--url", "{url}"], "{url} other paper-tiny"),
    "no key": (["--url", "{url}", "--api-key-file", "none"], "--api-key-file none"),
    "keys": (["--url", "{url}", "--api-key-file", "a", "--api-key-file", "b"], "--api-key-file 2"),
    "rounds": (["--url", "{url}", "--rounds", "0"], "--rounds 0 1"),
    "chat": (["--url", "{url}", *CHAT], "text model's folder"),
    "prefix": (
        ["--url", "{url}", "--prompt-len", "8", "--prefix-len", "8"],
        "--prefix-len 8 --prompt-len prompt",
    ),
    "prefixes": (["--url", "{url}", "--num-prefixes", "2"], "--num-prefixes"),
}


@pytest.mark.parametrize(("arguments", "line"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(run, fake, arguments, line):
    url = fake().url
    code, out, err = run("bench", *(each.format(url=url) for each in arguments))
    assert (code, out) == (2, "")
    assert one_line(err, f"{line.format(url=url)}")
    assert err.count("\n") == 1
    assert not Path("results").exists()


def test_a_refused_key_is_one_line(run, fake, monkeypatch):
    server = fake()
    monkeypatch.setattr(server, "_about", lambda route: error(401, "give a valid API key"))
    code, _, err = run("bench", "--url", server.url)
    assert code == 2
    assert one_line(err, f"{server.url} API HTTP 401 EXPERTLANE_API_KEY --api-key-file")


@pytest.mark.smoke(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_what_there_is_and_says_so(fake, tmp_path, number):
    """The server answers ten requests and keeps the others waiting."""

    async def stalls(asked, request):
        if request > 10:
            await asyncio.sleep(120)
        async for part in answer(asked, request):
            yield part

    server = fake(stalls)
    arguments = ["bench", "--url", server.url, "--batch", "4", "--num-requests", "50"]
    process = subprocess.Popen(
        [sys.executable, "-m", "expertlane", *arguments, "--num-warm-up", "0", "--out", "found"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "80"},
    )
    try:
        assert wait_until(lambda: len(server.asked) >= 15)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + number
    words = " ".join(out.split())
    why = "interrupted" if number == signal.SIGINT else "told to end"
    assert tells(words, f"{why} 40")
    results = read(tmp_path / "found")
    (serving,) = results.deployments[0].serving
    assert serving.client is not None
    assert (serving.num_requests, serving.client.num_unsent) == (10, 40)
    (caution,) = results.cautions
    assert tells(caution, f"Partial {why}")
