"""Folders, the cache and a hub of our own; nothing here reaches another machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cli.screen import tells
from expertlane.errors import UserError
from expertlane.spec.hf_config import resolve_model

NOWHERE = "http://127.0.0.1:9"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.model": b"model",
    "chat_template.jinja": b"chat",
    "model-00001-of-00002.safetensors": b"weights",
    "pytorch_model.bin": b"not wanted",
    "README.md": b"not wanted",
}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, for the model `here/model` and some that cannot be had."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if "gated/" in self.path:
            return self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if "broken/" in self.path:
            return self._answer(400, b'{"error": "a bad\\nday"}')
        if "here/model" not in self.path:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "/revision/" in self.path:
            return self._answer(200, json.dumps({"id": "here/model", "sha": COMMIT}).encode())
        if "/tree/" in self.path:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{i:040}"}
                for i, (name, content) in enumerate(FILES.items())
            ]
            return self._answer(200, json.dumps(tree).encode())
        name = self.path.rpartition("/")[2].partition("?")[0]
        etag = f'"{list(FILES).index(name):040}"'
        return self._answer(200, FILES[name], {"X-Repo-Commit": COMMIT, "ETag": etag})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub that can be reached."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def put(home: Path, *names: str) -> Path:
    """The cached snapshot of `org/name` with some files."""
    model = home / "hub" / "models--org--name"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    for name in names:
        (snapshot / name).write_bytes(b"{}")
    return snapshot


PROGRAM = """
import sys
import expertlane.text.chat_template
import expertlane.text.tokenizer
from expertlane.spec.hf_config import resolve_model
from expertlane.errors import UserError

assert "huggingface_hub" not in sys.modules
for model in sys.argv[1:]:
    try:
        print(resolve_model(model))
    except UserError as error:
        print(error)
assert "torch" not in sys.modules
"""


def resolve(home: Path, *models: str, endpoint: str = NOWHERE, offline: bool = False) -> list[str]:
    """Paths or refusals, from a process of its own: the client reads its environment once."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    environment = kept | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *models],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == len(models)
    return lines


def refusal(model: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_model(model)
    text = str(caught.value)
    assert text.startswith(f"model {model!r}")
    assert "\n" not in text
    return text


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    assert tells(refusal(str(folder)), "config.json")
    (folder / "config.json").write_text("{}")
    assert resolve_model(str(folder)) == folder
    assert tells(refusal(str(folder / "config.json")), "file folder")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")  # a hub's model of that name is hidden
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org/name") == folder


@pytest.mark.parametrize(
    "model",
    [
        *("", "name", "/no/such/folder", "./org/name", "a/b/c", "org/", "~nobody/x", "a b/c"),
        *("\0/x", pytest.param("x" * 5000, id="long")),
    ],
)
def test_neither_a_folder_nor_an_id(model: str) -> None:
    assert tells(refusal(model), "folder hub")


def test_the_cache_serves_when_the_hub_is_away(tmp_path: Path) -> None:
    snapshot = put(tmp_path, "config.json", "model.safetensors")
    found, other, no_id = resolve(tmp_path, "org/name", "org/other", "org/a..b")
    assert found == str(snapshot)
    assert tells(other, "org/other hub ConnectError")
    assert tells(other, f"cache {tmp_path / 'hub'}")
    assert tells(no_id, "org/a..b folder")


def test_the_cache_serves_when_the_network_is_forbidden(tmp_path: Path, hub: str) -> None:
    snapshot = put(tmp_path, "config.json")
    found, here = resolve(tmp_path, "org/name", "here/model", endpoint=hub, offline=True)
    assert found == str(snapshot)
    cache = tmp_path / "hub"
    assert tells(here, f"here/model HF_HUB_OFFLINE cache {cache}")
    (snapshot / "config.json").unlink()
    assert tells(resolve(tmp_path, "org/name", offline=True)[0], "config.json")


def test_download(tmp_path: Path, hub: str) -> None:
    folder = tmp_path / "hub" / "models--here--model" / "snapshots" / COMMIT
    assert resolve(tmp_path, "here/model", endpoint=hub) == [str(folder)]
    wanted = {name: text for name, text in FILES.items() if text != b"not wanted"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
    assert resolve(tmp_path, "here/model") == [str(folder)]
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert tells(resolve(tmp_path, "here/model", offline=True)[0], "cache")


def test_what_the_hub_refuses(tmp_path: Path, hub: str) -> None:
    models = ("gated/model", "absent/model", "broken/model")
    gated, absent, broken = resolve(tmp_path, *models, endpoint=hub)
    assert tells(gated, "gated/model gated HF_TOKEN")
    assert tells(absent, "absent/model folder hub HF_TOKEN")
    assert "BadRequestError: " in broken
    assert "a bad day" in broken


def test_a_relative_folder_is_looked_for_below_the_base(tmp_path: Path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name / "org" / "model").mkdir(parents=True)
        (tmp_path / name / "org" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    model, there = tmp_path / "there" / "org" / "model", tmp_path / "there"
    assert resolve_model("org/model").samefile(tmp_path / "here" / "org" / "model")
    assert resolve_model("org/model", there) == model
    assert resolve_model(str(model), tmp_path / "nowhere") == model
