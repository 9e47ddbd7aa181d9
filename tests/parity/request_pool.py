"""The pool of requests that combinations are drawn from: no token of theirs is a near tie.

That is, in float32, at every output position

- the router margin upstream and the gap of the two best scores (logits after penalties, against the
  largest logit) are those that contract 1 judges, and
- a drawn token's uniform number is `MIN_DRAW_MARGIN` or more away from the ends of the token's
  interval in the cumulative distribution. Contract 1's error of the logits moves those by less.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from expertlane.engine.model.draw import uniform_numbers
from expertlane.spec.sampling import SamplingParams
from parity.contract import MIN_ROUTER_MARGIN, MIN_TOP2_GAP
from parity.reference import ReferenceModel, ReferenceRun

MAX_PROMPT_LEN, MAX_OUTPUT_LEN = 20, 16
MIN_DRAW_MARGIN = 1e-4
GREEDY = SamplingParams(temperature=0)
KINDS = [
    *[GREEDY] * 4,
    replace(GREEDY, logprobs=2),
    replace(GREEDY, repetition_penalty=1.3),
    SamplingParams(),
    SamplingParams(temperature=0.6, logprobs=0),
    SamplingParams(temperature=1.3, presence_penalty=0.7),
    SamplingParams(frequency_penalty=0.4, repetition_penalty=1.1),
]
NUM_PROMPTS = 14


class PooledRequest(NamedTuple):
    """A request of the pool, and what the reference makes of it."""

    prompt: np.ndarray
    params: SamplingParams
    run: ReferenceRun


def choose(
    logits: np.ndarray, prompt: np.ndarray, output: Sequence[int], params: SamplingParams
) -> tuple[int, bool]:
    """The next token, straight from the definition of `SamplingParams`; whether it is no near tie.

    Args:
        logits: [vocab_size].
    """
    scores = logits.astype(np.float64)
    seen = np.unique([*prompt, *output])
    penalty = params.repetition_penalty
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    counts = np.bincount(np.array(output, dtype=int), minlength=len(scores))
    scores -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    if params.is_greedy:
        second, first = np.sort(scores)[-2:]
        return int(scores.argmax()), first - second > MIN_TOP2_GAP * np.abs(logits).max()
    weights = np.exp((scores - scores.max()) / params.temperature)
    ends = np.cumsum(weights) / weights.sum()
    seeds = np.array([params.seed], dtype=np.uint64)
    (uniform,) = uniform_numbers(seeds, np.array([len(output)])).tolist()
    token = int(np.searchsorted(ends, uniform, side="right"))
    begin = ends[token - 1] if token else 0.0
    return token, min(uniform - begin, ends[token] - uniform) >= MIN_DRAW_MARGIN


def ask(model: ReferenceModel, prompt: np.ndarray, params: SamplingParams) -> PooledRequest | None:
    """A request of the pool; None if one of its tokens is a near tie."""
    output: list[int] = []
    logits, margins = [], []
    for _ in range(MAX_OUTPUT_LEN):
        fed = torch.tensor([*prompt.tolist(), *output])[None]
        all_logits, all_margins = model.forward(fed)
        logits.append(all_logits[0, -1].numpy())
        margins.append(float(all_margins[0, -1]))
        token, is_decided = choose(logits[-1], prompt, output, params)
        second, first = np.sort(logits[-1])[-2:]
        is_decided &= first - second > MIN_TOP2_GAP * np.abs(logits[-1]).max()
        if not is_decided or margins[-1] < MIN_ROUTER_MARGIN:
            return None
        output.append(token)
    run = ReferenceRun(np.array(output), np.stack(logits), np.array(margins, dtype=np.float32))
    return PooledRequest(prompt, params, run)


def requests(model: ReferenceModel, vocab_size: int) -> list[PooledRequest]:
    """`NUM_PROMPTS` prompts; half of them are of three tokens only and share their beginnings."""
    random = np.random.default_rng(0)
    common = random.integers(0, 3, MAX_PROMPT_LEN)
    found: list[PooledRequest] = []
    for seed in count():
        params = KINDS[len(found) % len(KINDS)]
        if not params.is_greedy:
            params = replace(params, seed=seed)
        if len(found) % 2:
            prompt = random.integers(0, 3, random.integers(1, MAX_PROMPT_LEN + 1))
            num_common = int(random.integers(0, len(prompt) + 1))
            prompt[:num_common] = common[:num_common]
        else:
            prompt = random.integers(0, vocab_size, random.integers(1, 7))
        request = ask(model, prompt, params)
        if request is not None:
            found.append(request)
        if len(found) == NUM_PROMPTS:
            return found
    raise AssertionError("unreachable")
