"""`expertlane bench --url`: the same loads on a server, or on two in turns."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import typer

from expertlane.cli import output
from expertlane.cli.api_keys import API_KEY, check_key, key_lines
from expertlane.cli.help import Panel
from expertlane.cli.load import LoadOptions
from expertlane.cli.option_groups import given
from expertlane.errors import UserError, naming

if TYPE_CHECKING:
    from expertlane.client.run import Asked, Seen, Target
    from expertlane.client.server import Vocabulary
    from expertlane.results.results import Results

_PAIRED_ROUNDS = 5  # for an interval


@dataclass(frozen=True, kw_only=True)
class UrlOptions:
    """A server to be measured instead of a model."""

    panel: ClassVar = Panel.MORE_SERVER
    url: str | None = typer.Option(
        None,
        metavar="URL",
        rich_help_panel=Panel.SERVER,
        help="Measure a server with the OpenAI API: expertlane serve, vLLM, SGLang…",
    )
    compare: str | None = typer.Option(
        None, metavar="URL", help="A second server, measured alternately with the first."
    )
    rounds: int | None = typer.Option(
        None,
        metavar="N",
        show_default=f"1; with --compare {_PAIRED_ROUNDS}",
        help="Rounds, each with its own requests; 5 or more give an interval.",
    )
    endpoint: Literal["completions", "chat"] = typer.Option(
        "completions", help="API that requests use; prompts of chats are text."
    )
    tokenizer: Path | None = typer.Option(
        None,
        metavar="DIR",
        show_default="MODEL if it is such a folder, else the server's /tokenize",
        help="Folder of the model's tokenizer; required for chats.",
    )
    api_key_file: list[Path] | None = typer.Option(
        None,
        metavar="FILE",
        show_default=f"{API_KEY}, else none",
        help="File with the API key. A second file is for --compare.",
    )
    num_warm_up: int | None = typer.Option(
        None,
        metavar="N",
        show_default="the batch; in an open loop 8",
        help="Warm-up requests before each load, which are not counted.",
    )
    request_timeout_s: float | None = typer.Option(
        None,
        metavar="SECONDS",
        show_default="600",
        help="Time limit of a request, waiting included.",
    )

    def check_unused(self) -> None:
        """Refuse these options where there is no server.

        Raises:
            UserError: one is given.
        """
        if unused := given(self):
            raise UserError(f"{unused[0]} is for a server; give its --url")

    def targets(self, model: str | None) -> "list[Target]":
        """The servers.

        Raises:
            UserError: a URL or a file with a key is wrong.
        """
        from expertlane.client.connection import Url
        from expertlane.client.run import Target

        urls = {"--url": self.url, "--compare": self.compare}
        keys = self._keys()
        return [
            Target(Url.parse(text, option), keys[min(place, len(keys) - 1)], model)
            for place, (option, text) in enumerate(urls.items())
            if text is not None
        ]

    def _keys(self) -> "list[str | None]":
        files = self.api_key_file or []
        if len(files) > 1 + (self.compare is not None):
            raise UserError(f"--api-key-file is given {len(files)} times; once for each server")
        keys: list[str | None] = []
        for path in files:
            (where, key), *others = key_lines(path).items()
            if others:
                raise UserError(f"--api-key-file: {path} has {1 + len(others)} keys; one is needed")
            check_key(key, where)
            keys.append(key)
        if not keys and (found := os.environ.get(API_KEY)):
            check_key(found, API_KEY)
            keys.append(found)
        return keys or [None]

    def vocabulary(self, model: str | None) -> "Vocabulary | None":
        """The tokens of a tokenizer that was given, or is in MODEL.

        Raises:
            UserError: there is none that can be read.
        """
        from expertlane.client.server import Vocabulary

        if self.tokenizer is not None:
            with naming("--tokenizer"):
                return Vocabulary.of_folder(self.tokenizer)
        return Vocabulary.of_name(model) if model is not None else None

    @property
    def num_rounds(self) -> int:
        """Repetitions of each load."""
        return self.rounds or (1 if self.compare is None else _PAIRED_ROUNDS)


def run_url(
    model: str | None, options: UrlOptions, load: LoadOptions, call: output.Call
) -> tuple[output.Found, int | None]:
    """Measure; returns the results, and the signal that ended it early, if any."""
    from expertlane.client.run import Asked, measure

    loads = load.loads()
    targets = options.targets(model)
    more: dict[str, Any] = {}
    if options.request_timeout_s is not None:
        more["timeout_s"] = options.request_timeout_s
    asked = Asked(
        loads,
        load.seed,
        load.slos,
        options.vocabulary(model),
        options.endpoint == "chat",
        options.num_warm_up,
        options.num_rounds,
        **more,
    )
    hosts = [f"{each.url.host}-{each.url.port}" for each in targets]
    folder = call.folder(output.slug("bench", *hosts))
    with output.progress_on_stderr() as progress:
        seen = measure(targets, asked, progress)
    results = _results(seen, asked, load, [str(each.url) for each in targets], call.command)
    return output.Found(results, folder), seen.signal


def _results(
    seen: "Seen", asked: "Asked", load: LoadOptions, urls: list[str], command: str
) -> "Results":
    from expertlane.results.results import Results, with_costs

    results = Results.now(
        "bench",
        command,
        {
            "model": " and ".join(dict.fromkeys(seen.models)),
            "workload": load.question(asked.loads[0]),
            "urls": urls,
            "endpoint": "chat" if asked.is_chat else "completions",
            "rounds": asked.num_rounds,
        },
        seen.records,
        ratios=seen.ratios,
        cautions=(f"Partial: {seen.why_ended} before all was measured.",) if seen.why_ended else (),
    )
    return results if load.price is None else with_costs(results, load.price)
