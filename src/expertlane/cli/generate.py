"""`expertlane generate`: continue prompts, or talk to a model."""

import sys
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertlane.cli import answers
from expertlane.cli.chat import Chat
from expertlane.cli.compare import DEFAULT_TIMEOUT_S, IgnoreUnusedTensors, Oversubscribe
from expertlane.cli.engine_options import (
    BlockSize,
    Dispatch,
    DispatchOption,
    DtypeOption,
    EngineOptions,
    FoundModel,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    MicroBatches,
    MicroBatchSchedule,
    ModelArgument,
    NoPrefixCaching,
    NumBlocks,
    NumMicroBatches,
    OverlapOption,
    Overlaps,
    PayloadOption,
    PayloadTypes,
    PlacementOption,
    RanksPerNode,
    Rebalance,
    Redundant,
    TimeoutS,
    deployment_options,
    find_model,
)
from expertlane.errors import ModelError, UserError
from expertlane.spec.files import PROMPTS_BYTES, read_stream
from expertlane.spec.ranges import RANGES, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expertlane.engine.engine import Prompt, RequestOutput
    from expertlane.engine.llm import LLM
    from expertlane.spec.layout import Layout
    from expertlane.spec.sampling import SamplingParams

_Prompts = Annotated[
    list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to be continued.")
]
_File = Annotated[Path | None, typer.Option(metavar="FILE", help="More prompts, one a line.")]
_TokenIds = Annotated[
    list[str] | None,
    typer.Option(metavar="ID[,ID…]", help="A prompt as token ids; may be repeated."),
]
_Chat = Annotated[
    bool,
    typer.Option("--chat", help="A conversation, a line a message; by the model's chat template."),
]
_System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The conversation's system message.")
]
_LayoutOption = Annotated[
    str, typer.Option(metavar="LAYOUT", help="How ranks are arranged: tp=2,ep=2 for example.")
]
_MaxTokens = Annotated[
    int | None, typer.Option(metavar="N", help="Output tokens at most. Default: 256.")
]
_Temperature = Annotated[
    float | None, typer.Option(metavar="T", help="0 takes the likeliest token. Default: 1.")
]
_TopK = Annotated[
    int | None,
    typer.Option(metavar="K", help="Draw from the K likeliest tokens. Default: 0, from all."),
]
_TopP = Annotated[
    float | None,
    typer.Option(metavar="P", help="Draw from the likeliest tokens of share P. Default: 1."),
]
_MinP = Annotated[
    float | None,
    typer.Option(
        metavar="P", help="Draw from tokens P times as likely as the likeliest. Default: 0."
    ),
]
_RepetitionPenalty = Annotated[
    float | None,
    typer.Option(metavar="X", help="Above 1: less of what prompt or output hold. Default: 1."),
]
_PresencePenalty = Annotated[
    float | None,
    typer.Option(metavar="X", help="Above 0: less of what the output holds. Default: 0."),
]
_FrequencyPenalty = Annotated[
    float | None,
    typer.Option(metavar="X", help="Above 0: less of what the output holds often. Default: 0."),
]
_Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Equal seeds draw equally. Default: a new one.")
]
_Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Ends the output; may be repeated."),
]
_StopTokenId = Annotated[
    list[int] | None,
    typer.Option(metavar="ID", help="A token that ends the output; may be repeated."),
]
_IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")
]
_Logprobs = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With --json: log-probabilities of each token and of the N likeliest ones.",
    ),
]
_RecordRouting = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write which experts each token chose to FILE (.npz), for expertlane balance.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt, a line each.")]


