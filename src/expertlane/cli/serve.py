"""`expertlane serve`: a model behind an OpenAI-compatible HTTP interface."""

import gc
import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import typer

from expertlane.cli.help import Panel
from expertlane.cli.local_model import load_model
from expertlane.cli.model import FoundModel, find_model
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.options import (
    EngineOptions,
    ModelArgument,
    fields_of,
    layout_option,
    on_failure_option,
)
from expertlane.cli.output import (
    JSON,
    is_first_process,
    may_be_lost,
    print_json,
    print_message,
)
from expertlane.cli.server_options import API_KEY, api_keys, key_lines, request_timeout_option
from expertlane.errors import UserError
from expertlane.spec.files import strict_json
from expertlane.spec.layout import Layout
from expertlane.spec.names import OnFailure

if TYPE_CHECKING:
    from expertlane.server.journal.file import JournalFile
    from expertlane.server.logs import RequestLog
    from expertlane.server.run import Running
    from expertlane.server.setup import ServedModel, ServerOptions
    from expertlane.text.chat_template import ChatTemplate
    from expertlane.text.tokenizer import Tokenizer

LogFormat = Literal["off", "text", "json"]


@dataclass(frozen=True, kw_only=True)
class _Options:
    panel: ClassVar = Panel.SERVER
    layout: str = layout_option("tp=1")
    host: str = typer.Option("127.0.0.1", metavar="NAME", help="Address to listen on.")
    port: int = typer.Option(8000, help="Port to listen on. 0: any free one.")
    served_model_name: str | None = typer.Option(
        None, metavar="NAME", show_default="MODEL", help="Model name that requests use."
    )
    api_key: list[str] | None = typer.Option(
        None,
        metavar="KEY",
        show_default=f"{API_KEY}, else none",
        help="Key that requests must have; with several, any of them.",
    )
    api_key_file: Path | None = typer.Option(
        None,
        help="File with the API key. Several: one per line. Unlike --api-key, it is not visible in "
        "process lists.",
    )
    allowed_host: list[str] | None = typer.Option(
        None,
        metavar="NAME",
        help="Name, such as a proxy's, that a server without API keys accepts in the Host header "
        "besides loopback names; '*': any.",
        rich_help_panel=Panel.MORE_SERVER,
    )
    max_num_queued: int = typer.Option(
        4096, help="Waiting requests at most; further ones get status 429."
    )
    request_timeout_s: float | None = request_timeout_option("no limit")
    drain_s: float = typer.Option(
        30.0,
        help="How long running requests may continue after SIGTERM or Ctrl-C.",
    )
    stall_s: float = typer.Option(
        4.0,
        help="/health answers 503 once ranks keep requests waiting for longer.",
        rich_help_panel=Panel.MORE_SERVER,
    )
    journal: Path | None = typer.Option(
        None,
        metavar="DIR",
        help="Write requests and their tokens to this folder, so that they continue when the "
        "server is started again after it was killed.",
    )
    reconnect_s: float | None = typer.Option(
        None,
        show_default="60",
        help="With --journal: how long a request continues, and a finished answer is kept, while "
        "its client is away.",
        rich_help_panel=Panel.MORE_SERVER,
    )
    profile_dir: Path | None = typer.Option(
        None,
        metavar="DIR",
        show_default="none",
        help="Write torch profiler traces of all ranks here, from POST /start_profile to POST "
        "/stop_profile.",
        rich_help_panel=Panel.MORE_SERVER,
    )
    log_format: LogFormat = typer.Option(
        "off",
        help="Write a line per request to stderr: text, or JSON objects.",
        rich_help_panel=Panel.MORE_SERVER,
    )
    log_prompts: bool = typer.Option(
        False, help="Include prompts and outputs in these lines.", rich_help_panel=Panel.MORE_SERVER
    )
    tool_call_parser: str | None = typer.Option(
        None,
        metavar="NAME",
        show_default="by the chat template",
        help="Format of the model's tool calls: hermes, deepseek_v3, deepseek_v31, kimi_k2, "
        "mistral, mistral_args, llama3_json, qwen3_coder, glm45, minimax, minimax_m2, harmony, "
        "none.",
        rich_help_panel=Panel.MORE_SERVER,
    )
    reasoning_parser: str | None = typer.Option(
        None,
        metavar="NAME",
        show_default="by the chat template",
        help="Format of the model's reasoning: think, mistral, harmony, none.",
        rich_help_panel=Panel.MORE_SERVER,
    )
    as_json: bool = JSON

    def api_keys(self) -> tuple[str, ...]:
        """The keys given, else the environment's.

        Raises:
            UserError: one is no key, or the file cannot be read or has none.
        """
        keys = {f"--api-key {number}": key for number, key in enumerate(self.api_key or [], 1)}
        if self.api_key_file is not None:
            keys |= key_lines(self.api_key_file)
        return tuple(api_keys(keys))

    def check(self) -> None:
        """Refuse options that are wrong for every model.

        Raises:
            UserError: there is no such parser, or an option needs another that is not given.
        """
        from expertlane.server.marks import Marks
        from expertlane.server.middleware import host_name

        Marks.of_template("", calls=self.tool_call_parser, thoughts=self.reasoning_parser)
        for name in self.allowed_host or ():
            if not host_name(name):
                raise UserError(f"--allowed-host is {name!r}; it must be a name or an address")
        if self.log_prompts and self.log_format == "off":
            raise UserError("--log-prompts needs --log-format text or json")
        if self.reconnect_s is not None and self.journal is None:
            raise UserError("--reconnect-s needs --journal DIR")
        if self.profile_dir is not None:
            try:
                self.profile_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--profile-dir {self.profile_dir}: {error.strerror}") from None

    def for_server(
        self,
        keys: tuple[str, ...],
        journal: "JournalFile | None",
        log: "RequestLog | None",
    ) -> "ServerOptions":
        """The options as the server takes them."""
        from expertlane.server.setup import ServerOptions

        given = fields_of(ServerOptions, self)
        if self.reconnect_s is None:
            del given["reconnect_s"]  # its own default
        return ServerOptions(
            api_keys=keys,
            allowed_hosts=tuple(self.allowed_host or ()),
            observe=log,
            on_event=None if log is None else log.event,
            **given | {"journal": journal},
        )


