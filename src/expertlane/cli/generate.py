"""`expertlane generate`: continue prompts, or talk to a model."""

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from expertlane.cli.help import Panel
from expertlane.cli.local_model import (
    load_model,
    output_json,
    output_text,
    outputs_summary,
    print_text,
    stream_output,
)
from expertlane.cli.model import FoundModel, find_model
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.options import (
    EngineOptions,
    ModelArgument,
    layout_option,
    parse_list,
    seed_option,
)
from expertlane.cli.output import (
    JSON,
    check_file,
    is_first_process,
    print_json,
    print_message,
)
from expertlane.errors import ModelError, UserError
from expertlane.spec.files import CONFIG_BYTES, PROMPTS_BYTES, read_stream, read_text
from expertlane.spec.layout import Layout
from expertlane.spec.ranges import shown

if TYPE_CHECKING:
    from expertlane.engine.engine import Prompt
    from expertlane.engine.llm import LLM
    from expertlane.schedule.request import RequestOutput
    from expertlane.spec.sampling import SamplingParams, Structured


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options for the fields of `SamplingParams`, under its names; None for what is not given."""

    panel: ClassVar = Panel.MORE_SAMPLING
    max_tokens: int | None = typer.Option(
        None, show_default="256", rich_help_panel=Panel.SAMPLING, help="Output tokens at most."
    )
    temperature: float | None = typer.Option(
        None, metavar="T", show_default="1", rich_help_panel=Panel.SAMPLING, help="0: greedy."
    )
    seed: int | None = seed_option(None, "a new one", Panel.SAMPLING)
    top_k: int | None = typer.Option(
        None, metavar="K", show_default="0, all", help="Sample from the K most likely tokens."
    )
    top_p: float | None = typer.Option(
        None,
        metavar="P",
        show_default="1",
        help="Nucleus sampling: the most likely tokens with cumulative probability P.",
    )
    min_p: float | None = typer.Option(
        None,
        metavar="P",
        show_default="0",
        help="Sample from tokens at least P times as likely as the most likely.",
    )
    repetition_penalty: float | None = typer.Option(
        None, metavar="X", show_default="1", help="Above 1: penalises tokens in prompt or output."
    )
    presence_penalty: float | None = typer.Option(
        None, metavar="X", show_default="0", help="Above 0: penalises tokens in the output."
    )
    frequency_penalty: float | None = typer.Option(
        None,
        metavar="X",
        show_default="0",
        help="Above 0: penalises tokens by their count in the output.",
    )
    stop: list[str] | None = typer.Option(None, metavar="TEXT", help="Stop string.")
    stop_token_ids: list[int] | None = typer.Option(
        None, "--stop-token-id", metavar="ID", help="Stop token."
    )
    ignore_eos: bool = typer.Option(False, help="Continue after an end-of-sequence token.")
    logprobs: int | None = typer.Option(
        None, help="With --json: log-probabilities of each token and of the N most likely."
    )
    prompt_logprobs: int | None = typer.Option(
        None, help="With --json: the same for the tokens of the prompt."
    )


def sampling_params(folder: Path | None, given: dict[str, Any]) -> "SamplingParams":
    """The user's sampling parameters, over those that the checkpoint recommends.

    Args:
        given: by the names of `SamplingParams`; None for what is not given.

    Raises:
        UserError: a value is not valid.
    """
    from expertlane.spec.sampling import SamplingParams
    from expertlane.text.tokenizer import default_sampling

    recommended = {} if folder is None else default_sampling(folder)
    return SamplingParams(
        **recommended | {name: value for name, value in given.items() if value is not None}
    )


@dataclass(frozen=True, kw_only=True)
class _Options:
    panel: ClassVar = Panel.PROMPTS
    file: Path | None = typer.Option(None, help="More prompts, one per line.")
    token_ids: list[str] | None = typer.Option(
        None, metavar="ID[,ID…]", help="A prompt as token ids."
    )
    chat: bool = typer.Option(
        False, help="A conversation, one message per line, with the model's chat template."
    )
    system: str | None = typer.Option(
        None, metavar="TEXT", help="The conversation's system message."
    )
    json_schema: Path | None = typer.Option(
        None,
        rich_help_panel=Panel.MORE_SAMPLING,
        help="The output is JSON that fits this JSON schema.",
    )
    compact_json: bool = typer.Option(
        False,
        rich_help_panel=Panel.MORE_SAMPLING,
        help="With --json-schema: no spaces or line ends between the parts of the JSON, so fewer "
        "tokens.",
    )
    regex: str | None = typer.Option(
        None,
        metavar="REGEX",
        rich_help_panel=Panel.MORE_SAMPLING,
        help="The output matches this regular expression.",
    )
    as_json: bool = JSON
    record_routing: Path | None = typer.Option(
        None,
        rich_help_panel=Panel.OUTPUT,
        help="Also write which experts each token chose, for expertlane balance and "
        "--routing-trace.",
    )
    layout: str = layout_option("tp=1")


@takes_groups
def generate(
    model: ModelArgument,
    *,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to be continued.")
    ] = None,
    own: _Options,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Continue prompts with a model, or talk to it.

    Prompts are the arguments, the lines of --file and each --token-ids, in this order; without
    any, the lines of standard input. The output of one prompt is streamed; several prompts
    are computed as a batch, and each output is printed with its prompt, in order. A model without a
    tokenizer takes and returns token ids.

    Sampling parameters: what you give here, else what the checkpoint's generation_config.json
    recommends (temperature, top-k, top-p, repetition penalty, greedy), else the defaults below.

    In a --chat, Ctrl-C stops the present answer, /reset forgets the conversation, and /exit or
    Ctrl-D ends it.

    \b
    Examples:
      expertlane generate ./my-checkpoint "Once upon a time" --max-tokens 50
      expertlane generate org/model --layout tp=2,ep=2 --file prompts.txt
      expertlane generate ./my-checkpoint --chat --system "Be brief."
      echo "Once upon a time" | expertlane generate ./my-checkpoint --json
      expertlane generate ./my-checkpoint "As JSON:" --json-schema person.json
      expertlane generate org/model --file prompts.txt --record-routing routing.npz
          then: expertlane balance routing.npz --ep 8
      expertlane generate paper-tiny --token-ids 1,2,3
          random weights: shows that it runs
    """
    _check_options(own, sampling, prompts)
    found = find_model(model)
    layout = found.lay_out(own.layout)
    _check_stops(sampling, found)
    structured = _structured(own, found)
    params = sampling_params(found.folder, vars(sampling) | {"structured": structured})
    trace = own.record_routing
    if trace is not None:
        check_file(trace)
    if own.chat:
        conversation = Chat(found, params, own.system)
        with _load(found, layout, engine, trace) as llm:
            outputs = conversation.hold(llm)
    else:
        given = _gather(prompts or [], own.file, own.token_ids or [])
        _check_texts(given, found)
        with _load(found, layout, engine, trace) as llm:
            outputs = _continue(llm, given, params, own.as_json)

    if outputs:
        print_message(outputs_summary(outputs, params.max_tokens))
    errors = [output.error for output in outputs if output.error is not None]
    if errors and not own.chat:  # a chat told of each when it came
        more = f"; and {len(errors) - 1} more of {len(outputs)} prompts" if len(errors) > 1 else ""
        raise ModelError(f"{errors[0]}{more}")