def generate(
    model: ModelArgument,
    prompts: _Prompts = None,
    file: _File = None,
    token_ids: _TokenIds = None,
    chat: _Chat = False,
    system: _System = None,
    as_json: _Json = False,
    max_tokens: _MaxTokens = None,
    temperature: _Temperature = None,
    top_k: _TopK = None,
    top_p: _TopP = None,
    min_p: _MinP = None,
    repetition_penalty: _RepetitionPenalty = None,
    presence_penalty: _PresencePenalty = None,
    frequency_penalty: _FrequencyPenalty = None,
    seed: _Seed = None,
    stop: _Stop = None,
    stop_token_id: _StopTokenId = None,
    ignore_eos: _IgnoreEos = False,
    logprobs: _Logprobs = None,
    record_routing: _RecordRouting = None,
    layout: _LayoutOption = "tp=1",
    dtype: DtypeOption = None,
    max_model_len: MaxModelLen = None,
    num_blocks: NumBlocks = None,
    block_size: BlockSize = 16,
    max_num_seqs: MaxNumSeqs = 256,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    no_prefix_caching: NoPrefixCaching = False,
    overlap: OverlapOption = Overlaps.OFF,
    num_micro_batches: NumMicroBatches = 1,
    micro_batch_schedule: MicroBatchSchedule = MicroBatches.DRAINED,
    dispatch: DispatchOption = Dispatch.ALL_TO_ALL,
    payload: PayloadOption = PayloadTypes.MODEL,
    placement: PlacementOption = "linear",
    redundant: Redundant = 0,
    rebalance: Rebalance = 0,
    ranks_per_node: RanksPerNode = 0,
    timeout_s: TimeoutS = DEFAULT_TIMEOUT_S,
    oversubscribe: Oversubscribe = False,
    ignore_unused_tensors: IgnoreUnusedTensors = False,
) -> None:
    """Continue prompts with a model, or talk to it.

    Prompts are the arguments, the lines of --file and each --token-ids, in this order; without
    any, the lines of standard input. The text of one prompt appears as it comes; several are
    computed together, and each is printed with its prompt, in order. A model without a tokenizer
    takes and gives token ids.

    How tokens are chosen: what you give here, else what the checkpoint's generation_config.json
    recommends (temperature, top-k, top-p, repetition penalty, greedy), else the defaults below.

    In a --chat, Ctrl-C stops the present answer, /reset forgets the conversation, and /exit or
    Ctrl-D ends it.

    \b
    Examples:
      expertlane generate ./my-checkpoint "Once upon a time" --max-tokens 50
      expertlane generate mistralai/Mixtral-8x7B-v0.1 --layout tp=2,ep=2 --file prompts.txt
      expertlane generate ./my-checkpoint --chat --system "Be brief."
      echo "Once upon a time" | expertlane generate ./my-checkpoint --json | jq .text
      expertlane generate ./my-checkpoint --file prompts.txt --record-routing trace.npz
          then: expertlane balance trace.npz --ranks 8 --output placement.json
      expertlane generate paper-tiny --token-ids 1,2,3
          random weights: shows that it runs
    """
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
        "stop_token_ids": tuple(stop_token_id) if stop_token_id else None,
        "ignore_eos": ignore_eos or None,
        "logprobs": logprobs,
    }
    options = EngineOptions(
        dtype=dtype,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        prefix_caching=not no_prefix_caching,
        options=deployment_options(
            overlap=overlap,
            num_micro_batches=num_micro_batches,
            micro_batch_schedule=micro_batch_schedule,
            dispatch=dispatch,
            payload=payload,
            placement=placement,
            redundant=redundant,
            rebalance=rebalance,
        ),
        ranks_per_node=ranks_per_node,
        timeout_s=timeout_s,
        oversubscribe=oversubscribe,
        ignore_unused_tensors=ignore_unused_tensors,
    )
    if logprobs is not None and not as_json:
        raise UserError("--logprobs needs --json, which prints them")
    if system is not None and not chat:
        raise UserError("--system needs --chat")
    if chat and (prompts or file or token_ids or as_json):
        raise UserError("--chat reads standard input; leave prompts and --json out")
    found = find_model(model)
    chosen = found.lay_out(layout)
    params = sampling_params(found.folder, sampling)
    if record_routing is not None:
        _check_file(record_routing)
    if chat:
        conversation = Chat(found, params, system)
        with _load(found, chosen, options, record_routing) as llm:
            outputs = conversation.hold(llm)
    else:
        given = _gather(prompts or [], file, token_ids or [])
        _check_texts(given, found)
        with _load(found, chosen, options, record_routing) as llm:
            outputs = _continue(llm, given, params, as_json)
    from expertlane.cli.output import print_message

    if outputs:
        print_message(answers.summary(outputs, params.max_tokens))
    errors = [output.error for output in outputs if output.error is not None]
    if errors and not chat:  # a chat told of each when it came
        more = f"; and {len(errors) - 1} more of {len(outputs)} prompts" if len(errors) > 1 else ""
        raise ModelError(f"{errors[0]}{more}")


