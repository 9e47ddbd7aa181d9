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
    """A loaded model as requests see it.

    Attributes:
        name: what requests call it.
        template: None where it cannot chat.
        recommended: sampling by the checkpoint, where a request says nothing.
        watch: of the ranks, for metrics and the live page; None where there are none.
        scaling: changes the layout; None where that stays.
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
        api_keys: one of them has to be given; none: nobody is asked.
        allowed_hosts: names by which the server is reached, besides loopback ones; `*` for any.
        max_num_queued: waiting requests, beyond which others are refused.
        request_timeout_s: the longest that a request may take, waiting included; None: any time.
        drain_s: how long running requests may go on once the server is told to end.
        observers: told of every request once it has its answer.
        on_event: told what happens to the server, by kind and text.
        max_stored_responses: of `/v1/responses`, kept in memory for later requests.
        journal: of requests, so that they go on if this process dies; None for none.
        reconnect_s: how long requests of a journal go on, and finished answers stay, while no
            client reads them.
        tool_call_parser, reasoning_parser: names of forms in `call_forms`, or `none`; None for
            what the chat template tells.
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
