"""The documentation says what the code says: messages, pictures, cluster files, commands."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expertlane.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MESSAGE = re.compile(r"^- `(.+)`$", re.MULTILINE)


def _texts(node: ast.AST) -> list[str]:
    """The strings of a piece of code, what is filled in as …"""
    texts = []
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            texts.append(part.value)
        elif isinstance(part, ast.JoinedStr):
            texts.append(
                "".join(
                    str(value.value) if isinstance(value, ast.Constant) else "…"
                    for value in part.values
                )
            )
    return texts


def _plain(text: str) -> str:
    return re.sub("…+", "…", " ".join(text.split()))


@pytest.fixture(scope="module")
def source_texts() -> list[str]:
    return [
        _plain(text)
        for path in sorted((ROOT / "src").rglob("*.py"))
        for text in _texts(ast.parse(path.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize(
    "message", MESSAGE.findall((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
)
def test_a_message_that_is_explained_is_in_the_code(message: str, source_texts: list[str]):
    words = _plain(message).strip("… ")
    assert any(words in text for text in source_texts)


def test_every_command_has_a_guide():
    commands = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback is not None
    }
    guides = {path.stem for path in (DOCS / "commands").glob("*.md")}
    assert commands <= guides


def test_the_pictures_are_those_that_the_script_draws(tmp_path: Path):
    script = tmp_path / "deployments.py"
    script.write_bytes((DOCS / "pictures" / "deployments.py").read_bytes())
    subprocess.run([sys.executable, script], check=True)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert drawn
    for picture in drawn:
        assert picture.read_bytes() == (DOCS / "pictures" / picture.name).read_bytes()


def test_bash_takes_the_slurm_script():
    subprocess.run(["bash", "-n", DOCS / "cluster" / "slurm.sh"], check=True)


def test_the_kubernetes_manifests_fit_together():
    yaml = pytest.importorskip("yaml")  # comes with transformers
    text = (DOCS / "cluster" / "kubernetes.yaml").read_text(encoding="utf-8")
    service, job = yaml.safe_load_all(text)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"]

    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"]
    assert f"--nnodes={spec['completions']}" in command
    assert "--nproc-per-node=1" in command
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--master-addr={first}" in command
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
