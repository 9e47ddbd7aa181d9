"""Writers of a layer's steps: operations and transfers with their counts, for a set of kernels.

What is counted (FLOPs, bytes, collectives) is what the engine counts with `ENGINE` and
`ENGINE_ON_GPUS`, which differ in numbers of launches alone. With `GPU_LIBRARIES`, an estimate, it
differs where those do otherwise: `counts_first`, `expands_all`, `merges_products`, `dummy_batches`
and `reduces_to_all`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertlane.cost.step.batch_sizes import TokenSizes
from expertlane.cost.step.counts import Axis, Exchange, StageMesh
from expertlane.cost.step.operation import (
    ITEM_BYTES,
    Amounts,
    Floats,
    Ints,
    NumberTypes,
    OneOfGroup,
    Operation,
    OpKind,
    RankGroups,
    RowsByLink,
    Step,
    Transfer,
    TransferKind,
    flops_of,
    weight_bytes,
)
from expertlane.spec.deployment import DispatchForm, form_on
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage


@dataclass(frozen=True)
class KernelSet:
    """Numbers of kernel launches outside graphs, and what libraries' kernels do at once.

    The default numbers are read off the engine's tensor operations.

    Attributes:
        name: source of the kernels.
        assumed: words for it in a projection's assumptions.
        why: where its numbers are from, for the table of assumptions.
        norm, widened_norm: a norm in float32, and in a type that is widened for it.
        residual: attention's sum added to its input, where no product or norm does that.
        rotate, write: rotation of queries and keys; new keys and values to the cache.
        head_norm: norm of queries and keys, each head by itself.
        squares, scale: the two halves of a norm over the heads of all ranks.
        decode_group, prefill_group: attention of sequences taken as one: gather, mask, attend.
        latent: joining queries and keys of latent attention, beside the rotation.
        is_grouped: attention is called for each such group, not once for all.
        activation, gate: activation of an MLP; a shared expert's gate.
        route, scored_route, grouped_route: top-k of logits; with scores; with groups of experts.
        choose, by_peer, by_expert: copies chosen; rows sorted by peer; pairs sorted by expert.
        share: kernels, one after the other, that share counts of pairs among copies, where that is
            asked for. None of a library is measured: it is taken to search step by step.
        pack, narrow, widen: packing of rows to send, and rounding and restoring their payload.
        round_inputs: a product's inputs rounded to float8, where that is asked for.
        sum_term, sum_once: a sum of rows: for every term, and once.
        expert, experts_once: an active expert beside its products, and all of them together.
        expert_product: each product of an active expert.
        embed, last, argmax, best: at the model's two ends.
        gathered, reduced: packing and summing of rows around collectives.
        counts_first: dispatch tells numbers of rows, in a transfer of its own, before it sends any.
            Kernels with buffers of a static size need not, and can be captured in a graph; others
            tell them inside dispatch, in the time that it was measured with.
        kernels_move: dispatch and combine, and the experts' products, pack, sort and sum rows
            themselves, in the times that they were measured with.
        expands_all: all prompts attend to keys and values of each head, made from the latent; else
            those for which that takes fewer FLOPs.
        merges_products: products of the same input are one: an MLP's gate and up, and queries and
            keys of latent attention on their way to what is narrow.
        dummy_batches: a data-parallel rank without requests computes one token at the first
            position in every step of its replica, as serving engines' do; else it has none.
        reduces_to_all: a tensor-parallel group adds up by all-reduce, and all its ranks norm and
            route all tokens, where it is the whole stage and no token is sent to its expert; else
            each rank owns a part of the tokens, scattered and gathered again.
        normed_bytes: of hidden states, up to which such an all-reduce norms what it adds up, in
            its own time.
        least_sparse_heads: heads that attention of prompts to chosen positions computes at least.
    """

    name: str
    assumed: str
    why: str
    norm: int = 1
    widened_norm: int = 3
    residual: int = 1
    rotate: int = 7
    write: int = 4
    head_norm: int = 4
    squares: int = 8
    scale: int = 12
    decode_group: int = 8
    prefill_group: int = 6
    latent: int = 0
    is_grouped: bool = True
    activation: int = 2
    gate: int = 3
    route: int = 4
    scored_route: int = 6
    grouped_route: int = 14
    choose: int = 3
    by_peer: int = 18
    by_expert: int = 20
    share: int = 1
    pack: int = 4
    narrow: int = 9
    widen: int = 4
    round_inputs: int = 16
    sum_term: int = 9
    sum_once: int = 2
    expert: int = 3
    expert_product: int = 1
    experts_once: int = 1
    embed: int = 2
    last: int = 2
    argmax: int = 4
    best: int = 4
    gathered: int = 2
    reduced: int = 2
    counts_first: bool = True
    kernels_move: bool = False
    expands_all: bool = False
    merges_products: bool = False
    dummy_batches: bool = False
    reduces_to_all: bool = False
    normed_bytes: int = 0
    least_sparse_heads: int = 1

    def keeps_all(self, layout: Layout, form: DispatchForm) -> bool:
        """True if every rank of a stage holds all tokens' hidden states between operations."""
        return self.reduces_to_all and layout.dp == 1 and form_on(layout, form) == "all_gather"


