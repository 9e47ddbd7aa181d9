"""Commands of the launcher to ranks, the types of their answers, tickets of those under way.

`engine/stage/worker.py` (`HANDLERS`) has the function that a rank runs for each command.
This module needs no torch.
"""

import time
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from expertlane.balance.holding import Placements
from expertlane.balance.placement import MovedPart
from expertlane.balance.transition import Arrangement
from expertlane.cost.step.operation import SIZES, OpKind, TransferKind
from expertlane.engine.ranks.messages import Decoder, Message, MessageError
from expertlane.results.step_checks import RankChecks
from expertlane.results.step_record import RankRecord, RankTotals
from expertlane.schedule.plan import RankStep
from expertlane.spec.deployment import (
    ActivationsType,
    DispatchForm,
    DispatchTable,
    GraphLimits,
    Options,
    WeightsType,
)
from expertlane.spec.layout import Layout, Members
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import CheckLevel, Origin
from expertlane.spec.sampling import PromptPart, TokenLogprobs

ResultT = TypeVar("ResultT")


class Command(msgspec.Struct, Generic[ResultT], tag=True):
    """A request of the launcher to a rank. The type argument is the type of the answer.

    Attributes:
        needs_epoch: it runs on ranks of the epoch in which it was submitted, and is dropped when
            another begins. Otherwise any rank takes it, also one that is ahead of the epoch, and a
            new epoch does not end it; then it must not communicate with other ranks.
    """

    needs_epoch: ClassVar[bool] = True


def result_type(command: type[Command[ResultT]]) -> Any:
    """The type of a command's answer, as its class states it."""
    (base,) = command.__orig_bases__  # type: ignore[attr-defined]
    (result,) = get_args(base)
    return result


@dataclass(frozen=True)
class Point:
    """An operation whose time is measured.

    Attributes:
        dtype: type of the weights, or of keys and values.
        sizes: the sizes of its kind, in the order of `SIZES`.
    """

    kind: OpKind
    dtype: str
    sizes: tuple[int, ...]

    @property
    def by_name(self) -> dict[str, int]:
        """Its sizes by name."""
        return dict(zip(SIZES[self.kind], self.sizes, strict=True))


@dataclass(frozen=True)
class TransferPoint:
    """One collective of the first `num_ranks` ranks, or a send from the first to the second.

    Attributes:
        num_bytes: bytes that a rank sends to each other rank, in rows of `row_bytes`.
    """

    kind: TransferKind
    num_ranks: int
    num_bytes: int
    row_bytes: int = 64


@dataclass(frozen=True)
class StageSpec:
    """The model, layout and placements that determine ranks' weights.

    A rank that already holds the weights of a spec keeps them.

    Attributes:
        placements: [num_hidden_layers]; the placements of experts at the start.
        seed: seed of random weights.
        numbers: [world_size]; the process of each rank of the layout; if empty, rank r is process
            r.
        checkpoint: the folder with the weights; None for seeded ones.
        weights, activations: see `Options`.
        check: the level of checks for silent errors.
    """

    model: ModelConfig
    layout: Layout
    placements: Placements
    seed: int
    ranks_per_node: int
    checkpoint: str | None = None
    weights: WeightsType = "model"
    activations: ActivationsType = "model"
    check: CheckLevel = "off"
    numbers: tuple[int, ...] = ()

    @property
    def members(self) -> Members:
        """The processes of the layout."""
        return Members(self.layout, self.numbers)

    @property
    def arrangement(self) -> Arrangement:
        """Its members and placements, as if all replicas had these."""
        return Arrangement.alike(self.members, self.placements, self.ranks_per_node)


