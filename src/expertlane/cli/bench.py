"""`expertlane bench`: put load on a model or a server, and show throughput and latency."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.load import LoadOptions
from expertlane.cli.local_model import load_model
from expertlane.cli.model import FoundModel, find_model
from expertlane.cli.option_groups import given, publishes
from expertlane.cli.options import MODEL_HELP, EngineOptions, known_models, layout_option
from expertlane.cli.server_options import (
    FLUSH_CACHES,
    PromptOptions,
    api_key_file_option,
    one_key_each,
    request_timeout_option,
    vocabulary,
)
from expertlane.errors import UserError
from expertlane.spec.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expertlane.client.run import LoadResult, MeasureOptions, Target
    from expertlane.results.results import Results
    from expertlane.spec.workload import Load


_PAIRED_ROUNDS = 5  # for an interval


@dataclass(frozen=True, kw_only=True)
class UrlOptions:
    """A server to be measured instead of a model."""

    panel: ClassVar = Panel.MORE_SERVER
    url: str | None = typer.Option(
        None,
        metavar="URL",
        rich_help_panel=Panel.SERVER,
        help="Measure a server with the OpenAI API. expertlane serve, vLLM and SGLang have it.",
    )
    compare: str | None = typer.Option(
        None, metavar="URL", help="A second server, measured alternately with the first."
    )
    rounds: int | None = typer.Option(
        None,
        show_default=f"1; with --compare {_PAIRED_ROUNDS}",
        help="Rounds, each with its own requests; 5 or more give an interval.",
    )
    requests_as: PromptOptions
    api_key_file: list[Path] | None = api_key_file_option(" A second file is for --compare.")
    num_warm_up: int | None = typer.Option(
        None,
        show_default="the batch; in an open loop 8",
        help="Warm-up requests before each load, which are not counted.",
    )
    request_timeout_s: float | None = request_timeout_option("600")
    flush_caches: bool = FLUSH_CACHES

    def targets(self, model: str | None) -> "list[Target]":
        """The servers.

        Raises:
            UserError: a URL or a file with a key is wrong.
        """
        from expertlane.client.connection import Url
        from expertlane.client.run import Target

        urls = {"--url": self.url, "--compare": self.compare}
        keys = one_key_each(self.api_key_file or [], 1 + (self.compare is not None))
        return [
            Target(Url.parse(text, option), keys[min(place, len(keys) - 1)], model)
            for place, (option, text) in enumerate(urls.items())
            if text is not None
        ]


@dataclass(frozen=True, kw_only=True)
class _Options:
    layout: list[str] | None = layout_option(None, "tp=1")


_Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        autocompletion=known_models,
        help=f"{MODEL_HELP} With --url: the model's name there; not needed if the server has only "
        "one.",
    ),
]


@publishes
def bench(
    own: _Options,
    call: output.Call,
    load: LoadOptions,
    at: UrlOptions,
    engine: EngineOptions,
    model: _Model = None,
) -> output.Found:
    """Measure throughput and latency of a model, or of a server, under load.

    A sweep over batch sizes, or requests that arrive at a rate; each layout gets the same
    requests, one after the other. Prompts are random token ids; decoding is greedy and ignores end
    of sequence. Before each load the ranks are warmed up.

    With --url requests go to a server over HTTP, as streams. Its API key is taken from
    EXPERTLANE_API_KEY or a file. Latency counts from when a request was due, however late it could
    be sent; failed requests are counted by their error. Ctrl-C ends the run and prints what was
    measured until then.

    \b
    TTFT     from a request's arrival to its first token
    TPOT     a request's mean time per token after the first
    ITL      each time between successive tokens of a request
    E2E      from a request's arrival to its last token
    output   output tokens per second, from the first arrival to the last token
    total    the same, prompt tokens included
    prefill  prompt tokens over the time until all requests have their first
             token; only where all are there from the start

    \b
    Examples:
      expertlane bench ./my-checkpoint
      expertlane bench ./my-checkpoint --batch 1,32 --layout tp=2 --layout dp=2,ep=2
      expertlane bench ./my-checkpoint --rate 2,5 --prompt-len 32:512
      expertlane bench --url http://127.0.0.1:8000 --rate 2,5 --slo ttft.p95=500ms
      expertlane bench --url http://127.0.0.1:8000 --compare http://127.0.0.1:8001
      expertlane bench paper-tiny --json |
          jq '.deployments[].serving[].output_tps.value'
    """
    if at.url is not None:
        if unused := [*given(own), *given(engine)]:
            raise UserError(f"{unused[0]} says how a model runs here; leave it out with --url")
        return run_url(model, at, load, call)
    if unused := given(at):
        raise UserError(f"{unused[0]} is for a server; give its --url")
    if model is None:
        raise UserError("MODEL is missing: give a model, or a server's --url")
    loads = load.loads()
    found = find_model(model)
    layouts = [found.lay_out(each) for each in own.layout or ["tp=1"]]
    _check(found, engine, loads, layouts)
    folder = call.folder(output.slug("bench", found.config.name))
    results = _measured(found, engine, loads, layouts, load, call.command)
    return output.Found(results, folder)


def _check(
    found: FoundModel, engine: EngineOptions, loads: "list[Load]", layouts: list[Layout]
) -> None:
    """Check all that is known before the model is loaded.

    Raises:
        UserError: a load could not be run to its end.
    """
    from expertlane.engine.ranks.torchrun import num_nodes
    from expertlane.spec.workload import check_lengths

    for load in loads:
        check_lengths(load, engine.max_model_len or found.config.max_position_embeddings)
    for layout in layouts:
        found.check(layout, engine.options, engine.ranks_per_node)
    if len(layouts) > 1 and num_nodes() > 1:
        raise UserError("on several nodes, give one --layout per run; ranks end with the run")


def _measured(
    found: FoundModel,
    options: EngineOptions,
    loads: "list[Load]",
    layouts: list[Layout],
    asked: LoadOptions,
    command: str,
) -> "Results":
    """All loads on each layout in turn."""
    from expertlane.comparison.run import machine_record
    from expertlane.comparison.serving_benchmark import run_loads
    from expertlane.engine.ops.host import ForeignLoad
    from expertlane.results.record import DeploymentRecord
    from expertlane.results.results import Results, with_costs

    records = []
    foreign_cpu_share = 0.0
    for layout in layouts:
        with load_model(found, layout, options) as llm:
            seen = llm.machine
            foreign = ForeignLoad()
            with output.progress_on_stderr() as progress:
                serving = tuple(run_loads(llm, layout, loads, asked.seed, progress, asked.slos))
            foreign_cpu_share = max(foreign_cpu_share, foreign.share())
        records.append(
            DeploymentRecord(str(layout), layout, options.options, "measured", serving=serving)
        )
    num_ranks = max(layout.world_size for layout in layouts)
    ranks_per_node = options.ranks_per_node or seen[0].ranks_per_node
    results = Results.now(
        "bench",
        command,
        {
            "model": found.name,
            "workload": asked.question(loads[0]),
            "ranks_per_node": options.ranks_per_node,
        },
        records,
        torch_version=seen[0].torch_version,
        machine=machine_record(seen, num_ranks, ranks_per_node),
        foreign_cpu_share=foreign_cpu_share,
    )
    return results if asked.price is None else with_costs(results, asked.price)


def run_url(
    model: str | None, options: UrlOptions, load: LoadOptions, call: output.Call
) -> output.Found:
    """Measure servers; a signal that ends it early is the exit code."""
    from expertlane.client.run import MeasureOptions, measure

    loads = load.loads()
    targets, requests_as = options.targets(model), options.requests_as
    more: dict[str, Any] = {}
    if options.request_timeout_s is not None:
        more["timeout_s"] = options.request_timeout_s
    asked = MeasureOptions(
        loads,
        load.seed,
        load.slos,
        vocabulary(requests_as.tokenizer, model),
        requests_as.endpoint == "chat",
        options.num_warm_up,
        options.rounds or (1 if options.compare is None else _PAIRED_ROUNDS),
        flushes_caches=options.flush_caches,
        **more,
    )
    hosts = [f"{each.url.host}-{each.url.port}" for each in targets]
    folder = call.folder(output.slug("bench", *hosts))
    with output.progress_on_stderr() as progress:
        seen = measure(targets, asked, progress)
    results = _results(seen, asked, load, [str(each.url) for each in targets], call.command)
    code = 0 if seen.signal is None else 128 + seen.signal  # as shells have it
    return output.Found(results, folder, exit_code=code)


def _results(
    seen: "LoadResult", asked: "MeasureOptions", load: LoadOptions, urls: list[str], command: str
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
        cautions=tuple(_cautions(seen)),
    )
    return results if load.price is None else with_costs(results, load.price)


def _cautions(seen: "LoadResult") -> "Iterator[str]":
    if seen.why_ended:
        yield f"Partial: {seen.why_ended} before all was measured."
    for url in seen.unflushed:
        yield f"The prefix cache of {url} could not be emptied: no route for that, or it refused."
