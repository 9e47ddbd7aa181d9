"""The model of a server, and its settings for requests."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expertlane.engine.elastic.scaling import Scaling
from expertlane.engine.engine import Engine
from expertlane.engine.rank_watch import RankWatch
from expertlane.schedule.request import Limits
from expertlane.server.observed import Observer
from expertlane.text.chat_template import ChatTemplate
from expertlane.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from expertlane.server.journal.file import JournalFile


@dataclass(frozen=True)
class ServedModel:
    """A loaded model, with its tokenizer and chat template, as requests use it.

    Attributes:
        name: the name by which requests call it.
        template: its chat template; None where it has none.
        recommended: the checkpoint's sampling settings, for fields that a request leaves out.
        watch: totals of the ranks, for metrics and the live page; None where there are none.
        scaling: changes the layout; None where it cannot change.
    """

    name: str
    engine: Engine[Any]
    limits: Limits
    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    recommended: Mapping[str, Any] | None = None
    watch: RankWatch | None = None
    scaling: Scaling | None = None

    @property
    def max_model_len(self) -> int:
        """The largest sum of a request's prompt and output tokens."""
        return self.limits.max_positions


@dataclass(frozen=True)
class ServerOptions:
    """Settings for requests.

    Attributes:
        api_keys: keys of which requests must give one; if empty, they need none.
        allowed_hosts: names by which the server is reached, besides loopback ones; `*` for any.
        max_num_queued: number of waiting requests from which on others are refused.
        request_timeout_s: the longest that a request may take, waiting included; None for any time.
        drain_s: seconds that running requests may go on once the server is told to end.
        observers: called with every request once it has its answer.
        on_event: called with every event of the server, by kind and text.
        max_stored_responses: responses of `/v1/responses` kept in memory for later requests.
        journal: the journal by which requests go on if this process dies; None for none.
        reconnect_s: seconds that requests of a journal go on, and finished answers stay, while no
            client reads them.
        tool_call_parser, reasoning_parser: names of forms in `call_forms`, or `none`; None for
            the forms whose marks the chat template has.
    """

    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_num_queued: int = 4096
    request_timeout_s: float | None = None
    drain_s: float = 30.0
    observers: tuple[Observer, ...] = ()
    on_event: Callable[[str, str], None] | None = None
    max_stored_responses: int = 1000
    journal: "JournalFile | None" = None
    reconnect_s: float = 60.0
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
