"""Messages between the launcher and ranks or nodes: a fixed header, a typed value, raw arrays.

Values are msgpack of known types, checked while they are decoded; nothing is unpickled, and nothing
is imported by a name that came over a socket. Arrays follow the value, each aligned to 64 bytes, so
that shared memory could hold the same encoding.
"""

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, Generic, NamedTuple, TypeVar, get_args

import msgspec
import numpy as np

from expertlane.engine.comm.progress import Line
from expertlane.errors import UserError

ValueT = TypeVar("ValueT")

_HEADER = struct.Struct("<4sIIQQ")  # magic, kind, epoch, bytes of the value, of the arrays
_MAGIC = b"XLM2"
_ALIGNMENT = 64
_ZEROS = bytes(_ALIGNMENT)
MAX_MESSAGE_BYTES = 1 << 30
ANY_EPOCH = (1 << 32) - 1  # for messages of no epoch; newer than all
_WITH_DESCRIPTORS = b"."  # Linux passes none without data
_MAX_DESCRIPTORS = 200  # of a message; Linux takes 253
_DTYPES = {np.dtype(name).str: np.dtype(name) for name in ("?", "u1", "<i4", "<i8", "<f4", "<f8")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class MessageKind(IntEnum):
    """The kinds of messages; their numbers are part of the encoding."""

    COMMAND = 1
    RESULT = 2
    FAILURE = 3
    HEARTBEAT = 4
    READY = 5
    PING = 6
    EXIT = 7
    NODES = 8
    END = 9
    BEGIN_EPOCH = 10
    EPOCH_BEGUN = 11
    START_RANKS = 12
    RANKS_STARTED = 13
    READ_NODES = 20


_KINDS = {int(kind): kind for kind in MessageKind}


class MessageError(Exception):
    """Received bytes are no valid message; the text is one line."""


@dataclass(frozen=True)
class Ready:
    """The message of a rank that is up."""

    pid: int


class FailureKind(Enum):
    """The cause of a failure."""

    USER = "user"  # a UserError: the user's mistake
    PEER = "peer"  # a transfer broke: some other rank is the cause
    TERMINATED = "terminated"  # the node was told to end, as by torchrun or a batch system
    BUG = "bug"  # anything else


@dataclass(frozen=True)
class Failure:
    """A rank or a node could not go on; it ends, except where a peer was the cause.

    Attributes:
        text: one line.
        details: the traceback of a bug, else empty.
        line: a rank's last line of the `ProgressBoard`; None of a node.
    """

    kind: FailureKind
    text: str
    details: str = ""
    line: Line | None = None

    def __post_init__(self) -> None:
        for name in ("text", "details"):  # may quote a file's name in any bytes
            text = getattr(self, name).encode("utf-8", "backslashreplace").decode()
            object.__setattr__(self, name, text)


@dataclass(frozen=True)
class Heartbeat:
    """A node's answer to a ping; the launcher cannot read the progress board of another node.

    Attributes:
        lines: [num_local_ranks]; the lines of its `ProgressBoard`.
        stopped: global ranks whose processes are stopped.
    """

    lines: list[Line]
    stopped: list[int]


@dataclass(frozen=True)
class Exit:
    """A rank of a node has ended.

    Attributes:
        code: exit code, negative for a signal.
        line: the rank's last line of the node's `ProgressBoard`.
    """

    rank: int
    code: int
    line: Line


@dataclass(frozen=True)
class Nodes:
    """The answer to READ_NODES: hashes that other nodes have put into the store.

    Attributes:
        hashes: [num_nodes - 1]; see `Meeting.hashes`.
    """

    hashes: list[bytes]


@dataclass(frozen=True)
class ChangeRanks:
    """The request to end ranks of a node for certain, and to start others.

    With BEGIN_EPOCH the new ranks are of the epoch that begins, the message's own; with START_RANKS
    they are for a later one. On the launcher's node the descriptors of the new ranks' channels
    follow, in the order of `starts`.

    Attributes:
        number: the change's, which the new ranks' connections claim.
        ends: global ranks to end; those of `starts` that have a process end too.
        starts: global ranks of the node to start.
        num_ranks: ranks of the node in the epoch.
    """

    number: int
    ends: list[int]
    starts: list[int]
    num_ranks: int


@dataclass(frozen=True)
class StartResult:
    """The answer to START_RANKS.

    Attributes:
        missing: global ranks that could not be started.
        why: the reason in a line; empty if none is missing.
    """

    missing: list[int]
    why: str = ""


class Message(NamedTuple):
    """A message as it arrived.

    Attributes:
        epoch: the epoch that it belongs to; 0 in files.
        body: the encoded value.
        arrays: the arrays that it refers to; writable.
    """

    kind: MessageKind
    epoch: int
    body: memoryview
    arrays: memoryview


class Decoder(Generic[ValueT]):
    """Decodes messages to values of one type; their arrays are views of the message's memory."""

    def __init__(self, of: type[ValueT]) -> None:
        self._decoder = msgspec.msgpack.Decoder(of, dec_hook=self._array)
        self._arrays = memoryview(b"")
        # By identity, which is quicker than to hash a type; msgspec always gives the same object.
        self._expected: dict[int, tuple[Any, np.dtype | None]] = {}

    def decode(self, message: Message) -> ValueT:
        """The value of a message.

        Raises:
            MessageError: the message does not hold a value of this type.
        """
        self._arrays = message.arrays
        try:
            return self._decoder.decode(message.body)
        except (msgspec.DecodeError, ValueError, TypeError, OverflowError) as error:
            raise MessageError(" ".join(str(error).split())) from None
        finally:
            self._arrays = memoryview(b"")

    def _array(self, wanted: Any, found: Any) -> np.ndarray:
        """Decode one array; a hot path, which takes most of the time of decoding a step plan."""
        if id(wanted) not in self._expected:
            self._expected[id(wanted)] = wanted, _dtype_of(wanted)
        expected = self._expected[id(wanted)][1]
        try:
            code, shape, offset = found
            dtype = _DTYPES[code]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{wanted} is expected") from None
        if expected is not None and dtype != expected:
            raise ValueError(f"an array of {dtype} where {expected} is expected")
        try:
            if offset >= 0 and min(shape, default=0) >= 0:  # numpy checks the rest
                return np.ndarray(shape, dtype, self._arrays, offset)
        except (TypeError, ValueError, OverflowError):
            pass
        raise ValueError(f"an array of shape {shape} that is not in the message")


def _dtype_of(alias: Any) -> np.dtype | None:
    """The dtype of an `NDArray[...]` alias; None if it allows any."""
    arguments = get_args(alias)
    inner = get_args(arguments[1]) if len(arguments) == 2 else ()
    return np.dtype(inner[0]) if inner and isinstance(inner[0], type) else None


class _Arrays:
    """Collects the arrays of a value while it is encoded."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, value: object) -> object:
        if isinstance(value, np.generic):
            return value.item()
        if not isinstance(value, np.ndarray) or value.dtype not in _CODES:
            raise TypeError(f"a {type(value).__name__} cannot be sent")
        offset = self.size
        data = value.tobytes()
        self.size += len(data)
        self.parts.append(data)
        if padding := -len(data) % _ALIGNMENT:
            self.parts.append(_ZEROS[:padding])
            self.size += padding
        return [_CODES[value.dtype], value.shape, offset]


def encode(kind: MessageKind, value: object, epoch: int = 0) -> bytes:
    """Encode a whole message.

    Args:
        epoch: the epoch that it belongs to; receivers in a newer one drop it.

    Raises:
        TypeError: something in the value cannot be sent.
        UserError: a text in the value is not valid Unicode, as the name of a file may be.
        ValueError: the message would be larger than `MAX_MESSAGE_BYTES`.
    """
    arrays = _Arrays()
    try:
        body = msgspec.msgpack.Encoder(enc_hook=arrays.add).encode(value)
    except UnicodeEncodeError as error:
        raise UserError(f"{error.object!a} is not valid UTF-8") from None
    if len(body) + arrays.size > MAX_MESSAGE_BYTES:
        raise ValueError(
            f"a message of {len(body) + arrays.size:,} bytes; at most {MAX_MESSAGE_BYTES:,}"
        )
    header = _HEADER.pack(_MAGIC, kind, epoch, len(body), arrays.size)
    return b"".join([header, body, bytes(-len(body) % _ALIGNMENT), *arrays.parts])


def messages_in(content: memoryview) -> Iterator[Message]:
    """Consecutive messages, as in a file; the last one is left out if it is cut off.

    Raises:
        MessageError: the header of one is wrong, or announces too many bytes.
    """
    while len(content) >= _HEADER.size:
        header, content = _Header.of(content[: _HEADER.size]), content[_HEADER.size :]
        if len(content) < header.num_bytes:
            return
        yield header.message(content[: header.num_bytes])
        content = content[header.num_bytes :]


class _Header(NamedTuple):
    """The header of a message.

    Attributes:
        body_bytes: bytes of its value.
        arrays_begin: offset of its arrays from the end of the header.
        num_bytes: bytes of the message after the header.
    """

    kind: MessageKind
    epoch: int
    body_bytes: int
    arrays_begin: int
    num_bytes: int

    @classmethod
    def of(cls, encoded: memoryview) -> "_Header":
        magic, kind, epoch, body_bytes, arrays_bytes = _HEADER.unpack(encoded)
        if magic != _MAGIC or kind not in _KINDS:
            raise MessageError("the header is wrong")
        if body_bytes + arrays_bytes > MAX_MESSAGE_BYTES:
            raise MessageError(
                f"the header announces {body_bytes + arrays_bytes:,} bytes; at most "
                f"{MAX_MESSAGE_BYTES:,} are taken"
            )
        arrays_begin = body_bytes + -body_bytes % _ALIGNMENT
        return cls(_KINDS[kind], epoch, body_bytes, arrays_begin, arrays_begin + arrays_bytes)

    def message(self, content: memoryview) -> Message:
        body, arrays = content[: self.body_bytes], content[self.arrays_begin :]
        return Message(self.kind, self.epoch, body, arrays)


class Channel:
    """One side of a connection for messages; owns its socket.

    Args:
        timeout_s: how long the other side may stop within a message; None for no limit.
    """

    def __init__(self, connection: socket.socket, timeout_s: float | None = None) -> None:
        self._socket = connection
        connection.setblocking(True)
        if timeout_s is not None:
            whole, fraction = divmod(timeout_s, 1)
            bound = struct.pack("ll", int(whole), int(fraction * 1e6))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bound)

    def fileno(self) -> int:
        """The file descriptor, to poll; -1 once it is closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def send(self, encoded: bytes) -> None:
        """Send a whole message.

        Raises:
            BlockingIOError: the other side did not read it in time.
            OSError: the connection is closed.
        """
        self._socket.sendall(encoded)

    def send_descriptors(self, descriptors: Sequence[int]) -> None:
        """Send copies of descriptors to another process of this machine.

        Raises:
            BlockingIOError: the other side did not read them in time.
            OSError: the connection is closed.
        """
        for begin in range(0, len(descriptors), _MAX_DESCRIPTORS):
            part = list(descriptors[begin : begin + _MAX_DESCRIPTORS])
            socket.send_fds(self._socket, [_WITH_DESCRIPTORS], part)

    def receive_descriptors(self, number: int) -> list[int]:
        """Wait for descriptors that were sent together by `send_descriptors`.

        Programs that this process starts do not inherit them.

        Raises:
            EOFError, OSError: the connection is closed; descriptors that came are closed too.
            MessageError: another number of them came.
        """
        descriptors: list[int] = []
        try:
            while len(descriptors) < number:
                most = min(number - len(descriptors), _MAX_DESCRIPTORS)
                data, part, _, _ = socket.recv_fds(self._socket, 1, most)
                descriptors += part
                if not data:
                    raise EOFError
                if data != _WITH_DESCRIPTORS or len(part) != most:
                    raise MessageError(f"{len(part)} descriptors where {most} were announced")
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        return descriptors

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            BlockingIOError: the other side stopped in the middle of it.
            EOFError, OSError: the connection is closed.
            MessageError: its header is wrong, or announces too many bytes.
        """
        header = _Header.of(self._receive_exactly(_HEADER.size))
        return header.message(self._receive_exactly(header.num_bytes))

    def _receive_exactly(self, size: int) -> memoryview:
        content = memoryview(bytearray(size))
        num_read = 0
        while num_read < size:
            got = self._socket.recv_into(content[num_read:])
            if not got:
                raise EOFError
            num_read += got
        return content
