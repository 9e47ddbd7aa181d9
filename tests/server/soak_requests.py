"""Requests of a soak: each drawn from (seed, number) alone, and what is right for it.

A prompt holds the number of its request, so an answer to another one is noticed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from expertlane.engine.llm import LLM
from expertlane.schedule.request import RequestOutput
from expertlane.spec.sampling import SamplingParams, Structured
from expertlane.text.chat_template import ChatTemplate

BAD = 0.05  # share
ABORTED, LATE = 0.25, 0.01  # shares where clients may leave
HELD = 0.12  # share: to a form
MOST_TOKENS, HELD_TOKENS = 48, 80
_MOST_LETTERS = 60
_SYSTEM = "the thing of the thing and "
_COMMON = _SYSTEM * 3  # what prompts may begin with alike
_LETTERS = np.array(list("abcdefghij klmnop qrstuvwxyz é日"))
# What is wrong, and the field that the refusal has to name.
_WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"temperature": -1}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": "two"}, "n"),
    ({"top_p": 2}, "top_p"),
    ({"stop": [""]}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"nonsense": 1}, "nonsense"),
    ({"seed": 1.5}, "seed"),
    ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
    ({"model": "another"}, "model"),
)


_ANSWER = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "n": {"enum": [5, 17, 99]},
    },
    "required": ["ok", "n"],
    "additionalProperties": False,
}
# Of the tokenizer, which has four special tokens, then all bytes: space, line feed, tab.
_WHITE = [4 + sorted(ByteLevel.alphabet()).index(each) for each in "ĠĊĉ"]
_FORMS: tuple[dict[str, Any], ...] = (
    {"regex": "[a-z]{2,5}-[0-9]{2}"},
    {"choice": ("yes", "no", "não, 日")},
    {"json_schema": _ANSWER},
)


@dataclass(frozen=True)
class DrawnRequest:
    """A request.

    Attributes:
        prompts: of each choice; a text, tokens, or a list of messages.
        params: of each choice.
        wrong: the field that is wrong; None where none is.
        aborted_after: of its events (a stream) or in hundredths of a second, when its client
            leaves; None where it stays.
    """

    number: int
    body: dict[str, Any]
    prompts: tuple[Any, ...]
    params: tuple[SamplingParams, ...]
    wrong: str | None = None
    aborted_after: int | None = None

    @property
    def is_chat(self) -> bool:
        """Whether it goes to `/v1/chat/completions`."""
        return "messages" in self.body

    @property
    def path(self) -> str:
        """Where it goes."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    @property
    def is_stream(self) -> bool:
        """Whether it asks for events."""
        return bool(self.body.get("stream"))


def draw(seed: int, number: int, *, is_calm: bool = False) -> DrawnRequest:
    """A request; the same for the same arguments.

    Args:
        is_calm: its client stays to the end, and is told the number of tokens.
    """
    random = np.random.default_rng((seed, number))
    what: dict[str, Any] = {}
    prompts = _draw_prompts(random, number, what)
    sampling = _draw_sampling(random)
    num_choices = int(random.integers(2, 4)) if random.random() < 0.06 else 1
    wants_logprobs = random.random() < 0.12
    body = what | _draw_extras(random, is_calm=is_calm)
    # Tokens may end inside a character, which then begins the answer.
    is_text = not (isinstance(prompts[0], list) and isinstance(prompts[0][0], int))
    form = None
    if random.random() < HELD and is_text:
        form = _draw_form(random, body, sampling)
    body |= _as_body(sampling)
    if num_choices > 1:
        body["n"] = num_choices
    if wants_logprobs:
        more = {"logprobs": True, "top_logprobs": 1} if "messages" in what else {"logprobs": 1}
        body |= more
    params = tuple(
        SamplingParams(
            **_of_choice(sampling, choice),
            logprobs=1 if wants_logprobs else None,
            structured=form,
        )
        for choice in range(num_choices)
    )
    kind = random.random()
    if kind < BAD:
        change, field = _WRONG[random.integers(len(_WRONG))]
        return DrawnRequest(number, body | change, (), (), wrong=field)
    after = int(random.integers(0, 12)) if kind < BAD + ABORTED and not is_calm else None
    of_choices = tuple(prompt for prompt in prompts for _ in range(num_choices))
    return DrawnRequest(number, body, of_choices, params * len(prompts), aborted_after=after)


def _draw_extras(random: np.random.Generator, *, is_calm: bool) -> dict[str, Any]:
    """Fields of a body that change no token."""
    found: dict[str, Any] = {}
    found["return_token_ids"] = bool(random.random() < 0.7)
    if random.random() < 0.55:
        found["stream"] = True
        has_usage = is_calm or bool(random.random() < 0.5)
        found["stream_options"] = {"include_usage": has_usage}
    if random.random() < 0.2:
        found["priority"] = int(random.integers(-1, 2))
    if random.random() < LATE and not is_calm:
        found["timeout_s"] = float(random.uniform(0.001, 0.2))
    return found


