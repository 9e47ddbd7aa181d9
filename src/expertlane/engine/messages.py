"""What the launcher and a rank say to each other; importable without torch."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.balance.deployed import Placements
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.record import RankRecord
from expertlane.spec.sampling import TokenLogprobs


@dataclass(frozen=True)
class Call:
    """Ask a rank to run `function(context, *args)`.

    Attributes:
        function: `module:name`, so that the launcher needs not import what ranks run.
    """

    function: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Result:
    """What the function returned."""

    value: Any


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank of another node is, whose progress line the launcher cannot see.

    Attributes:
        cells: a `ProgressBoard` line.
    """

    cells: list[int]


class FailureKind(Enum):
    """Who is to blame for a failure."""

    USER = "user"  # a UserError: what was asked for is wrong
    PEER = "peer"  # a transfer broke: some other rank is the cause
    TERMINATED = "terminated"  # the rank was told to end, as by torchrun or a batch system
    BUG = "bug"  # anything else


@dataclass(frozen=True)
class Failure:
    """The function raised; the rank ends after this message.

    Attributes:
        text: one line.
        details: the traceback of a bug, else empty.
    """

    kind: FailureKind
    text: str
    details: str = ""


@dataclass(frozen=True)
class RankSettings:
    """What a rank is told at its start.

    Attributes:
        progress_path: the file of the progress board; None where it is not shared.
        store_path: the rendezvous file of local ranks; None under torchrun.
        timeout_s: the bound on any wait for other ranks.
    """

    rank: int
    world_size: int
    local_rank: int
    num_local_ranks: int
    progress_path: str | None
    store_path: str | None
    timeout_s: float
    dtype: str | None


@dataclass(frozen=True)
class StageSpec:
    """What decides a rank's weights; a rank that already holds them keeps them.

    Attributes:
        placements: [num_hidden_layers]; where experts are at first.
        checkpoint: the folder the weights are in; None for seeded ones.
    """

    model: ModelConfig
    layout: Layout
    placements: Placements
    seed: int
    ranks_per_node: int
    checkpoint: str | None = None


@dataclass(eq=False)
class RankOutcome:
    """A rank's part of a step's outcome; sequences only from the last stage.

    Attributes:
        token_ids, logprobs: by sequence id; empty but on the first rank of a tensor-parallel
            group.
        logits: by sequence id, this rank's part of the vocabulary; empty unless asked for.
    """

    token_ids: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    logits: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    record: RankRecord | None = None


@dataclass(frozen=True)
class HeldBytes:
    """What a rank has allocated for a deployment."""

    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class RankMachine:
    """What a rank sees of its machine.

    Attributes:
        kernels: what computes: `expertlane` for our own CPU kernels, else `torch`.
        free_bytes: memory of its device that can still be allocated.
        num_idle_gpus: GPUs of its host that are not used, because there are fewer than ranks.
    """

    host: str
    num_cores: int
    cpu_name: str
    device: str
    backend: str
    dtype: str
    kernels: str
    torch_version: str
    memory_bytes: int
    free_bytes: int
    ranks_per_node: int
    num_idle_gpus: int

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device != "cpu"
