"""Operations and transfers of a pipeline stage in a step, as numbers.

All ranks of a stage run the same sequence and differ in sizes alone, so an operation is one entry
with an array over ranks. R = ranks of the stage, `dp · tp`, in rank order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.spec.names import Link, Stage

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Amounts = Ints | Floats  # counted, or expected

OUTSIDE = -1  # in place of a layer: embedding, head, PP transfer


class Kind(StrEnum):
    """Kinds of operation; each has its own law of time."""

    GEMM = "gemm"
    EXPERTS = "experts"  # grouped products of a rank's experts, with what is between and around
    PREFILL_ATTENTION = "prefill_attention"
    DECODE_ATTENTION = "decode_attention"  # one new token a sequence
    LATENT_PREFILL = "latent_prefill"
    LATENT_DECODE = "latent_decode"
    MEMORY = "memory"  # norms, rotation, packing, sums: bytes moved


SIZES: dict[Kind, tuple[str, ...]] = {
    Kind.GEMM: ("m", "n", "k"),
    # token-expert pairs, experts with any, width in and out, inner width, matrices (3 if gated)
    Kind.EXPERTS: ("pairs", "active", "hidden", "inner", "matrices"),
    # sequences, query-key pairs of one head, new tokens, positions read; all summed over sequences
    Kind.PREFILL_ATTENTION: (
        "seqs",
        "query_key_pairs",
        "tokens",
        "positions",
        "heads",
        "kv_heads",
        "head_dim",
    ),
    Kind.DECODE_ATTENTION: ("seqs", "positions", "heads", "kv_heads", "head_dim"),
    # of latent attention: in the latent, key_dim = rank + rope and value_dim = rank; where keys and
    # values are expanded, the widths of a head
    Kind.LATENT_PREFILL: (
        "seqs",
        "query_key_pairs",
        "tokens",
        "positions",
        "heads",
        "key_dim",
        "value_dim",
    ),
    Kind.LATENT_DECODE: ("seqs", "positions", "heads", "key_dim", "value_dim"),
    Kind.MEMORY: ("bytes",),
}


ATTENTION = (
    Kind.PREFILL_ATTENTION,
    Kind.DECODE_ATTENTION,
    Kind.LATENT_PREFILL,
    Kind.LATENT_DECODE,
)


def flops_of(kind: Kind, sizes: Mapping[str, npt.NDArray[Any] | float]) -> npt.NDArray[Any] | float:
    """FLOPs of an operation, a multiply and an add counted as two; whole where its sizes are.

    Args:
        sizes: the sizes that `SIZES` names for the kind.
    """
    if kind is Kind.MEMORY:
        return 0
    if kind is Kind.GEMM:
        return 2 * sizes["m"] * sizes["n"] * sizes["k"]
    if kind is Kind.EXPERTS:
        return 2 * sizes["pairs"] * (sizes["hidden"] * sizes["inner"] * sizes["matrices"])
    pairs = sizes["query_key_pairs" if "query_key_pairs" in sizes else "positions"]
    if "head_dim" in sizes:
        return 4 * pairs * sizes["heads"] * sizes["head_dim"]
    return 2 * pairs * sizes["heads"] * (sizes["key_dim"] + sizes["value_dim"])


@dataclass(frozen=True, eq=False)
class Operation:
    """One computation of every rank of a stage.

    Attributes:
        sizes: the sizes that `SIZES` names for its kind; each [R], or one number for all ranks.
        flops, weight_bytes, kv_bytes: [R]; counted as the engine counts them, or expected.
        num_kernels: launches where nothing is captured in a graph.
        dtype: number type where it is not that of the weights: the router's is float32.
    """

    kind: Kind
    stage: Stage
    sizes: Mapping[str, Floats | float]
    flops: Amounts
    weight_bytes: Amounts
    kv_bytes: Amounts
    num_kernels: int = 1
    dtype: str | None = None


class TransferKind(StrEnum):
    """Kinds of transfer; each has its own law of time."""

    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    ALL_TO_ALL = "all_to_all"
    SEND = "send"  # point to point


@dataclass(frozen=True, eq=False)
class Transfer:
    """One collective of every rank of a stage, in disjoint groups that cover the stage.

    Attributes:
        stage: DISPATCH, COMBINE or COLLECTIVES.
        groups: groups of all ranks; or the one rank that stands for all.
        sent_bytes: [num_kinds_of_traffic, R, R] by source and destination, zero on the diagonals;
            of one rank as `OneOfGroup.load` takes them, [num_kinds_of_traffic, num_links, S].
        num_kernels: launches where nothing is captured in a graph.
        num_steps_before_wait: number of following steps that run while it is in flight.
        syncs_host: the host needs its result, as counts that size what comes next, so it can
            launch nothing beyond it.
    """

    kind: TransferKind
    stage: Stage
    groups: "RankGroups | OneOfGroup"
    sent_bytes: Amounts
    num_kernels: int = 1
    num_steps_before_wait: int = 0
    syncs_host: bool = False

    @cached_property
    def load(self) -> "LinkLoad":
        """Bytes that every rank sends and receives over each kind of link."""
        return self.groups.load(self.sent_bytes.sum(axis=0))


class RankGroups:
    """Disjoint groups of a stage's ranks, and the nodes that they lie on.

    Args:
        group, node: [R]; equal numbers are one group, one node.

    Attributes:
        size: [R]; ranks of each rank's group.
        is_alone: whether each rank is a group of its own.
    """

    def __init__(self, group: Ints, node: Ints) -> None:
        self.group, self.node = group, node
        _, self._place, sizes = np.unique(group, return_inverse=True, return_counts=True)
        self.size: Ints = sizes[self._place]
        self.is_alone = len(sizes) == len(group)
        self._is_one = len(sizes) == 1
        self._order = np.argsort(self._place, kind="stable")
        self._starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))

    def largest(self, values: Floats) -> Floats:
        """The largest within each rank's group: from [..., R] to [..., R], or [..., 1] of one."""
        if self._is_one:
            most: Floats = np.maximum.reduce(values, axis=-1, keepdims=True)
            return most
        if self.is_alone:
            return values
        by_group = np.maximum.reduceat(values.take(self._order, -1), self._starts, axis=-1)
        return by_group.take(self._place, -1)

    @cached_property
    def is_peer(self) -> npt.NDArray[np.bool_]:
        """[R, R]; whether two different ranks share a group."""
        is_peer: npt.NDArray[np.bool_] = self.group[:, None] == self.group
        np.fill_diagonal(is_peer, val=False)
        return is_peer

    @cached_property
    def is_near(self) -> npt.NDArray[np.bool_]:
        """[R, R]; whether two ranks share a node."""
        is_near: npt.NDArray[np.bool_] = self.node[:, None] == self.node
        return is_near

    @cached_property
    def num_peers(self) -> Ints:
        """[2, R]; other ranks of the group, by `Link`."""
        num_here: Ints = self._here[1]
        return np.stack([num_here - 1, self.size - num_here])

    @cached_property
    def num_nodes(self) -> Ints:
        """[R]; nodes that a rank's group is on."""
        groups, _ = self._here
        num: Ints = np.bincount(groups, minlength=len(self._starts))[self._place]
        return num

    @cached_property
    def _here(self) -> tuple[Ints, Ints]:
        """The group of each pair of group and node; how many ranks each rank has there, [R]."""
        _, node = np.unique(self.node, return_inverse=True)
        num_nodes = int(node.max(initial=0)) + 1
        pairs, which, counts = np.unique(
            self._place * num_nodes + node, return_inverse=True, return_counts=True
        )
        return pairs // num_nodes, counts[which]

    @cached_property
    def one(self) -> "OneOfGroup":
        """The rank with most peers on other nodes."""
        rank = int(self.num_peers[Link.INTER_NODE].argmax())
        near, far = self.num_peers[:, rank].tolist()
        return OneOfGroup(near, far, int(self.num_nodes[rank]))

    def load(self, sent_bytes: Amounts) -> "LinkLoad":
        """The load of bytes [R, R], by source and destination, on the links."""
        near = sent_bytes * self.is_near
        far = sent_bytes - near
        return LinkLoad(
            out_bytes=np.array([near.sum(axis=1), far.sum(axis=1)], dtype=np.float64),
            in_bytes=np.array([near.sum(axis=0), far.sum(axis=0)], dtype=np.float64),
            num_peers=self.num_peers,
            group_size=self.size,
            num_nodes=self.num_nodes,
        )