def _draw_form(
    random: np.random.Generator,
    body: dict[str, Any],
    sampling: dict[str, Any],
) -> Structured:
    """What an answer must be; changes the body, and the sampling to one that may come to an end."""
    (kind, value), *_ = _FORMS[random.integers(len(_FORMS))].items()
    named = {"name": "answer", "schema": _ANSWER}
    if kind == "json_schema":
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    else:
        body[f"guided_{kind}"] = list(value) if kind == "choice" else value
    for name in ("stop", "stop_token_ids", "min_tokens", "ignore_eos"):
        sampling.pop(name, None)
    sampling["max_tokens"] = HELD_TOKENS
    # Random weights write white space without end.
    sampling["logit_bias"] = dict.fromkeys(_WHITE, -100.0)
    return Structured(**{kind: value})


def _draw_prompts(random: np.random.Generator, number: int, what: dict[str, Any]) -> list[Any]:
    """Puts them into a body, and gives them as the engine takes them."""

    def text(place: int) -> str:
        letters = random.choice(_LETTERS, random.integers(1, _MOST_LETTERS))
        begin = _COMMON if random.random() < 0.4 else ""
        return f"{begin}{number}.{place}: {''.join(letters)}"

    kind = random.random()
    if kind < 0.35:
        messages = [{"role": "user", "content": text(0)}]
        if random.random() < 0.4:
            messages.insert(0, {"role": "system", "content": _SYSTEM})
        what["messages"] = messages
        return [messages]
    if kind < 0.65:
        prompts: list[Any] = [text(0)]
        what["prompt"] = prompts[0]
    elif kind < 0.9:
        digits = [10 + int(digit) for digit in str(number)]
        prompts = [digits + random.integers(20, 260, random.integers(1, 90)).tolist()]
        what["prompt"] = prompts[0]
    else:
        prompts = [text(place) for place in range(random.integers(2, 4))]
        what["prompt"] = prompts
    return prompts


def _draw_sampling(random: np.random.Generator) -> dict[str, Any]:
    """Fields of `SamplingParams`, and of a body."""
    found: dict[str, Any] = {"temperature": 0.0}
    kind = random.random()
    if kind < 0.1:
        found |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2}
    elif kind < 0.15:
        found["logit_bias"] = {int(token): 2.0 for token in random.integers(5, 260, 3)}
    elif kind < 0.4:
        filters = ({"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.05}, {"presence_penalty": 0.4}, {})
        found = {"temperature": 0.8, **filters[random.integers(len(filters))]}
        found["seed"] = int(random.integers(0, 2**62))
    found["max_tokens"] = min(MOST_TOKENS, int(random.geometric(1 / 14)))
    if random.random() < 0.2:
        found["stop"] = [str(each) for each in random.choice(list("ehotagn"), 2, replace=False)]
    if random.random() < 0.1:
        found["stop_token_ids"] = random.integers(5, 260, 6).tolist()
    if random.random() < 0.1:
        found["min_tokens"] = int(random.integers(0, found["max_tokens"] + 1))
    if random.random() < 0.5:
        found["ignore_eos"] = True
    return found


def _as_body(sampling: Mapping[str, Any]) -> dict[str, Any]:
    bias = sampling.get("logit_bias")
    if bias is None:
        return dict(sampling)
    return sampling | {"logit_bias": {str(token): each for token, each in bias.items()}}


def _of_choice(sampling: Mapping[str, Any], choice: int) -> dict[str, Any]:
    seed = sampling.get("seed")
    return dict(sampling) if seed is None else sampling | {"seed": seed + choice}


@dataclass(frozen=True)
class TrueChoice:
    """What a choice has to be.

    Attributes:
        logprobs: [len(token_ids)]; empty unless asked for.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float]

    @classmethod
    def of(cls, output: RequestOutput) -> "TrueChoice":
        """Of what came offline."""
        assert output.finish_reason is not None
        return cls(
            output.prompt_token_ids,
            list(output.token_ids),
            output.text,
            str(output.finish_reason),
            [each.logprob for each in output.logprobs],
        )


def right_answers(llm: LLM, asked: Sequence[DrawnRequest]) -> dict[int, list[TrueChoice]]:
    """By number."""
    wanted = [each for each in asked if each.wrong is None]
    prompts = [as_engine_takes(llm, prompt) for each in wanted for prompt in each.prompts]
    params = [of_choice for each in wanted for of_choice in each.params]
    outputs = iter(llm.generate(prompts, params) if prompts else ())
    return {each.number: [TrueChoice.of(next(outputs)) for _ in each.params] for each in wanted}


def as_engine_takes(llm: LLM, prompt: Any) -> Any:
    """A chat as tokens; others as they are."""
    if not (isinstance(prompt, list) and isinstance(prompt[0], dict)):
        return prompt
    template = llm._chat_template = llm._chat_template or ChatTemplate.from_folder(llm._folder)
    return llm.tokenizer.encode(template.render(prompt), add_special_tokens=False)