ENGINE = KernelSet("the engine's tensor operations", "the engine's", "as measured on this machine")

# Of kernels that do at once what tensor operations do one by one.
_FUSED: dict[str, Any] = {
    "widened_norm": 1,
    "rotate": 1,
    "decode_group": 2,
    "prefill_group": 1,
    "is_grouped": False,
    "activation": 1,
    "scored_route": 2,
    "grouped_route": 2,
    "round_inputs": 1,
    "sum_term": 0,
    "sum_once": 1,
    "expert": 0,
    "expert_product": 0,
}

# Read off `engine/ops/cuda`, and off torch's operations for what it leaves to them: packing,
# norms over the heads of all ranks, the choice of tokens.
ENGINE_ON_GPUS = KernelSet(
    "the engine's kernels on GPUs",
    "the engine's own",
    "Triton kernels and torch's operations, as measured on this card (docs/gpu.md)",
    **_FUSED | {"scored_route": 6, "grouped_route": 14},
    residual=0,
    head_norm=1,
    latent=10,
    experts_once=7,
    last=4,
    argmax=6,
)

# Of GPU libraries, which fuse what the engine does in many tensor operations; an estimate.
GPU_LIBRARIES = KernelSet(
    "GPU libraries",
    "fused as in GPU libraries; an estimate",
    "the engine has such for attention, norms and experts; it dispatches by more and smaller ones",
    **_FUSED,
    write=1,
    head_norm=1,
    squares=1,
    scale=1,
    gate=2,
    route=1,
    choose=1,
    by_peer=1,
    by_expert=2,
    share=16,
    pack=1,
    narrow=1,
    widen=0,
    experts_once=5,
    embed=1,
    last=1,
    argmax=2,
    best=1,
    gathered=1,
    reduced=1,
    counts_first=False,
    kernels_move=True,
    expands_all=True,
    merges_products=True,
    dummy_batches=True,
    reduces_to_all=True,
    normed_bytes=2**19,  # of vLLM on compute capability 9.0, the least of all its limits
    least_sparse_heads=64,
)

KERNEL_SETS = (ENGINE, ENGINE_ON_GPUS, GPU_LIBRARIES)


