"""The records of a journal: typed, each with its size and a checksum.

A record is msgpack of one of the classes below, after a frame: its size, the same inverted, and the
CRC-32 of its bytes. Nothing is unpickled. A process that is killed can leave the last record
incomplete; that one is dropped. Anything else that does not fit is damage, and refused.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import msgspec

from expertlane.errors import UserError
from expertlane.schedule.request import FinishReason
from expertlane.spec.sampling import SamplingParams

VERSION = 3
# The first has no `Suspected` and no `Closed`; before the third, `Begun` has no `seeds`.
READ_VERSIONS = (1, 2, VERSION)
_FRAME = struct.Struct("<III")
_INVERTED = 2**32 - 1

Logprob = tuple[float, tuple[tuple[int, float], ...]]  # the token's, and the likeliest tokens


class Header(msgspec.Struct, frozen=True, array_like=True, tag="journal"):
    """The first record of a file.

    Attributes:
        identity: the facts that tokens and texts depend on, by name.
    """

    version: int
    identity: dict[str, str]


class Begun(msgspec.Struct, frozen=True, array_like=True, tag="begun"):
    """A request was accepted.

    Attributes:
        number: number of the request in this journal.
        key: SHA-256 of the API key that it came with; empty where none is asked for.
        request_id: the id by which its client comes back.
        is_named: whether the client gave the id.
        path: path of its route.
        body: JSON of its validated fields.
        prompts, texts, before, created: see `Prepared`.
        shared: one entry, the params that all choices share; in older versions, with `seeds`
            empty, the params of every choice.
        root: root of the answer's ids; see `AnswerIds`.
        began: its arrival, in seconds since 1970.
        seeds, lengths: [num_choices]; each choice's seed, which is always set, and `max_tokens`.
    """

    number: int
    key: bytes
    request_id: str
    is_named: bool
    path: str
    body: bytes
    prompts: list[list[int]]
    shared: list[SamplingParams]
    texts: list[str]
    before: list[dict[str, Any]]
    root: str
    created: int
    began: float
    seeds: list[int] = []
    lengths: list[int] = []

    @property
    def num_choices(self) -> int:
        """Choices of all prompts."""
        return len(self.seeds or self.shared)

    def params(self) -> list[SamplingParams]:
        """[num_choices]; sampling parameters of every choice, each with a seed."""
        if not self.seeds:
            return self.shared
        (shared,) = self.shared
        return [
            shared.with_valid(seed=seed, max_tokens=length)
            for seed, length in zip(self.seeds, self.lengths, strict=True)
        ]


class More(msgspec.Struct, frozen=True, omit_defaults=True):
    """Facts that only some chunks have.

    Attributes:
        reason, error: finish reason and error; in the last chunk.
        logprob: log-probabilities of the token, if asked for.
        num_cached: prompt tokens found in the prefix cache; with the first token.
        prompt: arrays of `PromptPart` as bytes, if asked for; with the first token.
    """

    reason: FinishReason | None = None
    error: str | None = None
    logprob: Logprob | None = None
    num_cached: int | None = None
    prompt: tuple[bytes, bytes, bytes, bytes] | None = None


Row = tuple[int, int, int | None, str, More | None]  # number, place, token, text


class Came(msgspec.Struct, frozen=True, array_like=True, tag="came"):
    """The chunks of a step, written before any client gets them."""

    rows: list[Row]


class Left(msgspec.Struct, frozen=True, array_like=True, tag="left"):
    """A request is forgotten."""

    number: int


class Suspected(msgspec.Struct, frozen=True, array_like=True, tag="suspected"):
    """A request may be what kills the server.

    Attributes:
        number: number of the request.
        num_deaths: processes in a row that died while they computed it.
        is_running: whether the process of this file computes it from here on.
        is_alone: whether that process computes nothing else meanwhile.
    """

    number: int
    num_deaths: int
    is_running: bool
    is_alone: bool


class Closed(msgspec.Struct, frozen=True, array_like=True, tag="closed"):
    """The process was told to end: no request is to blame for it."""


Record = Header | Begun | Came | Left | Suspected | Closed
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


class DamagedError(UserError):
    """Bytes that are not a record; the text says at which byte."""


def framed(record: Record) -> bytes:
    """A record as it stands in a file."""
    data = _encode(record)
    return _FRAME.pack(len(data), len(data) ^ _INVERTED, zlib.crc32(data)) + data


def records_of(data: bytes) -> Iterator[tuple[int, Record]]:
    """Each record and the byte where it ends, up to an incomplete last one.

    Raises:
        DamagedError: other bytes are not a record.
    """
    at = 0
    while not _is_torn(data, at):
        size, inverted, checksum = _FRAME.unpack_from(data, at)
        begin = at + _FRAME.size
        payload = data[begin : begin + size]
        if size ^ inverted != _INVERTED or zlib.crc32(payload) != checksum:
            raise DamagedError(f"byte {at}: the checksum of this record is wrong")
        try:
            record = _decode(payload)
        except (msgspec.DecodeError, UserError) as error:
            raise DamagedError(f"byte {at}: this is not a known record: {error}") from None
        at = begin + size
        yield at, record


def _is_torn(data: bytes, at: int) -> bool:
    """Whether no complete record begins at a byte: it is the end, or the rest was not all written.

    A file system may leave zeros, never written, when the whole machine dies.
    """
    if len(data) - at < _FRAME.size:
        return True
    size, inverted, _ = _FRAME.unpack_from(data, at)
    if size ^ inverted != _INVERTED:
        return not any(data[at:])
    return bool(len(data) - at - _FRAME.size < size)
