"""An engine that `compare` starts as a server: one small class, found by an entry point.

A package adds its own by an entry point of the group `expertlane.engines` that names a subclass of
`Engine`, called as `--engine` takes it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import ClassVar

from expertlane.cost.step.operation import NumberTypes
from expertlane.errors import UserError
from expertlane.planner.server_start import Place, ServeTarget
from expertlane.spec.deployment import Deployment
from expertlane.spec.files import nearest
from expertlane.spec.model import ModelConfig
from expertlane.spec.workload import Workload

GROUP = "expertlane.engines"


@dataclass(frozen=True)
class Asked:
    """A deployment to be served.

    Attributes:
        served: the checkpoint.
        place: this machine: port, devices or cores, and the engine's interpreter.
        num_devices: devices of this machine.
        arguments: further arguments of its command, as a user gives them.
    """

    deployment: Deployment
    model: ModelConfig
    workload: Workload
    served: ServeTarget
    types: NumberTypes
    place: Place
    num_devices: int
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """A server's command, variables set for it, and files that it reads, by name."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


class CannotServe(Exception):
    """The engine does not run the deployment; the text says what it does instead."""


class Engine(ABC):
    """An engine.

    Attributes:
        name: as `--engine` takes it.
        title: its name as its makers write it.
        ready_path: answers 200 once requests are served.
        rank_title: pattern of the titles of its ranks' processes, by which `drill` finds one: with
            the group `rank`, or with `dp`, `pp`, and `tp` or `in_stage`, its number in its stage.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    ready_path: ClassVar[str] = "/health"
    rank_title: ClassVar[str] = ""

    @abstractmethod
    def start(self, asked: Asked) -> Start:
        """How its server is started.

        Raises:
            CannotServe: it does not run the deployment.
        """

    def profiled(self, start: Start, folder: Path) -> Start | None:
        """The start of a server that can write torch profiler traces; None where it cannot.

        A POST to `/start_profile` with `profile_request` begins a trace, one to `/stop_profile`
        ends it.

        Args:
            folder: where its ranks write them, a file each.
        """
        return None

    def profile_request(self, folder: Path) -> Mapping[str, object]:
        """Fields of the request that begins a trace."""
        return {}


def find_engine(name: str) -> Engine:
    """The engine of a name.

    Raises:
        UserError: there is none, or its package is broken.
    """
    known = _entry_points()
    if name not in known:
        raise UserError(f"--engine is {name!r}; known: {', '.join(known)}{nearest(name, known)}")
    entry = known[name]
    try:
        kind = entry.load()
    except Exception as error:  # somebody else's code
        raise UserError(f"--engine {name}: {entry.value} cannot be loaded: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, Engine)):
        raise UserError(f"--engine {name}: {entry.value} is no subclass of Engine")
    return kind()


def known_engines() -> Sequence[str]:
    """Names that `--engine` takes."""
    return [*_entry_points()]


def _entry_points() -> dict[str, EntryPoint]:
    """Our own engines first; no package can take their names."""
    known = "expertlane.comparison.engines.known"
    own = {"vllm": "Vllm", "sglang": "Sglang", "trtllm": "Trtllm", "expertlane": "Expertlane"}
    found = {name: EntryPoint(name, f"{known}:{kind}", GROUP) for name, kind in own.items()}
    for each in entry_points(group=GROUP):
        found.setdefault(each.name, each)
    return found
