"""The commands of the first pages as written, on small inputs: they go well."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from documented.commands import ROOT, Command, blocks, named, program_of
from documented.printed import printed, shape
from documented.smokes import FIRST_PAGES, LIMIT_S, MORE, Stage, run, run_expertlane
from engine.ranks.processes import wait_until
from server.front import KEPT, Front, free_port

pytestmark = [pytest.mark.full, pytest.mark.timeout(2 * LIMIT_S)]

NOT_RUN = {"drill", "--help"}  # a drill kills a process
COMMANDS = [
    each
    for each, where in named().items()
    if each.kind == "expertlane" and FIRST_PAGES & {*where} and each.name not in NOT_RUN
]
EXPERIMENT = """name = "mine"
[model]
preset = "paper-tiny"
[workload]
num_sequences = 4
prompt_len = 6
output_len = 4
[[deployments]]
name = "TP"
layout = "tp=2"
baseline = true
[[deployments]]
name = "EP"
layout = "dp=2,ep=2"
"""
PROJECTED = shlex.split(
    "paper-tiny --layout dp=2,ep=2 --cluster h100x2 --batch 2 --prompt-len 8 --output-len 8"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that these pages name."""
    stage = Stage(tmp_path_factory.mktemp("readme"))
    path = stage.folder
    assert stage.checkpoint.name == "my-checkpoint"
    (path / "mine.toml").write_text(EXPERIMENT)
    (path / "docs").symlink_to(ROOT / "docs")
    for name in ("before", "after", "paper-small"):
        run_expertlane(path, "simulate", *PROJECTED, "--out", f"results/{name}")
    write_trace(path / "routing.npz")
    return path


def write_trace(path: Path) -> None:
    from expertlane.balance import trace

    scores = np.random.default_rng(0).gumbel(size=(2, 300, 32)) - np.log(np.arange(1, 33))
    topk_ids = np.argsort(-scores, axis=-1)[..., :2].astype(np.int16)
    of_step = np.zeros(300, dtype=np.int64)
    trace.write_trace(trace.RoutingTrace("a/model", 32, (1, 2), topk_ids, of_step), path)


@contextmanager
def served(folder: Path, *words: str) -> Iterator[str]:
    """The address of a server at a free port; on SIGTERM it must end with exit code 0."""
    command = [sys.executable, "-m", "expertlane", "serve", *words, "--port", "0", "--json"]
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            line = process.stdout.readline()
            assert line, (folder / "serve.log").read_text()
            yield json.loads(line)["live"].removesuffix("/live")
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT_S) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def text_of(command: Command) -> str:
    return " ".join((command.name, *command.words))


def of_name(*names: str) -> list[Command]:
    return [each for each in COMMANDS if each.name in names]


def is_of_server(command: Command) -> bool:
    return any(word.startswith("http://127.0.0.1:8000") for word in command.words)


ALONE = [each for each in COMMANDS if each.name != "serve" and not is_of_server(each)]


@pytest.mark.parametrize("command", ALONE, ids=text_of)
def test_a_command_goes_well(command: Command, folder: Path):
    more = shlex.split(MORE.get(text_of(command), ""))
    done = run_expertlane(folder, command.name, *command.words, *more)
    assert done.stdout.strip()
    if command == Command("expertlane", "compare", ()):
        assert shape(done.stdout) == shape(printed("README.md", "compare").text)


@pytest.mark.parametrize("command", of_name("serve"), ids=text_of)
def test_a_server_starts_answers_and_ends(command: Command, folder: Path):
    with served(folder, *command.words) as url:
        assert httpx.get(f"{url}/health", timeout=LIMIT_S).status_code == 200


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The address of the server that these pages start first."""
    command = of_name("serve")[0]
    with served(folder, *command.words) as found:
        yield found


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_first_request(url: str, folder: Path):
    page = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
    lines = [line for code in blocks(page) for line in code.splitlines()]
    (line,) = (line for line in lines if line.startswith("curl "))
    done = run(folder, *shlex.split(line.replace("http://127.0.0.1:8000", url)))
    assert done.returncode == 0, done.stderr
    (choice,) = json.loads(done.stdout)["choices"]
    assert len(choice["token_ids"]) == 8


@pytest.mark.parametrize("command", [*filter(is_of_server, COMMANDS)], ids=text_of)
def test_a_client_goes_well(command: Command, url: str, folder: Path):
    words = [word.replace("http://127.0.0.1:8000", url) for word in command.words]
    more = shlex.split(MORE.get(text_of(command), ""))
    assert run_expertlane(folder, command.name, *words, *more).stdout.strip()


def test_the_program(folder: Path):
    done = run(folder, sys.executable, "-c", program_of("python.md", "with LLM"))
    assert done.returncode == 0, done.stderr
    assert re.search(r" (stop|length) \d", done.stdout)


def test_the_client_of_a_server_that_is_killed_gets_all_of_it_once(folder: Path, tmp_path: Path):
    """Of a server that is killed as it answers, and started again."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    code = program_of("recovery.md", "Last-Event-ID").replace("http://127.0.0.1:8000", url)
    code = code.replace("str(uuid.uuid4())", "'mine'").replace("True}", "True, 'ignore_eos': True}")
    options = ("--dtype", "float32", "--journal", str(tmp_path / "journal"), *KEPT)
    front = Front(folder / "my-checkpoint", tmp_path / "log", *options, port=port)
    front.start()
    try:
        printed, err = tmp_path / "printed", tmp_path / "err"
        with printed.open("wb") as out, err.open("wb") as errors:
            client = subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=errors)
            try:
                assert wait_until(lambda: printed.stat().st_size > 4)
                front.kill()
                front.start()
                assert client.wait(LIMIT_S) == 0, err.read_text()
            finally:
                client.kill()
                client.wait()
        events = httpx.get(f"{url}/v1/requests/mine/events", timeout=LIMIT_S).text
        *data, last = (line[6:] for line in events.splitlines() if line.startswith("data: "))
        assert last == "[DONE]"
        assert len(data) >= 200
        text = "".join(json.loads(each)["choices"][0]["text"] for each in data)
        assert printed.read_bytes().decode() == text
        resumed = re.search(r"journal_resumed_total\{.*\} (\d)", httpx.get(f"{url}/metrics").text)
        assert resumed[1] == "1"  # it had not ended when the server was killed
    finally:
        front.end()