class StepWriter(ABC):
    """Writes steps down; subclasses decide over how many ranks or scenarios.

    Args:
        form: the deployment's dispatch form; on few ranks it may come down to another.
        tp_rank, etp_rank: [A]; of the ranks.

    Attributes:
        keeps_all: see `KernelSet.keeps_all`.
        steps: written so far.
    """

    def __init__(
        self,
        mesh: StageMesh,
        types: NumberTypes,
        kernels: KernelSet,
        form: DispatchForm,
        tp_rank: Ints,
        etp_rank: Ints,
    ) -> None:
        self.mesh = mesh
        self.types = types
        self.kernels = kernels
        self.form = form
        self.keeps_all = kernels.keeps_all(mesh.layout, form)
        self.tp_rank, self.etp_rank = tp_rank, etp_rank
        self.steps: list[Step] = []
        self.transfer_kernels = {
            TransferKind.ALL_GATHER: kernels.gathered,
            TransferKind.REDUCE_SCATTER: kernels.reduced,
            TransferKind.ALL_REDUCE: 1,
            TransferKind.ALL_TO_ALL: 1,
        }
        self._none: Ints = np.zeros(len(tp_rank), dtype=np.int64)

    @property
    def norm_kernels(self) -> int:
        """Launches of one norm of hidden states."""
        is_wide = self.types.activations == "float32"
        return self.kernels.norm if is_wide else self.kernels.widened_norm

    def gemm(
        self,
        stage: Stage,
        m: Amounts,
        n: Amounts | int,
        k: Amounts | int,
        *,
        dtype: str | None = None,
        num_kernels: int = 1,
    ) -> None:
        """A product [m, k] · [k, n]; sizes of all ranks, [A] or one number.

        Args:
            dtype: number type of the weights, if not that of attention's, or of an MLP's.
        """
        if dtype is None:
            dtype = self.types.of_part("attention" if stage is Stage.ATTENTION else "mlp")
        num_weights = np.asarray(n) * np.asarray(k)
        if dtype == "float8":
            self.round_inputs(stage, m * np.asarray(k))
        self.operation(
            OpKind.GEMM,
            stage,
            {"m": m, "n": n, "k": k},
            weight_bytes=(m > 0) * weight_bytes(num_weights, dtype),
            num_kernels=num_kernels,
            dtype=dtype,
        )

    def round_inputs(self, stage: Stage, num_values: Amounts, num_times: int = 1) -> None:
        """Round inputs of float8 matrices to float8, where the engine does that."""
        if self.types.rounds_inputs:
            num_bytes = num_values * (self.types.activation_bytes + ITEM_BYTES["float8"])
            self.memory(stage, num_bytes, num_times * self.kernels.round_inputs)

    def by_token(
        self, stage: Stage, part: TokenSizes, row_bytes: int, num_passes: int, num_kernels: int = 1
    ) -> None:
        """Passes over the hidden states that a rank has: a norm, or a sum with the residual.

        Leaves out passes over hidden states so few that the all-reduce norms them.
        """
        num_bytes = self.held(part) * row_bytes
        if self.keeps_all:
            num_bytes = np.where(num_bytes <= self.kernels.normed_bytes, 0, num_bytes)
            num_kernels *= int(num_bytes.any())
        self.memory(stage, num_passes * num_bytes, num_kernels)

    def held(self, part: TokenSizes) -> Ints:
        """[A]; tokens whose hidden states a rank has."""
        return part.tokens if self.keeps_all else part.owned

    def memory(self, stage: Stage, num_bytes: Amounts, num_kernels: int = 1) -> None:
        """Bytes [A] read and written, by an operation without FLOPs."""
        self.operation(OpKind.MEMORY, stage, {"bytes": num_bytes}, num_kernels=num_kernels)

    def operation(
        self,
        kind: OpKind,
        stage: Stage,
        sizes: Mapping[str, Amounts | int],
        *,
        weight_bytes: Amounts | None = None,
        kv_bytes: Amounts | None = None,
        num_kernels: int = 1,
        dtype: str | None = None,
    ) -> None:
        """Write any other operation; bytes left out are zeros."""
        self.steps.append(
            Operation(
                kind=kind,
                stage=stage,
                sizes={name: _floats(size) for name, size in sizes.items()},
                flops=self._none + flops_of(kind, sizes),
                weight_bytes=self._none if weight_bytes is None else weight_bytes,
                kv_bytes=self._none if kv_bytes is None else kv_bytes,
                num_kernels=num_kernels,
                dtype=dtype,
            )
        )

    def all_gather(
        self,
        stage: Stage,
        axis: Axis,
        rows: Amounts,
        payload: Ints | int,
        metadata: Ints | int = 0,
        *,
        capacity: Amounts | None = None,
        num_steps_before_wait: int = 0,
    ) -> None:
        """Every rank sends its `rows` [A] to all of its group.

        Args:
            payload, metadata: bytes of a row; [A] or one number.
            capacity: rows [A] that are sent, of which those beyond `rows` are padding.
        """
        kind, to_all = TransferKind.ALL_GATHER, self.to_all(axis, rows)
        padding = None if capacity is None else self.to_all(axis, capacity - rows)
        self._transfer(
            *(kind, stage, axis, to_all, payload, metadata, num_steps_before_wait), padding=padding
        )

    def reduce_scatter(
        self,
        stage: Stage,
        axis: Axis,
        rows: Amounts,
        payload: int,
        *,
        capacity: Amounts | None = None,
    ) -> None:
        """Every rank gets the sum of its `rows` [A] over its group.

        Args:
            capacity: as for `all_gather`.
        """
        from_all = self.to_all(axis, rows).T
        padding = None if capacity is None else self.to_all(axis, capacity - rows).T
        kind = TransferKind.REDUCE_SCATTER
        self._transfer(kind, stage, axis, from_all, payload, padding=padding)

    def all_reduce(self, stage: Stage, axis: Axis, rows: Amounts, payload: int) -> None:
        """Every rank gets the sums of all rows: reduces its `rows` [A], and sends them to all."""
        both_ways = _both_ways(self.to_all(axis, rows))
        self._transfer(TransferKind.ALL_REDUCE, stage, axis, both_ways, payload)

    def gather_tokens(self, rows: Amounts, row_bytes: int) -> None:
        """Gather the `rows` [A] that each rank of a tensor-parallel group owns to all of it."""
        if not self.keeps_all:
            self.all_gather(Stage.COLLECTIVES, "tp", rows, row_bytes)

    def sum_tokens(self, stage: Stage, axis: Axis, rows: Amounts, row_bytes: int) -> None:
        """Sum hidden states over a group, whose ranks own `rows` [A] each."""
        add_up = self.all_reduce if self.keeps_all else self.reduce_scatter
        add_up(stage, axis, rows, row_bytes)

    def all_to_all(
        self,
        stage: Stage,
        axis: Axis,
        rows: Exchange,
        payload: int,
        metadata: int = 0,
        *,
        capacity: Exchange | None = None,
        tells_counts: bool = False,
    ) -> None:
        """Every rank sends rows of its own to each of its group.

        Args:
            capacity: rows that are sent; those beyond `rows` are padding.
            tells_counts: the host learns numbers of rows from it, and waits for them.
        """
        padding = None if capacity is None else _beyond(capacity, rows)
        self._transfer(
            *(TransferKind.ALL_TO_ALL, stage, axis, rows, payload, metadata),
            tells_counts=tells_counts,
            padding=padding,
        )

    def _transfer(
        self,
        kind: TransferKind,
        stage: Stage,
        axis: Axis,
        rows: Exchange,
        payload: Ints | int,
        metadata: Ints | int = 0,
        num_steps_before_wait: int = 0,
        *,
        tells_counts: bool = False,
        padding: Exchange | None = None,
    ) -> None:
        """Write a transfer; none in groups of one rank, as in the engine."""
        groups = self.mesh.groups(axis)
        if groups.is_alone:
            return
        of_ranks, sent_bytes = self._sent(groups, rows, (payload, metadata, 0))
        if padding is not None:
            sent_bytes = sent_bytes + self._sent(groups, padding, (0, 0, payload + metadata))[1]
        self.steps.append(
            Transfer(
                kind=kind,
                stage=stage,
                groups=of_ranks,
                sent_bytes=sent_bytes,
                num_kernels=self.transfer_kernels[kind],
                num_steps_before_wait=num_steps_before_wait,
                syncs_host=tells_counts or num_steps_before_wait > 0,  # which sizes what follows
            )
        )

    @abstractmethod
    def to_all(self, axis: Axis, rows: Amounts) -> Exchange:
        """The exchange in which every rank sends `rows` [A] to each of its group."""

    @abstractmethod
    def _sent(
        self, groups: RankGroups, rows: Exchange, row_bytes: Sequence[Ints | int]
    ) -> tuple[RankGroups | OneOfGroup, Amounts]:
        """A transfer's `groups` and `sent_bytes`, from the bytes of a row by `Traffic`."""


