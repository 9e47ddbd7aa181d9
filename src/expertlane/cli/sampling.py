"""Options of sampling, and what a checkpoint recommends."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from expertlane.cli.help import Panel
from expertlane.cli.options import seed_option

if TYPE_CHECKING:
    from expertlane.spec.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options for the fields of `SamplingParams`, under its names; None for what is not given."""

    panel: ClassVar = Panel.MORE_SAMPLING
    max_tokens: int | None = typer.Option(
        None,
        metavar="N",
        show_default="256",
        rich_help_panel=Panel.SAMPLING,
        help="Output tokens at most.",
    )
    temperature: float | None = typer.Option(
        None,
        metavar="T",
        show_default="1",
        rich_help_panel=Panel.SAMPLING,
        help="0: greedy.",
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
        None,
        metavar="X",
        show_default="1",
        help="Above 1: penalises tokens in prompt or output.",
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
    ignore_eos: bool = typer.Option(
        False, "--ignore-eos", help="Continue after an end-of-sequence token."
    )
    logprobs: int | None = typer.Option(
        None,
        metavar="N",
        help="With --json: log-probabilities of each token and of the N most likely.",
    )
    prompt_logprobs: int | None = typer.Option(
        None,
        metavar="N",
        help="With --json: the same for the tokens of the prompt.",
    )


def sampling_params(folder: Path | None, given: dict[str, Any]) -> "SamplingParams":
    """What the user asks for, over what the checkpoint recommends.

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
