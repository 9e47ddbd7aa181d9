"""A mixture of experts in a few lines of numpy, as a reference and as servers that may be wrong."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from client.fake_server import Fake, error, event, whole
from expertlane.endpoint.scored import Prompt, PromptScores
from expertlane.progress import Progress

VOCAB, WIDTH, EXPERTS, LAYERS = 96, 24, 8, 3
_DRAW = np.random.default_rng(0)
_EMBEDDING = _DRAW.standard_normal((VOCAB, WIDTH))
_ROUTERS = _DRAW.standard_normal((LAYERS, WIDTH, EXPERTS)) / WIDTH**0.5
_EXPERTS = _DRAW.standard_normal((LAYERS, EXPERTS, WIDTH, WIDTH)) / WIDTH**0.5
_HEAD = _DRAW.standard_normal((WIDTH, VOCAB)) / WIDTH**0.5


@dataclass(frozen=True)
class Toy:
    """Two of eight experts a layer, and a mean over the context.

    Attributes:
        noise: relative rounding of every layer's output; 0 for none.
        scales: by (layer, expert): factors of their outputs.
        wrong_from: position from which on contexts are wrong; None for none.
        seed: of the noise.
    """

    noise: float = 0.0
    scales: tuple[tuple[int, int, float], ...] = ()
    wrong_from: int | None = None
    head: float = 1.0
    seed: int = 1

    def run(self, prompt: Prompt) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[len, VOCAB] log-probabilities of what follows; experts and margins as `PromptScores`."""
        ids = np.asarray(prompt)
        num = len(ids)
        draw = np.random.default_rng([self.seed, num, *ids[:8].tolist()])
        hidden = _EMBEDDING[ids]
        chosen, margins = [], []
        for layer in range(LAYERS):
            mean = np.cumsum(hidden, axis=0) / np.arange(1, num + 1)[:, None]
            if self.wrong_from is not None:
                mean[self.wrong_from :] *= 0.5
            mixed = np.tanh(hidden + mean)
            scores = mixed @ _ROUTERS[layer]
            order = np.argsort(-scores, axis=1)
            top = order[:, :2]
            best = np.take_along_axis(scores, order[:, :3], axis=1)
            margins.append(best[:, 1] - best[:, 2])
            weights = np.exp(best[:, :2]) / np.exp(best[:, :2]).sum(axis=1, keepdims=True)
            factors = np.ones(EXPERTS)
            for place, expert, factor in self.scales:
                if place == layer:
                    factors[expert] = factor
            outs = np.stack([mixed @ _EXPERTS[layer, each] for each in range(EXPERTS)])
            outs *= factors[:, None, None]
            picked = outs[top.T, np.arange(num)]
            hidden = hidden + (weights.T[:, :, None] * picked).sum(axis=0)
            hidden = hidden * (1 + self.noise * draw.standard_normal(hidden.shape))
            chosen.append(top)
        logits = self.head * hidden @ _HEAD
        logits -= logits.max(axis=1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logprobs, np.stack(chosen), np.stack(margins)

    def score(self, prompt: Prompt) -> PromptScores:
        """As a reference does."""
        return _scored(self, tuple(prompt))[0]

    def after(self, prompt: Prompt) -> np.ndarray:
        """[VOCAB], log-probabilities of the next token."""
        return _scored(self, tuple(prompt))[1]


@lru_cache(20_000)
def _scored(toy: Toy, prompt: tuple[int, ...]) -> tuple[PromptScores, np.ndarray]:
    """A prompt's scores, and what follows it; the same prompts come under many conditions."""
    logprobs, chosen, margins = toy.run(prompt)
    ids = np.asarray(prompt)
    own = logprobs[np.arange(len(ids) - 1), ids[1:]]
    return PromptScores(ids, own, chosen, margins), logprobs[-1].copy()


@dataclass(frozen=True)
class ToyReference:
    """The toy as a checkpoint whose own type is bfloat16, or as is told."""

    dtype: str = "bfloat16"
    noise: float = 2.0**-8
    vocab_size: int = VOCAB
    max_len: int = 1_024
    num_experts: Sequence[int] = (EXPERTS,) * LAYERS
    moe_layers: Sequence[int] = range(1, LAYERS + 1)

    def score_in(
        self, prompts: Sequence[Prompt], number_types: Sequence[str], progress: Progress
    ) -> dict[str, list[PromptScores]]:
        """As the protocol says."""
        toys = {each: Toy(0.0 if each == "float32" else self.noise) for each in number_types}
        return {name: [toy.score(each) for each in prompts] for name, toy in toys.items()}


class ToyServer(Fake):
    """A server of a toy.

    Args:
        toy: what it computes; noise of its own seed is that of another implementation.
        methods: of `prompt_logprobs`, `echo`, `native`, `generated`, those that it has.
        loaded: what it computes while more than `limit` requests are there; None for the same.
        warm: what it computes of a prompt it has seen before; None for the same.
        flaky: what every third request computes; None for the same.
        dies_after: requests after which it closes every connection.
        writes_nan: whether as NaN, which is no JSON, instead.
        vocab_size: tokens that it takes.
        unknown: of scored prompts' tokens every so many-th is told as null; 0: none is.
        unknown_beyond: tokens that such prompts have more than.
        most_top: the most likely tokens beside a generated one that may be asked for.
    """

    def __init__(
        self,
        toy: Toy,
        *,
        methods: Sequence[str] = ("prompt_logprobs", "generated"),
        loaded: Toy | None = None,
        limit: int = 3,
        warm: Toy | None = None,
        flaky: Toy | None = None,
        dies_after: int | None = None,
        max_len: int = 1_024,
        most_top: int = 5,
        unknown: int = 0,
        unknown_beyond: int = 60,
        writes_nan: bool = False,
        vocab_size: int = VOCAB,
    ) -> None:
        self._toy, self._methods = toy, methods
        self._loaded, self._limit, self._warm, self._flaky = loaded, limit, warm, flaky
        self._unknown, self._unknown_beyond = unknown, unknown_beyond
        self._writes_nan = writes_nan
        self._most_top, self._vocab_size = most_top, vocab_size
        self._dies_after, self._num, self._in_flight = dies_after, 0, 0
        self._prompts: set[tuple[int, ...]] = set()
        self._card = {"id": "toy", "owned_by": "fake", "max_model_len": max_len}
        super().__init__(self._completion, models=("toy",))

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if "native" not in self._methods:
            return await super()._one(reader, writer)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if line)
        body = await reader.readexactly(int(lines.get("content-length", 0)))
        route = head.split()[1]
        if route == "/generate":
            writer.write(self._native(json.loads(body)))
        elif route.endswith("/completions"):
            asked = json.loads(body)
            async for part in self._completion(asked, 0):
                writer.write(part)
        else:
            writer.write(self._about(route))
        return True

    def _about(self, route: str) -> bytes:
        if route == "/v1/models":
            return whole({"object": "list", "data": [self._card]})
        return super()._about(route)

    def _native(self, asked: dict[str, Any]) -> bytes:
        ids, length = asked["input_ids"], asked["sampling_params"]["max_new_tokens"]
        scored = self._toy.score(ids)
        tokens, values, tops = self._continue(self._toy, ids, length)
        own = [[None, ids[0], None]]
        own += [
            [float(value), token, None]
            for value, token in zip(scored.logprobs, ids[1:], strict=True)
        ]
        meta = {
            "input_token_logprobs": own if asked.get("logprob_start_len") == 0 else [],
            "output_token_logprobs": [[v, t, None] for v, t in zip(values, tokens, strict=True)],
            "output_top_logprobs": [[[v, t, None] for t, v in top.items()] for top in tops],
        }
        return whole({"text": "", "meta_info": meta})

    def _continue(
        self, toy: Toy, ids: Sequence[int], length: int
    ) -> tuple[list[int], list[float], list[dict[int, float]]]:
        tokens, values, tops = list[int](), list[float](), list[dict[int, float]]()
        for _ in range(length):
            after = toy.after([*ids, *tokens])
            best = np.argsort(-after)[:5]
            tops.append({int(each): float(after[each]) for each in best})
            tokens.append(int(best[0]))
            values.append(float(after[best[0]]))
        return tokens, values, tops

    def _which(self, ids: Sequence[int], most: int) -> Toy:
        self._num += 1
        key = tuple(ids)
        is_warm = key in self._prompts
        self._prompts.add(key)
        if self._loaded is not None and most > self._limit:
            return self._loaded
        if self._flaky is not None and self._num % 3 == 0:
            return self._flaky
        return self._warm if is_warm and self._warm is not None else self._toy

    async def _completion(self, asked: dict[str, Any], number: int) -> Any:
        if self._dies_after is not None and self._num >= self._dies_after:
            return
        ids, length = asked["prompt"], asked["max_tokens"]
        self._in_flight += 1
        if self._loaded is not None:
            await asyncio.sleep(0.01)  # so that others come
        most = self._in_flight
        toy = self._which(ids, most)
        try:
            yield self._answer(toy, asked, ids, length)
        finally:
            self._in_flight -= 1

    def _answer(self, toy: Toy, asked: dict[str, Any], ids: list[int], length: int) -> bytes:
        if asked.get("stream"):
            parts = b"".join(event({"choices": [{"text": "a"}]}) for _ in range(length))
            usage = {"prompt_tokens": len(ids), "completion_tokens": length}
            body = parts + event({"choices": [], "usage": usage}) + event("[DONE]")
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        choice: dict[str, Any] = {"text": ""}
        if max(ids) >= self._vocab_size:
            return error(400, f"token {max(ids)} is unknown")
        if "prompt_logprobs" in asked:
            if "prompt_logprobs" not in self._methods:
                return error(400, "unknown field prompt_logprobs")
            own = toy.score(ids).logprobs
            choice["prompt_logprobs"] = [
                None,
                *({str(t): {"logprob": float(v)}} for t, v in zip(ids[1:], own, strict=True)),
            ]
            if self._unknown and len(ids) > self._unknown_beyond:
                none = float("nan") if self._writes_nan else None
                for place in range(self._unknown, len(ids), self._unknown):
                    choice["prompt_logprobs"][place][str(ids[place])]["logprob"] = none
            return whole({"choices": [choice]})
        if asked.get("echo"):
            if "echo" not in self._methods:
                return error(400, "echo is not supported")
            own = [None, *map(float, toy.score(ids).logprobs), -1.0]
            choice["logprobs"] = {"tokens": ["a"] * len(own), "token_logprobs": own}
            return whole({"choices": [choice]})
        if "logprobs" in asked and "generated" not in self._methods:
            return error(400, "logprobs are not supported")
        if asked.get("logprobs", 0) > self._most_top:
            return error(400, f"logprobs is at most {self._most_top}")
        tokens, values, tops = self._continue(toy, ids, length)
        choice["logprobs"] = {
            "tokens": [f"token_id:{each}" for each in tokens],
            "token_logprobs": values,
            "top_logprobs": [{f"token_id:{t}": v for t, v in top.items()} for top in tops],
        }
        return whole({"choices": [choice]})


@contextmanager
def toy_server(toy: Toy, **how: Any) -> Iterator[ToyServer]:
    """A server, ended afterwards."""
    server = ToyServer(toy, **how)
    try:
        yield server
    finally:
        server.stop()


def noisy(toy: Toy = Toy(), noise: float = 2.0**-8) -> Toy:
    """The same as another implementation in bfloat16 computes it."""
    return replace(toy, noise=noise, seed=7)
