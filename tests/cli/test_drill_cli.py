"""`expertlane drill`: its answer, exit codes and files, what it refuses, and what Ctrl-C leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.screen import fits_a_screen, refused, tells
from cli.small_checkpoint import checkpoint
from client.fake_server import fakes
from comparison import stub_engine
from endpoint.stub_server import Stub
from engine.ranks.processes import wait_until
from engine.stub_runner import letters
from expertlane.results.file import read

LOAD = ["--batch", "2", "--num-requests", "4", "--prompt-len", "4", "--output-len", "6"]
SHORT = [*LOAD, "--after-s", "1.5", "--observe-s", "1.5", "--hang-s", "0.9", "--health-s", "0.6"]
CALM = [*SHORT, "--hang-s", "60", "--health-s", "30"]  # where nothing is to take too long
URL = "http://127.0.0.1:1"


@pytest.fixture
def stub():
    with fakes(Stub) as make:
        yield make


@pytest.fixture(autouse=True)
def around(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXPERTLANE_API_KEY", raising=False)


def test_one_that_passes(run, stub):
    name = "<script>alert(1)</script>"
    server = stub("honest", models=(name,))
    code, out, err = run("drill", server.url, "--kill", "echo done", *CALM, "--out", "found")
    assert code == 0, err
    assert fits_a_screen(out)
    assert tells(" ".join(out.split()), "PASSED 6 out batch 2 done 0 200 nothing")
    results = read(Path("found"))
    (record,) = results.deployments
    assert record.drill.exit_code == 0
    assert not record.drill.is_failed
    assert record.drill.is_local
    assert record.drill.left == ()
    assert record.serving[0].num_requests > 0
    assert record.serving[0].batch == 2
    page = Path("found", "report.html").read_text("utf-8")
    assert name not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<svg") >= 4
    code, again, err = run("report", "found", "--export", "csv", "--out", "again")
    assert code == 0, err
    assert again.replace("again/", "found/") == out
    assert "drill_full_tokens_per_s" in Path("again", "results.csv").read_text()


def test_one_that_fails(run, stub, tmp_path):
    mark = tmp_path / "struck"
    server = stub("hangs, and says 200", mark)
    asked = ["drill", server.url, "--kill", f"touch {mark}", *SHORT, "--json", "--out", "found"]
    code, out, err = run(*asked)
    assert code == 1, err
    (record,) = json.loads(out)["deployments"]
    why = " ".join(record["drill"]["why_failed"])
    assert tells(why, "hung /health 200")
    assert read(Path("found")).deployments[0].drill.is_failed
    code, out, _ = run("report", "found")
    assert fits_a_screen(out)
    assert "\nFAILED: " in out
    assert refused(run("diff", "found", "found"), "diff speed drill verdict found failed")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([URL], "--kill --pid --rank --kubectl"),
        ([URL, "--kill", "true", "--pid", "4"], "--kill --pid exclude"),
        ([URL, "--kill", "true", "--signal", "STOP"], "--signal --kill"),
        ([URL, "--pid", "1"], "--pid 1 2"),
        ([URL, "--pid", "OWN"], "--pid OWN"),  # the command's own process
        ([URL, "--pid", "4194303"], "process 4194303"),
        ([URL, "--rank", "0"], "--rank 0 port machine --kill"),
        ([URL, "--kubectl", "-x"], "--kubectl -x --namespace"),
        ([URL, "--kubectl", "a", "--signal", "STOP"], "--kubectl --kill"),
        ([URL, "--kill", "true", "--batch", "1,2"], "--batch --rate one"),
        ([URL, "--kill", "true", "--layout", "tp=2"], "--layout --engine"),
        ([URL, "--kill", "true", "--after-s", "0"], "--after-s"),
        ([URL, "--kill", "true"], "connect"),
        (["--kill", "true"], "URL --engine"),
        (["--kill", "true", "--engine", "vllm"], "--model"),
        (["--rank", "0", "--engine", "trtllm", "--model", "x"], "--rank TensorRT-LLM --kill"),
        (["--rank", "0", "--engine", "nothing"], "--engine 'nothing' vllm"),
        (["--rank", "0", "--engine", "expertlane", "--model", "paper-tiny"], "paper-tiny serve"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, arguments, words):
    own = str(os.getpid())
    given = [each.replace("OWN", own) for each in arguments]
    assert refused(run("drill", *given, "--out", "found"), words.replace("OWN", own))
    assert not list(tmp_path.iterdir())


def test_a_command_that_fails_leaves_no_results(run, stub, tmp_path):
    server = stub("honest")
    code, out, err = run(
        "drill", server.url, "--kill", "echo who; exit 3", *SHORT, "--out", "found"
    )
    assert (code, out) == (2, "")
    assert tells(err, "exit code 3 who")
    assert not list(tmp_path.iterdir())


def test_a_server_that_fails_by_itself_is_not_struck(run, stub, tmp_path):
    server, mark = stub("fails"), tmp_path / "struck"
    server.strike()
    code, _, err = run("drill", server.url, "--kill", f"touch {mark}", *SHORT)
    assert code == 2
    assert tells(err, "HTTP 500")
    assert not mark.exists()


@pytest.fixture
def words(tmp_path):
    """A folder with a tokenizer."""
    letters()._core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return str(tmp_path)


@pytest.mark.parametrize("behaviour", ["has chats alone", "has chats alone, repeats a chunk"])
def test_a_server_that_has_chats_alone(run, stub, tmp_path, words, behaviour):
    mark = tmp_path / "struck"
    server = stub(behaviour, mark)
    asked = [server.url, "--kill", f"touch {mark}", *CALM, "--observe-s", "2", "--json"]
    assert refused(run("drill", *asked, "--out", "found"), "/v1/completions 404 --endpoint chat")
    assert refused(run("drill", *asked, "--endpoint", "chat"), "--tokenizer")
    assert not mark.exists()
    code, out, err = run("drill", *asked, "--endpoint", "chat", "--tokenizer", words)
    assert code == ("repeats" in behaviour), err
    (record,) = json.loads(out)["deployments"]
    drill = record["drill"]
    assert drill["changes"]["compared"] == "token ids"
    assert drill["changes"]["tie_nats"] is not None
    named = {each["name"] for each in drill["outcomes"]}
    assert ("repeated" in named) == ("repeats" in behaviour)
    assert "messages" in server.asked[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_nothing_is_written(stub, tmp_path, number):
    server, mark = stub("honest"), tmp_path / "struck"
    arguments = ["drill", server.url, "--kill", f"touch {mark}; sleep 60", *SHORT, "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "expertlane", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert wait_until(mark.exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert out == ""
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Options that start the stub of another package's engine."""
    info = tmp_path / "site" / "stub-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stub\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[expertlane.engines]\nstub = {stub_engine.__name__}:Stub\n"
    )
    monkeypatch.syspath_prepend(str(info.parent))
    monkeypatch.setattr("expertlane.comparison.server_process._GRACE_S", 0.3)
    checkpoint(tmp_path / "checkpoint")
    return ["--engine", "stub", "--model", "checkpoint", *SHORT, "--out", "found"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_that_is_started_is_ended_and_a_dead_one_is_a_result(run, started):
    code, out, err = run("drill", "--kill", "kill -9 $(cat found/server/pid)", *started)
    assert code == 1, err
    assert fits_a_screen(out)
    results = read(Path("found"))
    (record,) = results.deployments
    assert str(record.layout) == "tp=1"
    assert record.server.start_s
    assert record.server.engine == "Stub"
    assert not record.drill.is_running
    assert record.drill.is_local
    assert record.drill.left == ()
    assert record.drill.num_of("failed", "cut") > 0
    assert results.machine is not None
    assert not Path(f"/proc/{Path('found/server/pid').read_text()}").exists()


def test_ranks_of_an_engine_that_names_none_are_not_known(run, started):
    code, _, err = run("drill", "--rank", "0", *started)
    assert code == 2
    assert tells(err, "--rank Stub --kill")
