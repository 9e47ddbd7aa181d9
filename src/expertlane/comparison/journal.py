"""Journal of an unfinished comparison's measurements: `compare --resume` goes on from it.

The file is messages of `engine.ranks.messages`: first whose measurements they are, then one for
each. A last one that was cut off in the middle counts as not measured.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from expertlane import __version__
from expertlane.engine.ranks.commands import HeldBytes, RankMachine
from expertlane.engine.ranks.messages import Decoder, MessageError, MessageKind, encode, messages_in
from expertlane.errors import UserError, naming
from expertlane.results.hardware import MachinePeak
from expertlane.results.record import RebalanceRecord
from expertlane.results.step_record import StepRecord
from expertlane.spec.deployment import DispatchTable
from expertlane.spec.experiment import Experiment
from expertlane.spec.files import read_bytes, write_whole

FILE_NAME = "unfinished.bin"
_MOST_BYTES = 8 << 30


@dataclass(frozen=True)
class Measurement:
    """One repetition of a deployment's workload.

    Attributes:
        run: index of the repetition; -1 for the run with the same sequences a rank.
        tokens: [num_sequences, output_len].
        held: [world_size]; bytes that each rank had allocated.
        dispatch: the table as measured, where it is `auto`.
        rebalances: decisions of this repetition.
    """

    role: str
    name: str
    run: int
    steps: list[StepRecord]
    tokens: npt.NDArray[np.int64]
    held: list[HeldBytes]
    dispatch: DispatchTable | None
    rebalances: list[RebalanceRecord]


@dataclass(frozen=True)
class _Owner:
    """The version, experiment, checkpoint and machine that measurements belong to."""

    version: str
    experiment: str
    checkpoint: list[str]
    machine: list[str]
    peak: MachinePeak

    def what_differs(self, other: "_Owner") -> str | None:
        """The first setting that differs, in a word; None if all are the same but for the peak."""
        names = {
            "version": "version of expertlane",
            "experiment": "experiment",
            "checkpoint": "checkpoint",
            "machine": "machine",
        }
        differing = (a for a in names if getattr(self, a) != getattr(other, a))
        return next((names[each] for each in differing), None)


class Journal:
    """Measurements of a comparison, kept as they are made.

    Attributes:
        peak: peak rates of the machine, as first measured.
        num_kept: measurements that were there already.
    """

    def __init__(self, path: Path, owner: _Owner, kept: Sequence[Measurement]) -> None:
        self._path, self.peak, self.num_kept = path, owner.peak, len(kept)
        self._kept = {(each.role, each.name, each.run): each for each in kept}
        self._parts = [encode(MessageKind.RESULT, each) for each in (owner, *kept)]
        self._file: BinaryIO | None = None  # made with the first measurement

    @classmethod
    def of(
        cls,
        folder: Path,
        experiment: Experiment,
        seen: Sequence[RankMachine],
        peak: MachinePeak,
        *,
        resume: bool,
    ) -> "Journal":
        """The journal of a comparison in its folder of results; a new one unless `resume`.

        Raises:
            UserError: there is none to resume, it is another comparison's, or unreadable.
        """
        path = folder / FILE_NAME
        owner = _Owner(
            __version__,
            repr(replace(experiment, checkpoint=None)),
            _files_of(experiment.checkpoint),
            [f"{each.cpu_name} {each.device} {each.dtype} {each.kernels}" for each in seen],
            peak,
        )
        if not resume:
            path.unlink(missing_ok=True)
            return cls(path, owner, [])
        first, kept = _read(path)
        if (what := first.what_differs(owner)) is not None:
            raise UserError(f"{path} is of another {what}; compare without --resume")
        return cls(path, first, kept)

    def take(self, role: str, name: str, run: int) -> Measurement | None:
        """The kept measurement of a repetition; None if it was not made."""
        return self._kept.get((role, name, run))

    def add(self, measurement: Measurement) -> None:
        """Keep one more."""
        if self._file is None:
            write_whole(self._path, lambda file: file.writelines(self._parts))
            self._file = self._path.open("ab")
        self._file.write(encode(MessageKind.RESULT, measurement))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the file for `--resume`, or remove it where everything is measured."""
        if self._file is not None:
            self._file.close()
        if kind is None:
            self._path.unlink(missing_ok=True)


def _files_of(checkpoint: str | None) -> list[str]:
    """Names, sizes and times of a checkpoint's files."""
    if checkpoint is None:
        return []
    entries = sorted(os.scandir(checkpoint), key=lambda entry: entry.name)
    stats = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]


def _read(path: Path) -> tuple[_Owner, list[Measurement]]:
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}; compare without --resume")
    found = messages_in(memoryview(bytearray(read_bytes(path, _MOST_BYTES))))
    try:
        first = next(found, None)
        if first is None:
            raise MessageError("it is empty")
        decoder = Decoder(Measurement)
        with naming(path):
            return Decoder(_Owner).decode(first), [decoder.decode(each) for each in found]
    except MessageError as error:
        raise UserError(f"{path} cannot be read: {error}; compare without --resume") from None