@dataclass(eq=False)
class RankOutcome:
    """A rank's part of a step's outcome; only the last stage has sequences.

    Attributes:
        token_ids, logprobs, prompt_logprobs: by sequence id; empty except on the first rank of a
            tensor-parallel group.
        logits: by sequence id, for this rank's part of the vocabulary; empty unless asked for.
        not_finite: sequences without a next token, as their greatest logit is NaN or infinite;
            empty on ranks whose `token_ids` is.
        checks: findings and checksums for silent errors; None without checks.
    """

    token_ids: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    logits: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    record: RankRecord | None = None
    not_finite: list[int] = field(default_factory=list)
    prompt_logprobs: dict[int, PromptPart] = field(default_factory=dict)
    checks: RankChecks | None = None


@dataclass(frozen=True)
class HeldBytes:
    """Memory that a rank has allocated for a deployment.

    Attributes:
        bytes_from: bytes of weights by their origin.
        seconds_from: seconds that getting them took, by origin, where it took any.
        has_graphs: it can launch decode steps as graphs; one more block is for their padding.
    """

    weight_bytes: int
    kv_bytes: int
    bytes_from: dict[Origin, int] = field(default_factory=dict)
    seconds_from: dict[Origin, float] = field(default_factory=dict)
    has_graphs: bool = False


@dataclass(frozen=True)
class PreparationProgress:
    """A rank's progress with the weights of a place in another layout.

    Attributes:
        share: share of layers, embedding and head that is made; 1 once all that fits into memory
            is.
        num_bytes: bytes made so far, in addition to the present weights.
        seconds: seconds that this call took.
    """

    share: float
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class RankMachine:
    """A rank's machine, as the rank sees it.

    Attributes:
        cpus: hardware threads that the rank is pinned to; empty where it is not pinned.
        kernels: whose kernels compute; see `engine.ops.backend.Platform`.
        free_bytes: memory of its device that can still be allocated.
        num_idle_gpus: GPUs of its host that are not used because there are fewer than ranks.
        keeps_narrow, keeps_mxfp4: weights of one byte, and of MXFP4, stay so in memory; else they
            are widened while loading.
        reads_float8: its attention can read a cache of float8.
        multiplies_float8: its products can take inputs in float8.
        ranks_on_device: ranks that share its GPU.
        driver: version of its GPU's driver; empty without one.
    """

    host: str
    num_cores: int
    cpus: list[int]
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
    keeps_narrow: bool = False
    keeps_mxfp4: bool = False
    reads_float8: bool = True
    multiplies_float8: bool = True
    ranks_on_device: int = 1
    driver: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device != "cpu"

    def num_sharing(self, world_size: int) -> int:
        """Ranks that share its device's memory if there are `world_size`."""
        return min(world_size, self.ranks_on_device if self.on_gpu else self.ranks_per_node)


@dataclass(frozen=True)
class RankRates:
    """A rank's peak rates, with its threads."""

    gemm_flops_per_s: float
    read_bytes_per_s: float
    num_threads: int


class DescribeMachine(Command[RankMachine]):
    """Ask a rank for its `RankMachine`."""


class Deploy(Command[HeldBytes]):
    """Build the rank's stage, or keep it if only options changed. Collective over all ranks.

    Attributes:
        num_blocks, block_size: blocks of the KV cache, and positions in a block.
        graphs: sizes of graphs; None if no step is to be recorded.
    """

    spec: StageSpec
    options: Options
    num_blocks: int
    block_size: int
    graphs: GraphLimits | None = None


class LeaveCores(Command[None]):
    """Unpin the rank's threads, until the number of ranks that share the cores changes."""


class Redeploy(Command[HeldBytes]):
    """Join a new epoch: make missing weights, connect to all others, undo uncommitted steps.

    A rank that has its stage keeps weights and cache; moves of experts under way are dropped. In
    another layout it keeps the weights that its new stage needs too, and the cache if
    `Members.kept_caches`. A rank without a place in the layout keeps its weights. Collective over
    all ranks.

    Attributes:
        deploy: how a rank without its stage builds it; its spec has the committed placements.
        discard: steps of all replicas that are not committed; all others are.
        dispatch_table: how steps run; None if the options fix it.
    """

    deploy: Deploy
    discard: tuple[int, ...]
    dispatch_table: DispatchTable | None = None


