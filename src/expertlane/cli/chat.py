"""A conversation with a model, a line a message."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from expertlane.cli.answers import stream
from expertlane.cli.engine_options import FoundModel
from expertlane.errors import ModelError, UserError

if TYPE_CHECKING:
    from expertlane.engine.engine import RequestOutput
    from expertlane.engine.llm import LLM
    from expertlane.spec.sampling import SamplingParams

_PROMPT = "> "


class Chat:
    """What was said, and how to go on.

    Args:
        params: of every answer.
        system: the message that each conversation begins with.

    Raises:
        UserError: the model has no tokenizer or no chat template, or it takes no such message.
    """

    def __init__(self, found: FoundModel, params: "SamplingParams", system: str | None) -> None:
        from expertlane.engine.chat_template import ChatTemplate
        from expertlane.engine.tokenizer import Tokenizer

        if found.folder is None:
            raise UserError(f"{found.name} has no tokenizer, which a chat needs")
        self._template = ChatTemplate.from_folder(found.folder)
        self._tokenizer = Tokenizer.from_folder(found.folder)
        self._params = params
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)
        self._outputs: list[RequestOutput] = []
        self._render(
            "Hello"
        )  # what a template refuses always, it refuses before the model is loaded

    def hold(self, llm: "LLM") -> "list[RequestOutput]":
        """Answer messages until there are no more; gives all answers."""
        from expertlane.cli.output import print_message

        for message in _read_messages():
            if message == "/exit":
                break
            if message == "/reset":
                self._messages = list(self._opening)
                continue
            try:
                self._answer(llm, message)
            except (UserError, ModelError) as error:
                if not sys.stdin.isatty():
                    raise
                print_message(f"{error}; this message is left out (try /reset)")
        return self._outputs

    def _answer(self, llm: "LLM", message: str) -> None:
        from expertlane.engine.shared_engine import deferred_interrupts

        number = str(len(self._outputs) + 1)
        output = llm.engine.add(
            number, self._render(message), self._params, name=f"message {number}"
        )
        self._outputs.append(output)
        with deferred_interrupts() as is_interrupted:  # a step must be completed
            stream(llm, output, is_interrupted)
        if output.error is not None:
            raise ModelError(output.error)
        # A stopped answer stays as far as it came: the roles must alternate.
        self._messages += [
            {"role": "user", "content": message},
            {"role": "assistant", "content": output.text},
        ]

    def _render(self, message: str) -> list[int]:
        text = self._template.render([*self._messages, {"role": "user", "content": message}])
        return self._tokenizer.encode(text, add_special_tokens=False)


def _read_messages() -> Iterator[str]:
    """Lines that are not blank, each as soon as it is there."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # some builds of Python lack it
            import readline  # noqa: F401  (input() lets lines be edited then)
        print("/reset forgets all, /exit or Ctrl-D ends, Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            line = _ask() if is_terminal else next(sys.stdin)
        except (EOFError, StopIteration):
            if is_terminal:
                print(file=sys.stderr)  # Ctrl-D leaves the cursor behind the prompt
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: byte {error.start} is not {error.encoding}") from None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print(file=sys.stderr)  # as shells do: another line
            continue
        if line.strip():
            yield line.strip()


def _ask() -> str:
    if sys.stdout.isatty():
        return input(_PROMPT)
    print(_PROMPT, end="", file=sys.stderr, flush=True)  # answers go to a file: nothing but them
    return input()