@dataclass(frozen=True, kw_only=True)
class _EngineOptions(EngineOptions):
    on_failure: OnFailure = on_failure_option("replace")


@takes_groups
def serve(model: ModelArgument, own: _Options, engine: _EngineOptions) -> None:
    """Serve a model over HTTP, with the OpenAI API.

    Clients use http://HOST:PORT/v1. Routes: /v1/completions, /v1/chat/completions, /v1/models,
    /tokenize, /detokenize, /scale, /health, /ping, /version, /load, /metrics and /openapi.json.
    A request with an unsupported field gets status 400 and an error that names the field. Open
    http://HOST:PORT/live in a browser for a live view of ranks and experts.

    SIGTERM or Ctrl-C shuts the server down: new requests get status 503, running ones have up to
    --drain-s to finish. A second signal ends it at once. With --journal, what is unfinished
    continues when the server is started again, and clients get the rest.

    \b
    Examples:
      expertlane serve ./my-checkpoint --layout dp=2,ep=2
      expertlane serve org/model --port 0 --json
      expertlane serve ./my-checkpoint --host 0.0.0.0 --api-key KEY
      curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json'
          -d '{"prompt": "Once upon a time", "max_tokens": 20}'
    """
    from expertlane.server.run import bind, serve
    from expertlane.server.setup import ServedModel

    own.check()
    keys = own.api_keys()
    found = find_model(model)
    layout = found.lay_out(own.layout)
    found.check(layout, engine.options, engine.ranks_per_node)
    # Before the model is loaded, which takes long; of torchrun's processes, the first one listens.
    template, recommended = _of_checkpoint(found)
    bound = bind(own.host, own.port if is_first_process() else 0)
    name = own.served_model_name or model
    with ExitStack() as stack:
        stack.enter_context(bound)
        journal = _journal(own, found, engine)
        if journal is not None:
            stack.callback(journal.close)
        llm = stack.enter_context(load_model(found, layout, engine))
        log = _log(own, name, llm.tokenizer)
        if log is not None:
            stack.callback(log.close)
        options = own.for_server(keys, journal, log)
        served = ServedModel(
            *(name, llm.engine, llm.limits, llm.tokenizer, template, recommended),
            watch=llm.watch(),
            scaling=llm.scaling,
            profiler=None if own.profile_dir is None else llm.profiler(own.profile_dir.absolute()),
        )

        def on_start(running: "Running") -> None:
            llm.on_told_to_end(running.tell_to_drain)
            gc.collect()
            gc.freeze()  # what is there now is no garbage, and is not looked at again
            with may_be_lost():  # a service may have no standard output
                _say(served, layout, bound, own.as_json)

        serve(served, options, bound, check_ranks=llm.check_ranks, on_start=on_start)