def sampling_params(folder: Path | None, given: dict[str, Any]) -> "SamplingParams":
    """What the user asks for, over what the checkpoint recommends.

    Args:
        given: by the names of `SamplingParams`; None for what was not given.

    Raises:
        UserError: a value is not valid.
    """
    from expertlane.engine.tokenizer import default_sampling
    from expertlane.spec.sampling import SamplingParams

    recommended = {} if folder is None else default_sampling(folder)
    return SamplingParams(
        **recommended | {name: value for name, value in given.items() if value is not None}
    )


def _gather(texts: list[str], file: Path | None, token_ids: list[str]) -> "list[Prompt]":
    """All prompts; those of standard input where no others are given.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    from expertlane.cli.output import is_first_process

    prompts: list[Prompt] = [*texts]
    if file is not None:
        prompts += _lines(read_stream(file, PROMPTS_BYTES), str(file))
    prompts += map(_parse_token_ids, token_ids)
    if prompts or not is_first_process():  # the ranks of torchrun share one standard input
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
        raise UserError(f"{source}: there is no prompt; give one a line")
    return lines


def _parse_token_ids(text: str) -> list[int]:
    allowed = RANGES["stop_token_ids"]
    token_ids = [allowed.parse(part) for part in text.split(",")]
    if None in token_ids:
        raise UserError(
            f"--token-ids is {shown(text)}; it must be {allowed}, or several with commas between: "
            "1,2"
        )
    return [int(token_id) for token_id in token_ids if token_id is not None]


def _check_texts(prompts: "list[Prompt]", found: FoundModel) -> None:
    from expertlane.engine.tokenizer import TOKENIZER

    has_tokenizer = found.folder is not None and (found.folder / TOKENIZER).is_file()
    if not has_tokenizer and any(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"{found.name} has no tokenizer; give prompts with --token-ids")


def _check_file(path: Path) -> None:
    """Check, before anything runs, that a trace can be written there.

    Raises:
        UserError: it is a folder, or its folder is not writable.
    """
    from expertlane.cli.output import check_folder, is_first_process

    if path.is_dir():
        raise UserError(f"--record-routing is {path}, which is a folder; give a file: trace.npz")
    if is_first_process():
        check_folder(path.parent)


@contextmanager
def _load(
    found: FoundModel, layout: "Layout", options: EngineOptions, record_routing: Path | None
) -> "Iterator[LLM]":
    """The loaded model; when it is left, however that is, the routing so far is written."""
    with found.load(layout, options, record_routing=record_routing is not None) as llm:
        try:
            yield llm
        finally:
            if record_routing is not None:
                _write_routing(llm, found.name, record_routing)


def _write_routing(llm: "LLM", name: str, path: Path) -> None:
    """Write the routing so far; nothing where no token was computed."""
    from expertlane.balance.trace import write_trace
    from expertlane.cli.output import print_message

    trace = replace(llm.routing_trace(), model=name)
    if trace.num_tokens:
        write_trace(trace, path)
        print_message(f"written: {path}")


def _continue(
    llm: "LLM", prompts: "list[Prompt]", params: "SamplingParams", as_json: bool
) -> "list[RequestOutput]":
    """Run all prompts, and print what they give."""
    from expertlane.cli.output import print_json

    outputs = [
        llm.engine.add(str(number), prompt, params, name=f"prompt {number}")
        for number, prompt in enumerate(prompts, 1)
    ]
    if len(outputs) == 1 and not as_json:
        answers.stream(llm, outputs[0])
        return outputs
    unfinished = deque(outputs)
    while unfinished:
        llm.engine.step()
        while unfinished and unfinished[0].finish_reason is not None:
            output = unfinished.popleft()
            if as_json:
                print_json(answers.as_json(output))
            else:
                answers.write(answers.as_text(llm, output))
    return outputs
