"""The file of a journal: its records, and the folder in which each newer file replaces the last.

A record is msgpack of one of the classes below, after a frame: its size, the same inverted, and the
CRC-32 of its bytes. Nothing is unpickled. A process that is killed can leave the last record
incomplete; that one is dropped. Anything else that does not fit is damage, and refused.
"""

import fcntl
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from expertlane.errors import ExpertlaneError, UserError
from expertlane.schedule.request import FinishReason
from expertlane.spec.deployment import Options
from expertlane.spec.model import ModelConfig
from expertlane.spec.sampling import SamplingParams

VERSION = 3
# The first has no `SuspectRecord` or `EndRecord`; before the third, `BeginRecord` has no `seeds`.
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


class BeginRecord(msgspec.Struct, frozen=True, array_like=True, tag="begun"):
    """A request was accepted.

    Attributes:
        number: number of the request in this journal.
        key: SHA-256 of the API key that it came with; empty where none is asked for.
        request_id: the id by which its client comes back.
        is_named: whether the client gave the id.
        path: path of its route.
        body: JSON of its validated fields.
        prompts, texts, created: see `GenerationTask`.
        before: empty; in older versions, messages before a request to `/v1/responses`.
        shared: one entry, the params that all choices share; in older versions, with `seeds`
            empty, the params of every choice.
        root: root of the answer's ids; see `GenerationTask`.
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


class StepRecord(msgspec.Struct, frozen=True, array_like=True, tag="came"):
    """The chunks of a step, written before any client gets them."""

    rows: list[Row]


class ForgetRecord(msgspec.Struct, frozen=True, array_like=True, tag="left"):
    """A request is forgotten."""

    number: int


class SuspectRecord(msgspec.Struct, frozen=True, array_like=True, tag="suspected"):
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


class EndRecord(msgspec.Struct, frozen=True, array_like=True, tag="closed"):
    """The process ended by a signal to it: no request is to blame."""


Record = Header | BeginRecord | StepRecord | ForgetRecord | SuspectRecord | EndRecord
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


_TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_TENSORS = ".safetensors"
_WHOLE_BYTES = 2**20  # of a tensor file; of a larger one, evenly spread samples are read
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096


_SUFFIX, _PARTIAL, _LOCK = ".journal", ".partial", "lock"
_SET_ASIDE = "the server died twice while this request ran, and then while it ran alone"


class JournalError(ExpertlaneError):
    """The journal cannot be written; the text is one line."""


@dataclass
class JournalEntry:
    """A request that an earlier process has left.

    Attributes:
        rows: its chunks, in the order in which they were written.
        suspected: its last `SuspectRecord` record; None if there is none.
        num_rows_before: rows before that record.
        num_deaths: processes in a row that died while they computed it; only the first of them may
            have added rows to it.
        is_set_aside: whether the last process died while it computed this request alone.
    """

    begun: BeginRecord
    rows: list[Row] = field(default_factory=list)
    suspected: SuspectRecord | None = None
    num_rows_before: int = 0
    num_deaths: int = 0
    is_set_aside: bool = False

    def judge(self, *, has_died: bool) -> None:
        """Count the end of the last process against it, and set it aside if it ran alone.

        Args:
            has_died: whether that process ended without a signal to end.
        """
        known = self.suspected
        if self.is_finished:
            return
        if known is None:
            self.num_deaths = int(has_died)
        elif len(self.rows) == self.num_rows_before:
            was_running = has_died and known.is_running
            self.num_deaths = known.num_deaths + was_running
            self.is_set_aside = was_running and known.is_alone
        if self.is_set_aside:
            ended = {place for _, place, *_, more in self.rows if more is not None and more.reason}
            self.rows += [
                (self.begun.number, place, None, "", More(FinishReason.ERROR, _SET_ASIDE))
                for place in range(self.begun.num_choices)
                if place not in ended
            ]

    @property
    def is_finished(self) -> bool:
        """Whether all its choices have ended."""
        num_ended = sum(more is not None and more.reason is not None for *_, more in self.rows)
        return num_ended == self.begun.num_choices


class JournalFile:
    """The folder of a journal, for one process; its records are read when it is opened.

    The newest file is the journal. A new one is written under another name and renamed when it is
    complete; only then is the older one removed. Writes go to the kernel: they outlive this
    process, but the last ones may be lost if the machine crashes. A new file is synced to disk.

    Attributes:
        found: requests of earlier processes, by number.
        num_torn_bytes: bytes of an incomplete last record, which is dropped.
        size: size of the current file, in bytes.
        num_bytes, num_records, num_files, write_s: written since the start, and the time it took.

    Raises:
        UserError: the folder cannot be used, another process uses it, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[int, JournalEntry] = {}
        self.num_torn_bytes = self.size = 0
        self.num_bytes = self.num_records = self.num_files = 0
        self.write_s = 0.0
        self._identity: dict[str, str] = {}
        self._is_closed = False
        self._file = self._number = -1
        self._error: JournalError | None = None
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            self._read()
        except OSError as error:
            raise UserError(f"--journal {folder}: {error.strerror}") from None

    def _read(self) -> None:
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--journal {self.folder}: another server uses this folder") from None
        files = self._files()
        if not files:
            return
        self._number, path = max(files.items())
        data = path.read_bytes()
        at = 0
        try:
            for end, record in records_of(data):
                self._take(record, at)
                at = end
            if at == 0:  # files are complete when they get their names
                raise DamagedError(f"byte 0: the header is missing; the file has {len(data)} bytes")
        except DamagedError as error:
            raise UserError(
                f"{path}: {error}; `truncate -s BYTE FILE` keeps the records before it, unless it "
                "is 0; with another folder the server starts without requests"
            ) from None
        self.num_torn_bytes = len(data) - at
        for found in self.found.values():
            found.judge(has_died=not self._is_closed)

    def _take(self, record: Record, at: int) -> None:
        if isinstance(record, Header) != (at == 0):
            raise DamagedError(f"byte {at}: the header is missing, or not the first record")
        if isinstance(record, Header):
            if record.version not in READ_VERSIONS:
                raise DamagedError(
                    f"byte {at}: the file has version {record.version}; this expertlane reads "
                    f"{READ_VERSIONS[0]} to {VERSION}"
                )
            self._identity = record.identity
        elif isinstance(record, BeginRecord):
            if record.seeds and (len(record.shared), len(record.lengths)) != (1, len(record.seeds)):
                raise DamagedError(
                    f"byte {at}: a request of {len(record.seeds)} choices is damaged"
                )
            self.found[record.number] = JournalEntry(record)
        elif isinstance(record, StepRecord):
            for row in record.rows:
                found = self.found.get(row[0])
                if found is None or not 0 <= row[1] < found.begun.num_choices:
                    raise DamagedError(
                        f"byte {at}: tokens of an unknown request ({row[0]}, {row[1]})"
                    )
                found.rows.append(row)
        elif isinstance(record, SuspectRecord):
            suspect = self.found.get(record.number)
            if suspect is None:
                raise DamagedError(f"byte {at}: an unknown request ({record.number})")
            suspect.suspected, suspect.num_rows_before = record, len(suspect.rows)
        elif isinstance(record, EndRecord):
            self._is_closed = True
        else:
            self.found.pop(record.number, None)

    def _files(self) -> dict[int, Path]:
        return {
            int(path.stem): path
            for path in self.folder.glob(f"*{_SUFFIX}")
            if path.stem.isascii() and path.stem.isdigit()
        }

    def identify(self, identity: Mapping[str, str]) -> None:
        """Set the facts that tokens depend on; if there are requests, they must be the same.

        Raises:
            UserError: they differ.
        """
        before, self._identity = self._identity, dict(identity)
        if not self.found:
            return
        for name in [*identity, *(before.keys() - identity.keys())]:
            was, now = before.get(name, "nothing"), identity.get(name, "nothing")
            if was != now:
                raise UserError(
                    f"--journal {self.folder} has requests of a server whose {name} was {was}, not "
                    f"{now}; start it with the same, or give another folder"
                )

    def replace(self, records: Iterable[Record]) -> None:
        """Begin a new file with these records, and remove the older ones.

        Raises:
            JournalError: it cannot be written.
        """
        try:
            self._replace(records)
        except OSError as error:
            raise self._fail(error) from None

    def _replace(self, records: Iterable[Record]) -> None:
        self._number += 1
        path = self.folder / f"{self._number:08d}{_SUFFIX}"
        partial = path.with_suffix(_PARTIAL)
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        before, self._file, self.size = self._file, file, 0
        try:
            self._write(Header(VERSION, self._identity))
            for record in records:
                self._write(record)
            os.fsync(file)
            partial.rename(path)
        finally:
            if before >= 0:
                os.close(before)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.num_files += 1
        for number, older in self._files().items():
            if number < self._number:
                older.unlink()

    def append(self, record: Record) -> None:
        """Add a record; it outlives this process once this returns.

        Raises:
            JournalError: it cannot be written, now or before.
        """
        if self._error is not None:
            raise self._error
        try:
            self._write(record)
        except OSError as error:
            raise self._fail(error) from None

    def _write(self, record: Record) -> None:
        began_s = time.perf_counter()
        data = memoryview(framed(record))
        while data:
            num = os.write(self._file, data)
            self.size += num
            self.num_bytes += num
            data = data[num:]
        self.num_records += 1
        self.write_s += time.perf_counter() - began_s

    def _fail(self, error: OSError) -> JournalError:
        self._error = JournalError(f"--journal {self.folder}: {error.strerror}")
        return self._error

    def close(self) -> None:
        """Close the files, so that another process can have the folder."""
        for each in (self._file, self._lock):
            if each >= 0:
                os.close(each)
        self._file = self._lock = -1


def identity(
    model: ModelConfig, folder: Path | None, options: Options, dtype: str | None
) -> dict[str, str]:
    """The facts that tokens and texts depend on, by the names that messages use.

    The layout is not among them: it changes results by rounding alone.

    Args:
        folder: the checkpoint's folder; None where weights are random.
        dtype: the number type asked for; None for the default.
    """
    digest = blake2b(repr(replace(model, name="")).encode(), digest_size=8)
    return {
        "model": digest.hexdigest(),
        "checkpoint": "random weights" if folder is None else fingerprint(folder),
        "--dtype": dtype or "the default",
        "--weights": options.weights,
        "--activations": options.activations,
        "--kv-dtype": options.kv_dtype,
        "--payload": options.payload,
    }


def fingerprint(folder: Path) -> str:
    """A hash of a checkpoint's file names and sizes, its text files, and samples of tensors."""
    digest = blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.name in _TEXTS or path.suffix == _TENSORS):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for part in _parts(path):
                digest.update(part)
    return digest.hexdigest()


def _parts(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES or path.suffix != _TENSORS:
            yield file.read()
            return
        for number in range(_NUM_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)