def _journal(own: _Options, found: FoundModel, engine: EngineOptions) -> "JournalFile | None":
    """The journal of `--journal`, if given; its requests must be of the same model.

    Raises:
        UserError: they are not, or the folder cannot be used.
    """
    from expertlane.server.journal.file import JournalFile, identity

    if own.journal is None or not is_first_process():
        return None
    journal = JournalFile(own.journal)
    facts = {  # names first: of two models these say more than a hash
        "--served-model-name": own.served_model_name or found.name,
        "--tool-call-parser": own.tool_call_parser or "the template's",
        "--reasoning-parser": own.reasoning_parser or "the template's",
        **identity(found.config, found.folder, engine.options, engine.dtype),
    }
    journal.identify(facts)
    if journal.num_torn_bytes:
        print_message(
            f"journal: dropped its last {journal.num_torn_bytes} bytes, an incomplete record"
        )
    if journal.found:
        num_finished = sum(each.is_finished for each in journal.found.values())
        num_unfinished = len(journal.found) - num_finished
        print_message(
            f"journal: {num_unfinished} unfinished requests to continue, {num_finished} finished"
        )
    for each in journal.found.values():
        if each.is_set_aside:
            print_message(
                f"journal: request {each.begun.request_id} is set aside: the server died while it "
                "ran alone; its client gets an error"
            )
    return journal


def _log(own: _Options, name: str, tokenizer: "Tokenizer | None") -> "RequestLog | None":
    from expertlane.server.logs import RequestLog

    if own.log_format == "off":
        return None
    decode = None
    if own.log_prompts:
        decode = str if tokenizer is None else partial(tokenizer.decode, skip_special_tokens=False)
    return RequestLog(own.log_format, name, decode=decode)


def _of_checkpoint(found: FoundModel) -> "tuple[ChatTemplate | None, dict[str, Any]]":
    """The checkpoint's chat template, if any, and its recommended sampling."""
    from expertlane.text.chat_template import ChatTemplate
    from expertlane.text.tokenizer import default_sampling

    if found.folder is None:
        return None, {}
    has_template = ChatTemplate.is_in(found.folder)
    template = ChatTemplate.from_folder(found.folder) if has_template else None
    return template, default_sampling(found.folder)


def _say(served: "ServedModel", layout: Layout, bound: socket.socket, as_json: bool) -> None:
    """Print where it listens, its ranks and its cache: one line of JSON, or four of text."""
    host, port = bound.getsockname()[:2]
    url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
    limits = served.limits
    num_caches = layout.replicas * layout.dp
    num_tokens = num_caches * limits.num_blocks * limits.block_size
    if as_json:
        facts: dict[str, Any] = {
            "url": url,
            "host": host,
            "port": port,
            "live": f"{url.removesuffix('v1')}live",
            "model": served.name,
            "layout": str(layout),
            "num_ranks": layout.world_size,
            "max_model_len": served.max_model_len,
            "num_cache_tokens": num_tokens,
            "pid": os.getpid(),
        }
        print_json(strict_json(facts) + "\n")
        return
    ranks = "1 rank" if layout.world_size == 1 else f"{layout.world_size} ranks"
    print(f"{served.name} at {url}", flush=True)
    print(
        f"{layout} on {ranks}; KV cache of {num_tokens:,} tokens; up to "
        f"{served.max_model_len:,} per request",
        flush=True,
    )
    print(f"live view: {url.removesuffix('v1')}live", flush=True)
    print("Ctrl-C shuts it down once running requests have finished", flush=True)
