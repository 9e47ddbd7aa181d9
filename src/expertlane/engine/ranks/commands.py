"""What the launcher asks of a rank, each with the type of its answer; importable without torch.

`engine/stage/stage.py` (`HANDLERS`) has what a rank does for each command.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from expertlane.balance.moves import Part
from expertlane.balance.placement_file import Placements
from expertlane.cost.step.operation import SIZES, Kind, TransferKind
from expertlane.results.rank_totals import RankTotals
from expertlane.results.step_checks import RankChecks
from expertlane.results.step_record import RankRecord
from expertlane.schedule.plan import RankStep
from expertlane.spec.deployment import ActivationsType, GraphLimits, Options, WeightsType
from expertlane.spec.dispatch import DispatchForm, DispatchTable
from expertlane.spec.layout import Layout
from expertlane.spec.members import Members
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import CheckLevel, Origin
from expertlane.spec.prompt_logprobs import PromptPart
from expertlane.spec.sampling import TokenLogprobs

ResultT = TypeVar("ResultT")


class Command(msgspec.Struct, Generic[ResultT], tag=True):
    """Something a rank does for the launcher.

    The type argument is the type of the answer, by which it is decoded.

    Attributes:
        needs_epoch: it runs on ranks of the epoch in which it was submitted, and is dropped
            when another begins. Else any rank takes it, also one that is ahead, and it goes on: it
            must not talk to other ranks.
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
        dtype: of weights.
        sizes: those of its kind, in the order of `SIZES`.
    """

    kind: Kind
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
        num_bytes: what a rank sends to each other one, in rows of `row_bytes`.
    """

    kind: TransferKind
    num_ranks: int
    num_bytes: int
    row_bytes: int = 64


@dataclass(frozen=True)
class StageSpec:
    """What decides a rank's weights; a rank that already holds them keeps them.

    Attributes:
        placements: [num_hidden_layers]; where experts are at first.
        numbers: [world_size]; the process of each rank of the layout, each its own if empty.
        checkpoint: the folder the weights are in; None for seeded ones.
        weights, cache_int8, activations: as in `Options`.
        check: how much it looks for silent errors.
    """

    model: ModelConfig
    layout: Layout
    placements: Placements
    seed: int
    ranks_per_node: int
    checkpoint: str | None = None
    weights: WeightsType = "model"
    cache_int8: bool = False
    activations: ActivationsType = "model"
    check: CheckLevel = "off"
    numbers: tuple[int, ...] = ()

    @property
    def members(self) -> Members:
        """The processes of the layout."""
        return Members(self.layout, self.numbers)


@dataclass(eq=False)
class RankOutcome:
    """A rank's part of a step's outcome; sequences only from the last stage.

    Attributes:
        token_ids, logprobs, prompt_logprobs: by sequence id; empty but on the first rank of a
            tensor-parallel group.
        logits: by sequence id, this rank's part of the vocabulary; empty unless asked for.
        not_finite: sequences that have no next token: their greatest logit is NaN or infinite;
            empty where `token_ids` is.
        checks: what it found of silent errors; None where nobody looks.
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
    """What a rank has allocated for a deployment.

    Attributes:
        bytes_from: of the weights, those that are from each source.
        seconds_from: that it took to get them, where it took any.
        has_graphs: it can launch decode steps as graphs; a block of the cache is for their padding.
    """

    weight_bytes: int
    kv_bytes: int
    bytes_from: dict[Origin, int] = field(default_factory=dict)
    seconds_from: dict[Origin, float] = field(default_factory=dict)
    has_graphs: bool = False


@dataclass(frozen=True)
class Prepared:
    """A rank's progress with the weights of a place in another layout.

    Attributes:
        share: of layers, embedding and head; 1 once everything that fits into memory is made.
        num_bytes: made so far, in addition to the present weights.
        seconds: that this call took.
    """

    share: float
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class RankMachine:
    """A rank's machine, as the rank sees it.

    Attributes:
        cpus: hardware threads that the rank is kept on; none where the system may move it.
        kernels: what computes: `expertlane (avx2)` for our own CPU kernels with that instruction
            set, else `torch`, with the reason where ours would have been better.
        free_bytes: memory of its device that can still be allocated.
        num_idle_gpus: GPUs of its host that are not used, because there are fewer than ranks.
        keeps_narrow, keeps_mxfp4: weights of one byte, and of MXFP4, stay so in memory; else they
            are widened while loading.
        reads_float8: its attention can read a cache of float8.
        multiplies_float8: its products can take inputs in float8.
        ranks_on_device: that share its GPU.
        driver: of its GPU, as the system names it; empty without one.
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
        """How many of so many ranks share its device's memory."""
        return min(world_size, self.ranks_on_device if self.on_gpu else self.ranks_per_node)


@dataclass(frozen=True)
class RankRates:
    """What a rank can do at best, with its threads."""

    gemm_flops_per_s: float
    read_bytes_per_s: float
    num_threads: int


class DescribeMachine(Command[RankMachine]):
    """Describe the machine of the rank."""


