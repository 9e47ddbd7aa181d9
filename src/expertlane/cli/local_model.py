"""Loads a model on ranks of this machine or of several nodes; its output as text and JSON."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING, Any

from expertlane.cli.model import FoundModel
from expertlane.cli.options import EngineOptions
from expertlane.cli.output import print_message, task_on_stderr
from expertlane.printable import printable
from expertlane.spec.files import strict_json
from expertlane.spec.layout import Layout

if TYPE_CHECKING:
    from expertlane.engine.llm import LLM
    from expertlane.engine.ranks.commands import RankMachine
    from expertlane.schedule.request import RequestOutput
    from expertlane.spec.sampling import TokenLogprobs


def load_model(
    found: FoundModel, layout: Layout, engine: EngineOptions, *, record_routing: bool = False
) -> "LLM":
    """Start the ranks and load the model, saying so on stderr.

    Raises:
        UserError: the model does not suit the layout, or does not fit into memory.
        RankError: a rank died, hung or failed.
    """
    from expertlane.engine.llm import LLM

    ranks = "1 rank" if layout.world_size == 1 else f"{layout.world_size} ranks"
    with task_on_stderr(f"loading {found.name} on {ranks} ({layout})"):
        config = engine.config(layout, record_routing=record_routing)
        llm = LLM(found.folder or found.name, config)
    if text := _platform_text(llm.machine[0]):
        print_message(text)
    is_narrow = found.quantization is not None and found.quantization.is_narrow
    if (is_narrow or engine.weights != "model") and not llm.machine[0].keeps_narrow:
        dtype = llm.machine[0].dtype
        print_message(f"weights of one byte are widened to {dtype}: torch has no product of them")
    return llm


def _platform_text(machine: "RankMachine") -> str:
    """The instruction set, or why kernels are not ours; GPUs that ranks share, or leave idle."""
    kernels = machine.kernels
    text = f"computing with {kernels}" if "(" in kernels else ""
    if kernels.startswith("torch ("):
        text += "; expertlane's own kernels are faster"
    if machine.ranks_on_device > 1:
        text = text or f"computing with {kernels}"
        text += f"; {machine.ranks_on_device} ranks share a GPU ({machine.backend})"
    elif machine.num_idle_gpus:
        text = text or f"computing with {kernels}"
        text += (
            f"; on the CPU: there are fewer GPUs ({machine.num_idle_gpus}) than ranks "
            f"({machine.ranks_per_node}), which EXPERTLANE_TRANSPORT=shared_memory lets share them"
        )
    return text


def print_text(text: str) -> None:
    """Print at once, without adding a line end.

    On a terminal, control characters are escaped, all but line ends and tabs; a pipe or a file gets
    the text as it is.
    """
    sys.stdout.write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)
    sys.stdout.flush()


def stream_output(
    llm: "LLM", output: "RequestOutput", is_stopped: Callable[[], bool] = lambda: False
) -> None:
    """Step until a request is finished, and print its text as it comes.

    Args:
        is_stopped: whether to cancel it; asked after each step.
    """
    num_shown = 0
    while output.finish_reason is None:
        llm.engine.step()
        if is_stopped():
            llm.engine.cancel(output.request_id)
        text = _text(llm, output)
        print_text(text[num_shown:])
        num_shown = len(text)
    print_text("\n")


def output_text(llm: "LLM", output: "RequestOutput") -> str:
    """A prompt and its output, separated from others."""
    prompt = _ids(output.prompt_token_ids) if output.prompt is None else output.prompt
    return f"> {prompt}\n{_text(llm, output)}\n\n"


def output_json(output: "RequestOutput") -> str:
    """A line: prompt, output, why it ended, and its times in seconds."""
    shown: dict[str, Any] = {
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": output.token_ids,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "error": output.error,
        "ttft_s": output.ttft_s,
        "tpot_s": output.tpot_s,
        "e2e_s": output.e2e_s,
        "num_preemptions": output.num_preemptions,
    }
    if output.logprobs:
        shown["logprobs"] = [_logprobs(each) for each in output.logprobs]
    if output.prompt_logprobs is not None:
        shown["prompt_logprobs"] = [
            None if each is None else _logprobs(each) for each in output.prompt_logprobs
        ]
    return strict_json(shown) + "\n"


def _logprobs(of_token: "TokenLogprobs") -> dict[str, Any]:
    """Log-probabilities as JSON has them; null for a token that the model rules out, at -inf."""
    top = [(token_id, value if isfinite(value) else None) for token_id, value in of_token.top]
    return asdict(of_token) | {"top": top}


def outputs_summary(outputs: Sequence["RequestOutput"], max_tokens: int) -> str:
    """A line: how many tokens, how fast, and the median time to the first one.

    Another if outputs ended before `max_tokens` for lack of room.
    """
    from expertlane.report.numbers import counted, figures, milliseconds

    num_tokens = sum(len(output.token_ids) for output in outputs)
    busy_s, until_s = 0.0, float("-inf")
    for output in outputs:  # in order of arrival: those of a chat have pauses between them
        began_s = max(output.arrival_s, until_s)
        until_s = max(until_s, output.arrival_s + (output.e2e_s or 0.0))
        busy_s += max(0.0, until_s - began_s)
    firsts_s = [output.ttft_s for output in outputs if output.ttft_s is not None]
    if not firsts_s:
        return "no tokens"
    name = "TTFT" if len(firsts_s) == 1 else "median TTFT"
    line = (
        f"{counted(num_tokens, 'token')} in {figures(busy_s)} s, "
        f"{figures(num_tokens / busy_s)} tokens/s; {name} {milliseconds(median(firsts_s))} ms"
    )
    num_short = sum(
        output.finish_reason == "length" and len(output.token_ids) < max_tokens
        for output in outputs
    )
    if num_short:
        line += (
            f"\n{counted(num_short, 'output')} ended before {max_tokens} tokens: no room for more "
            "(--max-model-len, --num-blocks)"
        )
    return line


def _text(llm: "LLM", output: "RequestOutput") -> str:
    return _ids(output.token_ids) if llm.tokenizer is None else output.text


def _ids(token_ids: Sequence[int]) -> str:
    return ",".join(map(str, token_ids))