class Prepare(Command[PreparationProgress]):
    """Make the weights that a place of another layout needs and the rank does not have.

    They are held for the `Redeploy` to come. A rank that runs steps meanwhile is given `most_s`,
    and goes on with the next command. A rank without steps makes them at a higher niceness.

    Attributes:
        place: the rank in the new layout.
        most_s: seconds after which no further part is begun; None to make all at once.
        most_bytes: bytes after which no further part is begun; None for no limit.
    """

    needs_epoch: ClassVar[bool] = False

    spec: StageSpec
    place: int
    most_s: float | None = None
    most_bytes: int | None = None


class DropPreparation(Command[None]):
    """Free the weights that `Prepare` has made."""

    needs_epoch: ClassVar[bool] = False


class SetDispatch(Command[None]):
    """Set the dispatch form and overlap of steps from now on, by a table."""

    table: DispatchTable


class RecordGraphs(Command[int]):
    """Record decode steps as graphs ahead of use; the answer is the number of new graphs.

    Collective over the ranks of a replica.

    Attributes:
        size: sequences of a data-parallel rank, padding included.
        forms: dispatch forms that such steps may have.
    """

    size: int
    forms: tuple[DispatchForm, ...]


class RunStep(Command[RankOutcome]):
    """Execute one step on the rank's stage.

    Attributes:
        placements: [num_hidden_layers]; new placements from this step on; None for no change.
    """

    step: RankStep
    placements: Placements | None = None


class StartProfile(Command[str]):
    """Begin a trace of the rank's steps by torch's profiler; the answer says why not, if so."""


@dataclass(frozen=True)
class WrittenTrace:
    """A rank's trace.

    Attributes:
        name: its file in the folder; empty where there is none.
        num_steps: steps in it.
        why_not: why there is none.
    """

    name: str = ""
    num_steps: int = 0
    why_not: str = ""


class StopProfile(Command[WrittenTrace]):
    """End the trace that `StartProfile` has begun, and write it.

    Attributes:
        folder: where to; made if it does not exist.
    """

    folder: str


class ReadTotals(Command[RankTotals]):
    """Read the rank's running totals, which the first of these commands starts."""


class SumWeights(Command[dict[str, int]]):
    """Checksums of all weights that the rank holds, by names that mean the same on all ranks."""


class StartMoves(Command[float]):
    """Start to send and receive parts of experts; `Move.layer` is a hidden layer.

    The answer is the seconds that this took.
    """

    parts: tuple[MovedPart, ...]


class FinishMoves(Command[float]):
    """Wait for the parts that `StartMoves` has started; the answer is the seconds that it took."""


class TimeOneMove(Command[tuple[int, float, float]]):
    """Time a move in which each rank sends an expert to the next rank of its ep group.

    The answer is the bytes of an expert, the seconds for it, and the seconds for the smallest part
    of one. The received weights are discarded. Collective over the ranks of a replica.
    """


class MeasureRates(Command[RankRates]):
    """The rates of a large matrix product and of reading memory."""


class MeasureOperations(Command[list[float]]):
    """Seconds of each operation, [num_points]; the median of one round's repetitions.

    All ranks begin each of them together, since they share the memory's bandwidth.

    Attributes:
        point_s: seconds for an operation's repetitions; it is done once at least.
        num_ranks: the first ranks measure; the others wait.
    """

    points: tuple[Point, ...]
    point_s: float
    num_ranks: int


class MeasureLaunches(Command[tuple[float, float]]):
    """Seconds that a GPU's host takes to launch a kernel, and a graph of several kernels."""


class MeasureTransfers(Command[list[float]]):
    """Seconds of each transfer, [num_points]; 0 on ranks that take no part.

    Repetitions follow on each other, so all ranks begin each at about the same time.
    """

    points: tuple[TransferPoint, ...]
    point_s: float