class CacheInt8(Command[bool]):
    """Write a checkpoint's matrices, rounded to int8, into its folder; false if they are there.

    Attributes:
        checkpoint: the folder.
    """

    model: ModelConfig
    checkpoint: str


class Deploy(Command[HeldBytes]):
    """Build the rank's stage, or keep it if only options changed. Collective over all ranks.

    Attributes:
        num_blocks, block_size: of the paged key/value cache; `block_size` positions a block.
        graphs: None where no step is to be recorded.
    """

    spec: StageSpec
    options: Options
    num_blocks: int
    block_size: int
    graphs: GraphLimits | None = None


class LeaveCores(Command[None]):
    """Be pinned to no core until another number of ranks shares them."""


class Redeploy(Command[HeldBytes]):
    """Go on in a new epoch: build what a rank lacks, connect to all others, undo some steps.

    A rank that has its stage keeps weights and cache; moves of experts under way come to nothing.
    In another layout it keeps what it has of its new stage, the cache if `Members.kept_caches`.
    A rank that has no part in it keeps its weights. Collective over all ranks.

    Attributes:
        spec: with the placements that are committed.
        num_blocks, block_size, graphs: as in `Deploy`.
        discard: steps that are not committed, of all replicas; all others are.
        dispatch_table: None where options say all.
    """

    spec: StageSpec
    options: Options
    num_blocks: int
    block_size: int
    discard: tuple[int, ...]
    dispatch_table: DispatchTable | None = None
    graphs: GraphLimits | None = None


class Prepare(Command[Prepared]):
    """Make the weights that a place of another layout needs and the rank does not have.

    They are held for the `Redeploy` to come. A rank that runs steps meanwhile is given `most_s`; it
    continues there with the next command. A rank without steps runs at a higher niceness.

    Attributes:
        place: layout rank.
        most_s: seconds after which nothing more is begun; None for all at once.
        most_bytes: the limit by free memory.
    """

    needs_epoch: ClassVar[bool] = False

    spec: StageSpec
    place: int
    most_s: float | None = None
    most_bytes: int | None = None


class DropPrepared(Command[None]):
    """Free what `Prepare` has made."""

    needs_epoch: ClassVar[bool] = False


class SetDispatch(Command[None]):
    """Choose how steps run from now on: dispatch forms and overlap, by a table."""

    table: DispatchTable


class RecordGraphs(Command[int]):
    """Record decode steps as graphs before one needs them; answers how many graphs that were.

    Collective over the ranks of a replica.

    Attributes:
        size: sequences of a data-parallel rank, padding included.
        forms: that such steps may have.
    """

    size: int
    forms: tuple[DispatchForm, ...]


class RunStep(Command[RankOutcome]):
    """Execute one step on the rank's stage.

    Attributes:
        placements: [num_hidden_layers]; of experts from this step on; None as they are.
        balances_copies: tokens are shared among copies of experts by the counts of all ranks.
    """

    step: RankStep
    placements: Placements | None = None
    balances_copies: bool = False


class DiscardSteps(Command[None]):
    """Undo these steps, as far as they have run; all others are committed."""

    steps: tuple[int, ...]


class ReadTotals(Command[RankTotals]):
    """What the rank has done since it was first asked; a rank that is not asked keeps no count."""


class SumWeights(Command[dict[str, int]]):
    """Checksums of all weights that the rank holds, by names that say the same on all ranks."""


class StartMoves(Command[float]):
    """Start to send and receive parts of experts, `Move.layer` being a hidden layer.

    The answer: seconds that it took.
    """

    parts: tuple[Part, ...]


class FinishMoves(Command[float]):
    """Wait for the parts that were started; the answer as of `StartMoves`."""


class TimeOneMove(Command[tuple[int, float, float]]):
    """Bytes of an expert, and seconds in which each rank sends one to the next of its ep group.

    Then seconds for one byte. What arrives is discarded. Collective over the ranks of a replica.
    """


class MeasureRates(Command[RankRates]):
    """The rates of a large matrix product and of reading memory."""


class MeasureOperations(Command[list[float]]):
    """Seconds of each operation, [num_points]; the median of one round's repetitions.

    All ranks begin each of them together, since they share the memory's bandwidth.

    Attributes:
        point_s: for an operation's repetitions; it is done once at least.
        num_ranks: the first ranks measure; the others wait.
    """

    points: tuple[Point, ...]
    point_s: float
    num_ranks: int


class MeasureLaunches(Command[tuple[float, float]]):
    """Seconds the host of a GPU takes to launch a kernel, and a graph of some."""


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
        num_ranks: the first ranks take part, 2 or more.
        sizes: bytes to each other rank.
    """

    num_ranks: int
    sizes: tuple[int, ...]
    point_s: float


class MeasureStep(Command[int]):
    """Run a step once in each way, and say how many bytes it took. Collective over all ranks.

    As many tokens as can be go to the first rank's experts. What the step does to cache and sampler
    is to be forgotten: another `Deploy` follows.
    """

    step: RankStep
    tables: tuple[DispatchTable, ...]
