"""The interface of an engine that `compare --engine` starts as a server.

A package adds an engine by an entry point in the group `expertlane.engines`: its name is what
`--engine` takes, and its value names a subclass of `Engine`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
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
class LaunchRequest:
    """A deployment that an engine is asked to serve.

    Attributes:
        served: the checkpoint.
        place: port, devices or cores of this machine, and the engine's interpreter.
        num_devices: GPUs of this machine; cores if it has no GPU.
        arguments: further arguments of the engine's command, from `--engine-args`.
        kv_tokens: tokens that the KV caches of all data-parallel ranks hold together; None for the
            engine's own choice.
    """

    deployment: Deployment
    model: ModelConfig
    workload: Workload
    served: ServeTarget
    types: NumberTypes
    place: Place
    num_devices: int
    arguments: tuple[str, ...] = ()
    kv_tokens: int | None = None


@dataclass(frozen=True)
class LaunchCommand:
    """A server's command, its environment variables, and files that it reads.

    Attributes:
        environment: added to this process's variables.
        files: texts by name, written into the server's folder before it starts.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


class CannotServe(Exception):
    """The engine cannot run the deployment; the text says why."""


class Engine(ABC):
    """An engine that `compare` can start and measure.

    Attributes:
        name: name for `--engine`.
        title: name in reports.
        ready_path: a path that answers 200 once the server is ready.
        takes_kv_tokens: whether its commands set `kv_tokens`.
        rank_title: pattern of the titles of its ranks' processes, by which `drill` finds one: with
            the group `rank`, or with `dp`, `pp`, and `tp` or `in_stage`, its number in its stage.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    ready_path: ClassVar[str] = "/health"
    takes_kv_tokens: ClassVar[bool] = False
    rank_title: ClassVar[str] = ""

    @abstractmethod
    def start(self, request: LaunchRequest) -> LaunchCommand:
        """The command that starts a server of a deployment.

        Raises:
            CannotServe: the engine cannot run the deployment.
        """

    def scripts(self, request: LaunchRequest) -> Mapping[str, str]:
        """Scripts that start the deployment on a cluster, by file name; none by default.

        Args:
            request: the deployment; `num_devices` is per node, and `place` is not used.

        Raises:
            CannotServe: the engine cannot run the deployment.
        """
        return {}


def find_engine(name: str) -> Engine:
    """The engine that `--engine` names.

    Raises:
        UserError: no package has an engine of that name, or its package cannot be loaded.
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
        raise UserError(f"--engine {name}: {entry.value} is not a subclass of Engine")
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