def _check_options(own: _Options, sampling: SamplingOptions, prompts: list[str] | None) -> None:
    """Check options that need or exclude each other.

    Raises:
        UserError: two do not go together.
    """
    if sampling.logprobs is not None and not own.as_json:
        raise UserError("--logprobs needs --json, which prints them")
    if sampling.prompt_logprobs is not None and not own.as_json:
        raise UserError("--prompt-logprobs needs --json, which prints them")
    if own.system is not None and not own.chat:
        raise UserError("--system needs --chat")
    if own.chat and (prompts or own.file or own.token_ids or own.as_json):
        raise UserError("--chat reads standard input; leave prompts and --json out")


def _structured(own: _Options, found: FoundModel) -> "Structured | None":
    """The constraint on outputs; None without one.

    Raises:
        UserError: two options give one, one is not valid, or there is no tokenizer.
    """
    from expertlane.spec.sampling import Structured

    if own.compact_json and own.json_schema is None:
        raise UserError("--compact-json needs --json-schema")
    if own.json_schema is None and own.regex is None:
        return None
    if own.json_schema is not None and own.regex is not None:
        raise UserError("--json-schema and --regex exclude each other")
    name = "--regex" if own.json_schema is None else "--json-schema"
    if not _has_tokenizer(found):
        raise UserError(f"{name} needs a tokenizer, and {found.name} has none")
    if own.json_schema is None:
        return Structured(regex=own.regex)
    schema = read_text(own.json_schema, CONFIG_BYTES)
    return Structured(json_schema=schema, compact=own.compact_json)


