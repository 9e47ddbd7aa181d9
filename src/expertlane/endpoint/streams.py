"""Streamed answers, read token by token while they come, and how one differs from another."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import msgspec

from expertlane.client.connection import Answer, data_of, error_message

_END, _ENDS = b"\n\n", b"\r\n\r\n"
_DONE = b"[DONE]"
_LEAST_TAIL = 3  # tokens after a difference that may tell a shift from a change
_LAGS = 3  # events by which the text of a token may come later than its log-probability
_BROKEN = frozenset({"abort", "error"})  # finish reasons of engines that give a request up

Difference = Literal["repeated", "dropped", "changed"]


@dataclass(eq=False)
class Stream:
    """A streamed answer, read as far as it has come.

    Attributes:
        times_s: when each event with tokens came, on the clock of `time.perf_counter`.
        ids: token ids of each such event, empty where the server tells none.
        texts: text of each.
        margins: of each event, by how much its tokens were likelier than the next likely, in nats.
        finish_reason, num_counted: as the server says at the end; None before, or where it doesn't.
        is_done: whether `[DONE]` came.
        error: message of an error event.
    """

    answer: Answer
    times_s: list[float] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    margins: list[list[float]] = field(default_factory=list)
    finish_reason: str | None = None
    num_counted: int | None = None
    is_done: bool = False
    error: str | None = None
    _begin: int = 0
    _part: int = 0

    def read(self) -> None:
        """Read the events that have come since the last call."""
        if not self.answer.is_stream or self.answer.status != 200:
            return
        body = self.answer.body
        while True:
            ends = ((body.find(each, self._begin), len(each)) for each in (_END, _ENDS))
            end, length = min((each for each in ends if each[0] >= 0), default=(-1, 0))
            if end < 0:
                return
            event, self._begin = bytes(body[self._begin : end]), end + length
            while self.answer.ends[self._part] < self._begin:
                self._part += 1
            if (data := data_of(event)) is not None:
                self._take(data, self.answer.times_s[self._part])

    @property
    def num_tokens(self) -> int:
        """Tokens so far; where the server gives no ids, each event counts as one."""
        return sum(map(self.num_of, range(len(self.times_s))))

    def num_of(self, event: int) -> int:
        """Tokens of an event."""
        return len(self.ids[event]) or 1

    @property
    def tokens(self) -> Sequence[int] | str:
        """Ids of all tokens so far, else their text."""
        if any(self.ids):
            return [each for ids in self.ids for each in ids]
        return "".join(self.texts)

    @property
    def is_broken_off(self) -> bool:
        """Whether the server says that it gave the request up."""
        return self.error is not None or self.finish_reason in _BROKEN

    def margin_at(self, place: int) -> float | None:
        """The smallest margin of tokens around a place of `tokens`; None without any."""
        of_event: Sequence[Sequence[Any]] = self.ids if any(self.ids) else self.texts
        ends = list(accumulate(map(len, of_event)))
        event = next((number for number, end in enumerate(ends) if place < end), len(ends) - 1)
        lags = 0 if any(self.ids) else _LAGS
        around = self.margins[max(0, event - lags) : event + 1]
        return min((each for margins in around for each in margins), default=None)

    def _take(self, data: bytes, time_s: float) -> None:
        if data == _DONE:
            self.is_done = True
            return
        try:
            event = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        if not isinstance(event, dict):
            return
        if "error" in event or event.get("object") == "error":
            self.error = self.error or error_message(data)
            return
        usage = event.get("usage")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            self.num_counted = usage["completion_tokens"]
        choices = event.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            self._take_choice(choices[0], time_s)

    def _take_choice(self, choice: dict[str, Any], time_s: float) -> None:
        reason, ids = choice.get("finish_reason"), choice.get("token_ids")
        if isinstance(reason, str):
            self.finish_reason = reason
        ids = [each for each in ids if isinstance(each, int)] if isinstance(ids, list) else []
        text = _text_of(choice)
        is_opening = "role" in (choice.get("delta") or ()) and not text and not ids
        if is_opening or (not ids and not text and reason is not None):
            return
        self.times_s.append(time_s)
        self.ids.append(ids)
        self.texts.append(text)
        self.margins.append(_margins_of(choice.get("logprobs")))


def _text_of(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return text if isinstance(text := choice.get("text"), str) else ""
    names = ("reasoning_content", "reasoning", "content")
    return "".join(text for each in names if isinstance(text := delta.get(each), str))


def _margins_of(logprobs: Any) -> list[float]:
    """Likeliest log-probability of each token less the second; empty where none are given."""
    if not isinstance(logprobs, dict):
        return []
    several: Any
    if isinstance(content := logprobs.get("content"), list):  # of a chat
        entries = (each.get("top_logprobs") for each in content if isinstance(each, dict))
        several = [
            [one.get("logprob") for one in each if isinstance(one, dict)]
            for each in entries
            if isinstance(each, list)
        ]
    else:
        tops = logprobs.get("top_logprobs") or ()
        several = [list(each.values()) for each in tops if isinstance(each, dict)]
    found = []
    for each in several:
        values = sorted((one for one in each if isinstance(one, int | float)), reverse=True)
        if len(values) > 1:
            found.append(float(values[0] - values[1]))
    return found


@dataclass(frozen=True)
class StreamDifference:
    """How an answer differs from the true one.

    Attributes:
        place: the first token, or letter, that differs.
        size: tokens, or letters, that were repeated or left out; 0 where they were changed.
    """

    how: Difference
    place: int
    size: int = 0


def difference(
    truth: Sequence[int] | str, found: Sequence[int] | str, *, is_whole: bool
) -> StreamDifference | None:
    """How an answer differs from the true one; None where it is the same.

    A chunk that came twice, or not at all, shifts all that follows it.

    Args:
        is_whole: false of an answer that was cut off, which may be the beginning of the true one.
    """
    pairs = enumerate(zip(truth, found, strict=False))
    place = next((at for at, (a, b) in pairs if a != b), min(len(truth), len(found)))
    if place == len(found) and (place == len(truth) or not is_whole):
        return None
    tail, longer = found[place:], len(found) - len(truth)
    if is_whole and not tail:
        return StreamDifference("dropped", place, -longer)
    for size in range(1, place + 1):
        is_certain = longer == size or (longer <= 0 and len(tail) >= _LEAST_TAIL)
        if is_certain and truth[place - size :][: len(tail)] == tail:
            return StreamDifference("repeated", place, size)
    for size in range(1, len(truth) - place + 1):
        overlap = min(len(truth) - place - size, len(tail))
        is_certain = longer == -size or overlap >= _LEAST_TAIL
        if is_certain and truth[place + size :][:overlap] == tail[:overlap]:
            return StreamDifference("dropped", place, size)
    return StreamDifference("changed", place)