class MeasureContention(Command[list[float]]):
    """The share of computing that an all-to-all in flight takes away, for each size; 0 … 1.

    A product that takes longer than the transfer is timed without and with it.

    Attributes:
        num_ranks: number of ranks that take part, the first ones; 2 or more.
        sizes: bytes to each other rank.
    """

    num_ranks: int
    sizes: tuple[int, ...]
    point_s: float


class MeasureStep(Command[int]):
    """Run a step once with each table; the answer is the bytes that it took at most.

    As many tokens as possible go to the first rank's experts. The step spoils cache and sampler,
    so another `Deploy` follows. Collective over all ranks.
    """

    step: RankStep
    tables: tuple[DispatchTable, ...]


class Ticket(Generic[ResultT]):
    """A command under way on some ranks.

    Args:
        decoder: decodes the answers.
        needs_epoch: the command is dropped when another epoch begins.

    Attributes:
        results: answers so far, by rank.
        why_lost: why it will never be done; empty as long as it may be.
        submitted_s: when the command was submitted, on the monotonic clock.
    """

    def __init__(
        self, ranks: Sequence[int], decoder: Decoder[ResultT], *, needs_epoch: bool = True
    ) -> None:
        self.ranks = list(ranks)
        self.decoder, self.needs_epoch = decoder, needs_epoch
        self.results: dict[int, ResultT] = {}
        self.why_lost = ""
        self.submitted_s = time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether every rank has answered."""
        return len(self.results) == len(self.ranks)

    @property
    def is_lost(self) -> bool:
        """Whether the call will never be done: a new epoch began, or one of its ranks is gone."""
        return bool(self.why_lost)

    @property
    def busy(self) -> list[int]:
        """Ranks that have not answered."""
        return [rank for rank in self.ranks if rank not in self.results]


class Tickets:
    """The tickets that ranks have not answered, in order for each rank."""

    def __init__(self) -> None:
        self._waiting: defaultdict[int, deque[Ticket[Any]]] = defaultdict(deque)
        self._decoders: dict[type[Command[Any]], Decoder[Any]] = {}

    def new(self, command: Command[ResultT], ranks: Sequence[int]) -> Ticket[ResultT]:
        """A ticket for a command, or others of its type, that each of the ranks gets next."""
        kind = type(command)
        if kind not in self._decoders:
            self._decoders[kind] = Decoder(result_type(kind))
        ticket = Ticket(ranks, self._decoders[kind], needs_epoch=kind.needs_epoch)
        for rank in ranks:
            self._waiting[rank].append(ticket)
        return ticket

    def take(self, rank: int, message: Message) -> None:
        """Take a rank's answer to its oldest command.

        Raises:
            MessageError: it is of another type, or no answer is due.
        """
        if not (waiting := self._waiting[rank]):
            raise MessageError(f"{message.kind.name} was not expected")
        waiting[0].results[rank] = waiting[0].decoder.decode(message)
        waiting.popleft()

    def waiting(self) -> set[Ticket[Any]]:
        """All of them; for any thread."""
        return {ticket for of_rank in [*self._waiting.values()] for ticket in [*of_rank]}

    def waits_since_s(self, rank: int) -> float | None:
        """When the rank's oldest unanswered command was submitted; None without one."""
        waiting = self._waiting.get(rank)
        return waiting[0].submitted_s if waiting else None

    def lose_epoch(self) -> None:
        """Drop all commands of the epoch before; those that need no epoch go on."""
        for rank, waiting in self._waiting.items():
            for ticket in waiting:
                if ticket.needs_epoch:
                    ticket.why_lost = "a new epoch began"
            self._waiting[rank] = deque(each for each in waiting if not each.needs_epoch)

    def lose_ranks(self, ranks: Collection[int], why: str) -> None:
        """Drop the commands of ranks that ended; others may still answer theirs."""
        for rank in ranks:
            for ticket in self._waiting.pop(rank, ()):
                ticket.why_lost = why