def _gather(texts: list[str], file: Path | None, token_ids: list[str]) -> "list[Prompt]":
    """All prompts; those of standard input where no others are given.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    prompts: list[Prompt] = [*texts]
    if file is not None:
        prompts += _lines(read_stream(file, PROMPTS_BYTES), str(file))
    prompts += [parse_list("--token-ids", "stop_token_ids", each, "1,2") for each in token_ids]
    if prompts or not is_first_process():  # torchrun's processes share one standard input
        return prompts
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("there is no prompt; give one, or --file, --token-ids or --chat")
    try:
        text = sys.stdin.read(PROMPTS_BYTES + 1)
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: byte {error.start} is not {error.encoding}") from None
    if len(text) > PROMPTS_BYTES:
        raise UserError(f"standard input: at most {PROMPTS_BYTES:,} characters are read")
    return [*_lines(text, "standard input")]


def _lines(text: str, source: str) -> list[str]:
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{source}: there is no prompt; give one per line")
    return lines


def _check_stops(sampling: SamplingOptions, found: FoundModel) -> None:
    if "" in (sampling.stop or ()):
        raise UserError("--stop is empty; it must be a string of one or more characters")
    if sampling.stop and not _has_tokenizer(found):
        raise UserError(f"--stop needs a tokenizer, and {found.name} has none; use --stop-token-id")
    size = found.config.vocab_size
    for token in sampling.stop_token_ids or ():
        if token >= size:
            raise UserError(
                f"--stop-token-id is {token}, but the {size:,} tokens of {found.name} end with "
                f"{size - 1}"
            )


def _has_tokenizer(found: FoundModel) -> bool:
    from expertlane.text.tokenizer import TOKENIZER

    return found.folder is not None and (found.folder / TOKENIZER).is_file()


def _check_texts(prompts: "list[Prompt]", found: FoundModel) -> None:
    text = next((each for each in prompts if isinstance(each, str)), None)
    if text is not None and not _has_tokenizer(found):
        raise UserError(
            f"{found.name} has no tokenizer, and the prompt {shown(text)} is text; give prompts "
            "with --token-ids"
        )


@contextmanager
def _load(
    found: FoundModel, layout: Layout, engine: EngineOptions, routing_trace: Path | None
) -> Iterator["LLM"]:
    """The loaded model; when it is left, however that is, the routing so far is written."""
    from expertlane.balance.trace import write_trace

    with load_model(found, layout, engine, record_routing=routing_trace is not None) as llm:
        try:
            yield llm
        finally:
            if routing_trace is not None:
                trace = replace(llm.routing_trace(), model=found.name)
                if trace.num_tokens:
                    write_trace(trace, routing_trace)
                    print_message(f"written: {routing_trace}")


def _continue(
    llm: "LLM", prompts: "list[Prompt]", params: "SamplingParams", as_json: bool
) -> "list[RequestOutput]":
    """Run all prompts, and print what they give."""
    outputs = [
        llm.engine.add(str(number), prompt, params, name=f"prompt {number}")
        for number, prompt in enumerate(prompts, 1)
    ]
    if len(outputs) == 1 and not as_json:
        stream_output(llm, outputs[0])
        return outputs
    unfinished = deque(outputs)
    while unfinished:
        llm.engine.step()
        while unfinished and unfinished[0].finish_reason is not None:
            output = unfinished.popleft()
            if as_json:
                print_json(output_json(output))
            else:
                print_text(output_text(llm, output))
    return outputs


_PROMPT = "> "


class Chat:
    """A conversation with a model, a message a line, and its history.

    Args:
        params: sampling parameters of every answer.
        system: system message of each conversation.

    Raises:
        UserError: the model has no tokenizer or no chat template, or it takes no such message.
    """

    def __init__(self, found: FoundModel, params: "SamplingParams", system: str | None) -> None:
        from expertlane.text.chat_template import ChatTemplate
        from expertlane.text.tokenizer import Tokenizer

        if found.folder is None:
            raise UserError(f"{found.name} has no tokenizer, which a chat needs")
        self._template = ChatTemplate.from_folder(found.folder)
        self._tokenizer = Tokenizer.from_folder(found.folder)
        self._params = params
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)
        self._outputs: list[RequestOutput] = []
        self._render("Hello")  # what a template always refuses, it refuses before anything loads

    def hold(self, llm: "LLM") -> "list[RequestOutput]":
        """Answer messages until there are no more; returns all answers."""
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
            stream_output(llm, output, is_interrupted)
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
    """Lines that are not blank, each as soon as it is read."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # some builds of Python lack it
            import_module("readline")  # input() lets lines be edited then
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
