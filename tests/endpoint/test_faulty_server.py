"""Servers with a planted error: wrong where it is planted, and right everywhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from endpoint import faulty_server
from endpoint.faulty_ranks import FAR, FAULT, LARGE_BATCH
from endpoint.faulty_server import STALE
from endpoint.test_reference import drawn, scored
from engine.model.families import save_checkpoint
from server.front import Front

_CLOSE, _FAR_OFF = 1e-4, 1e-2
_NEAR = 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(
        "mixtral",
        tmp_path_factory.mktemp("served"),
        max_position_embeddings=2304,
        sliding_window=None,
        num_hidden_layers=2,
    )


@contextmanager
def serving(folder: Path, fault: str, log: Path, monkeypatch: Any) -> Iterator[str]:
    monkeypatch.setenv(FAULT, fault)
    server = Front(folder, log, layout="tp=1", program=[str(Path(faulty_server.__file__))])
    server.start()
    try:
        yield server.url
    finally:
        server.end()


def ask(url: str, prompt: Any, **more: Any) -> list[dict[str, Any]]:
    """The choices of an answer."""
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body | more, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def differences(url: str, folder: Path, prompts: list[list[int]]) -> list[np.ndarray]:
    """Of each prompt's log-probabilities from the reference's, all asked for at once."""
    choices = ask(url, prompts, prompt_logprobs=0)
    found = []
    for choice, one in zip(choices, scored(folder, prompts), strict=True):
        pairs = zip(choice["prompt_logprobs"][1:], one.token_ids[1:], strict=True)
        said = [of_token[str(token)]["logprob"] for of_token, token in pairs]
        found.append(np.abs(np.array(said) - one.logprobs))
    return found


def next_logprob(url: str, prompt: list[int]) -> float:
    """Of the token that a prompt is continued by."""
    return ask(url, prompt, logprobs=1)[0]["logprobs"]["token_logprobs"][0]


@pytest.mark.full
def test_a_large_batch(folder, tmp_path, monkeypatch) -> None:
    prompts = drawn([12] * 12)
    with serving(folder, LARGE_BATCH, tmp_path / "log", monkeypatch) as url:
        assert max(each.max() for each in differences(url, folder, prompts[:8])) < _CLOSE
        together = differences(url, folder, prompts)
    assert max(each.max() for each in together[:8]) < _CLOSE
    assert min(each.max() for each in together[8:]) > _FAR_OFF


@pytest.mark.full
def test_far_positions(folder, tmp_path, monkeypatch) -> None:
    with serving(folder, FAR, tmp_path / "log", monkeypatch) as url:
        (moved,) = differences(url, folder, drawn([_NEAR + 100]))
    assert moved[: _NEAR - 1].max() < _CLOSE
    assert moved[_NEAR:].mean() > _FAR_OFF


@pytest.mark.full
@pytest.mark.parametrize("fault", [STALE, ""])
def test_a_stale_block(folder, tmp_path, monkeypatch, fault: str) -> None:
    first, other = drawn([40, 40])
    with serving(folder, fault, tmp_path / "log", monkeypatch) as url:
        cold = [next_logprob(url, prompt) for prompt in (first, other)]
        moved = abs(next_logprob(url, other) - cold[1])
    assert moved > _FAR_OFF if fault else moved < _CLOSE