@dataclass(frozen=True)
class OneOfGroup:
    """A rank that stands for all of a stage.

    Attributes:
        num_near, num_far: other ranks of its group, on its node and on others.
        num_nodes: nodes that the group is on.
    """

    num_near: int
    num_far: int
    num_nodes: int

    def load(self, sent_bytes: Amounts) -> "LinkLoad":
        """The load of bytes [num_links, S] sent, and as many received, in S scenarios."""
        num_bytes, num = sent_bytes.astype(np.float64), sent_bytes.shape[1]
        peers = np.array([self.num_near, self.num_far])
        return LinkLoad(
            out_bytes=num_bytes,
            in_bytes=num_bytes,
            num_peers=np.repeat(peers[:, None], num, axis=1),
            group_size=np.full(num, 1 + peers.sum()),
            num_nodes=np.full(num, self.num_nodes),
        )


@dataclass(frozen=True, eq=False)
class LinkLoad:
    """A transfer as the links see it.

    Attributes:
        out_bytes, in_bytes: [2, R]; by `Link`.
        num_peers: [2, R]; other ranks of the group, by `Link`.
        group_size: [R].
        num_nodes: [R]; nodes that the rank's group is on.
    """

    out_bytes: Floats
    in_bytes: Floats
    num_peers: Ints
    group_size: Ints
    num_nodes: Ints


@dataclass(frozen=True, eq=False)
class HandOver:
    """Hidden states sent to the same place of the next pipeline stage.

    Attributes:
        sent_bytes: [R]; counted, or expected.
        is_remote: [R]; whether the next stage's rank is on another node.
    """

    sent_bytes: Amounts
    is_remote: npt.NDArray[np.bool_]


Step = Operation | Transfer


@dataclass(frozen=True, eq=False)
class RowsByLink:
    """Rows that a rank sends to others of its group, and as many that it receives.

    Attributes:
        near, far: [S]; to ranks of its own node, and of other nodes.
    """

    near: Amounts
    far: Amounts

    @property
    def T(self) -> "RowsByLink":
        """The rows of the reverse exchange; named as an array's transpose."""
        return self