class StepList(StepWriter):
    """Steps of all ranks of a stage; arrays over ranks."""

    def __init__(
        self, mesh: StageMesh, types: NumberTypes, form: DispatchForm, kernels: KernelSet = ENGINE
    ) -> None:
        super().__init__(mesh, types, kernels, form, mesh.tp_rank, mesh.etp_rank)

    def to_all(self, axis: Axis, rows: Amounts) -> Exchange:
        """[A, 1]; rows of each source, the same to every destination."""
        return rows[:, None]

    def _sent(
        self, groups: RankGroups, rows: Exchange, row_bytes: Sequence[Ints | int]
    ) -> tuple[RankGroups, Amounts]:
        assert isinstance(rows, np.ndarray), "between each pair of ranks"
        rows = rows * groups.is_peer
        return groups, np.stack([rows * np.reshape(each, (-1, 1)) for each in row_bytes])


class ExpectedStepList(StepWriter):
    """Steps of one rank that stands for all of a stage; arrays over `size` scenarios.

    It has the longest shares: its tp and etp ranks are 0.
    """

    def __init__(
        self,
        mesh: StageMesh,
        size: int,
        types: NumberTypes,
        form: DispatchForm,
        kernels: KernelSet,
    ) -> None:
        first = np.zeros(size, dtype=np.int64)
        super().__init__(mesh, types, kernels, form, first, first)
        self.size = size

    def to_all(self, axis: Axis, rows: Amounts) -> Exchange:
        """Rows of the one rank to the others of its group, by link."""
        one = self.mesh.groups(axis).one
        return RowsByLink(rows * one.num_near, rows * one.num_far)

    def _sent(
        self, groups: RankGroups, rows: Exchange, row_bytes: Sequence[Ints | int]
    ) -> tuple[OneOfGroup, Amounts]:
        assert isinstance(rows, RowsByLink), "of one rank"
        by_link = rows.near, rows.far
        sent = [[each * num_bytes for each in by_link] for num_bytes in row_bytes]
        return groups.one, np.array(sent)


def _both_ways(rows: Exchange) -> Exchange:
    """Twice the rows, or rows and their reverse: there and back."""
    if isinstance(rows, RowsByLink):
        return RowsByLink(2 * rows.near, 2 * rows.far)
    return rows + rows.T


def _beyond(capacity: Exchange, rows: Exchange) -> Exchange:
    """Padding: capacity beyond the rows, 0 where the busiest rank is expected to have more."""
    if isinstance(capacity, RowsByLink):
        assert isinstance(rows, RowsByLink), "of one rank, as the other"
        near, far = capacity.near - rows.near, capacity.far - rows.far
        return RowsByLink(np.maximum(near, 0), np.maximum(far, 0))
    assert not isinstance(rows, RowsByLink), "of all ranks, as the other"
    return capacity - rows


def _floats(size: Amounts | int) -> Floats | float:
    return size.astype(np.float64) if isinstance(size, np.ndarray) else float(size)
