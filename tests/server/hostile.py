"""Bodies that are valid JSON of less than 16 MiB, and would cost a server far more."""

from collections.abc import Callable
from typing import Any

from expertlane.server import fields
from expertlane.server.bodies import MOST_VALUES as NUM_MANY

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
ASKED = {"prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 1}
TEXT_PART = {"type": "text", "text": "a"}
CALL = {"id": "a", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}


def ids(num):
    return "[" + "1," * (num - 1) + "1]"


# By name: the route, a function that makes the body (JSON text, or a value), the expected status.
TOO_MUCH: dict[str, tuple[str, Callable[[], Any], int]] = {
    "metadata of a million keys": (
        COMPLETIONS,
        lambda: (
            '{"prompt": "a", "metadata": {' + ",".join(f'"{n}":1' for n in range(1_250_000)) + "}}"
        ),
        413,
    ),
    "a message of many parts": (
        CHATS,
        lambda: (
            '{"messages": [{"role": "user", "content": ['
            + ",".join(['{"type":"text","text":"a"}'] * 600_000)
            + "]}]}"
        ),
        413,
    ),
    "millions of tokens to be a text": (
        "/detokenize",
        lambda: f'{{"tokens": {ids(8_000_000)}}}',
        413,
    ),
    "millions of prompt ids": (COMPLETIONS, lambda: f'{{"prompt": {ids(8_000_000)}}}', 413),
    "many prompt ids": (COMPLETIONS, lambda: f'{{"prompt": {ids(NUM_MANY - 9)}}}', 400),
    "many texts in place of ids": (
        "/detokenize",
        lambda: '{"tokens": [' + '"a",' * (NUM_MANY - 9) + '"a"]}',
        400,
    ),
    "many tokens to be a text": (
        "/detokenize",
        lambda: f'{{"tokens": {ids(NUM_MANY - 9)}}}',
        400,
    ),
    "many prompts": (
        COMPLETIONS,
        lambda: '{"prompt": [' + '"a",' * (NUM_MANY - 9) + '"a"]}',
        400,
    ),
    "messages": (CHATS, lambda: {"messages": CHAT["messages"] * (fields.MOST_PARTS + 1)}, 400),
    "parts": (
        CHATS,
        lambda: {"messages": [{"role": "user", "content": [TEXT_PART] * (fields.MOST_PARTS + 1)}]},
        400,
    ),
    "unknown fields": (COMPLETIONS, lambda: ASKED | {f"x{n}": 1 for n in range(60_000)}, 400),
    "unknown fields of a part": (
        CHATS,
        lambda: {
            "messages": [
                {"role": "user", "content": [TEXT_PART | {f"x{n}": 1 for n in range(60_000)}]}
            ]
        },
        400,
    ),
    "pairs of metadata": (
        COMPLETIONS,
        lambda: ASKED | {"metadata": {f"{n}": 1 for n in range(17)}},
        400,
    ),
    "metadata of 16 MB": (COMPLETIONS, lambda: ASKED | {"metadata": {"a": "b" * 16_000_000}}, 400),
    "a long name": (COMPLETIONS, lambda: ASKED | {"user": "a" * 513}, 400),
    "a stop string of 1 MB": (COMPLETIONS, lambda: ASKED | {"stop": "a" * 1_000_000}, 400),
    "variables": (
        CHATS,
        lambda: CHAT | {"chat_template_kwargs": {f"{n}": 1 for n in range(65)}},
        400,
    ),
    "biases": (COMPLETIONS, lambda: ASKED | {"logit_bias": {f"{n}": 1 for n in range(1025)}}, 400),
    "calls": (
        CHATS,
        lambda: {
            "messages": [{"role": "assistant", "tool_calls": [CALL] * (fields.MOST_CALLS + 1)}]
        },
        400,
    ),
    "tools": (CHATS, lambda: CHAT | {"tools": [TOOL] * 129}, 400),
}
