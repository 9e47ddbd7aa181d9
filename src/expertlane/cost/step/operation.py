"""What a pipeline stage computes and sends in a step, as numbers: operations and transfers.

All ranks of a stage run the same sequence and differ in sizes alone, so an operation is one entry
with an array over ranks. R = ranks of the stage, `dp · tp`, in rank order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from expertlane.spec.names import Stage

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Amounts = Ints | Floats  # counted, or expected

OUTSIDE = -1  # in place of a layer: embedding, head, hand-over


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
    # the same in the latent: key_dim = rank + rope, value_dim = rank
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


@dataclass(frozen=True, eq=False)
class Operation:
    """One computation of every rank of a stage.

    Attributes:
        layer: hidden layer, or `OUTSIDE`.
        sizes: those that `SIZES` names for its kind; each [R], or one number for all ranks.
        flops, weight_bytes, kv_bytes: [R]; counted as the engine counts them, or expected.
        num_kernels: launches where nothing is captured in a graph.
        dtype: of its numbers, where it is not that of the weights: the router's is float32.
    """

    kind: Kind
    stage: Stage
    layer: int
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
        layer: hidden layer, or `OUTSIDE`.
        group: [R]; equal numbers are one group.
        node: [R]; the node of each rank.
        sent_bytes: [num_kinds_of_traffic, R, R]; source, destination; zero on the diagonals.
        num_kernels: launches where nothing is captured in a graph.
        num_steps_before_wait: how many of the steps that follow run while it is under way.
        syncs_host: the host needs its result, as counts that size what comes next, so it can
            launch nothing beyond it.
        neighbours: what follows from `group` and `node`, where transfers share it.
    """

    kind: TransferKind
    stage: Stage
    layer: int
    group: Ints
    node: Ints
    sent_bytes: Ints
    num_kernels: int = 1
    num_steps_before_wait: int = 0
    syncs_host: bool = False
    neighbours: "Neighbours | None" = None

    @cached_property
    def load(self) -> "LinkLoad":
        """What every rank sends and receives over each kind of link."""
        neighbours = self.neighbours or Neighbours(self.group, self.node)
        return neighbours.load(self.sent_bytes.sum(axis=0))


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Groups and nodes of a transfer, and what follows from them whatever is sent.

    Attributes:
        group, node: [R]; as a transfer's.
    """

    group: Ints
    node: Ints

    @cached_property
    def is_near(self) -> npt.NDArray[np.bool_]:
        """[R, R]; whether two ranks share a node."""
        is_near: npt.NDArray[np.bool_] = self.node[:, None] == self.node
        return is_near

    @cached_property
    def num_peers(self) -> Ints:
        """[2, R]; other ranks of the group, by `Link`."""
        is_peer = (self.group[:, None] == self.group) & ~np.eye(len(self.group), dtype=bool)
        peers: Ints = np.stack([is_peer & self.is_near, is_peer & ~self.is_near]).sum(axis=2)
        return peers

    @cached_property
    def num_nodes(self) -> Ints:
        """[R]; nodes that a rank's group is on."""
        in_group = (self.group[:, None] == self.group).astype(np.int64)
        is_on_node = (self.node[:, None] == np.unique(self.node)).astype(np.int64)
        num: Ints = np.count_nonzero(in_group @ is_on_node, axis=1)
        return num

    @cached_property
    def group_size(self) -> Ints:
        """[R]."""
        size: Ints = self.num_peers.sum(axis=0) + 1
        return size

    def load(self, sent_bytes: Ints) -> "LinkLoad":
        """Of bytes [R, R] by source and destination."""
        near = sent_bytes * self.is_near
        far = sent_bytes - near
        return LinkLoad(
            out_bytes=np.array([near.sum(axis=1), far.sum(axis=1)], dtype=np.float64),
            in_bytes=np.array([near.sum(axis=0), far.sum(axis=0)], dtype=np.float64),
            num_peers=self.num_peers,
            group_size=self.group_size,
            num_nodes=self.num_nodes,
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

    @classmethod
    def of(cls, sent_bytes: Ints, group: Ints, node: Ints) -> "LinkLoad":
        """From bytes [R, R] by source and destination."""
        return Neighbours(group, node).load(sent_bytes)


@dataclass(frozen=True, eq=False)
class HandOver:
    """Hidden states that go to the same place of the next pipeline stage.

    Attributes:
        sent_bytes: [R].
        is_remote: [R]; whether the next stage's rank is on another node.
    """

    sent_bytes: Ints
    is_remote: npt.NDArray[np.bool_]


Step = Operation | Transfer


@dataclass(frozen=True, eq=False)
class RowsByLink:
    """Rows that one rank sends to others of its group, and as many that it receives.

    Attributes:
        near, far: [S]; on its own node, and on other nodes.
    """

    near: Amounts
    far: Amounts

    @property
    def T(self) -> "RowsByLink":
        """The same rows on their way back; named as an array's."""
        return self


@dataclass(frozen=True, eq=False)
class ExpectedTransfer:
    """A collective as one rank of its group sees it, in S scenarios; priced as a `Transfer`.

    Attributes:
        sent_bytes: [num_kinds_of_traffic, num_links, S]; as many are received.
        num_peers: [num_links]; other ranks of the group.
        num_nodes: that the group is on.
    """

    kind: TransferKind
    stage: Stage
    sent_bytes: Floats
    num_peers: tuple[int, int]
    num_nodes: int
    num_kernels: int

    @cached_property
    def load(self) -> LinkLoad:
        """What the rank sends and receives over each kind of link."""
        num_bytes = self.sent_bytes.sum(axis=0)
        num = num_bytes.shape[1]
        return LinkLoad(
            out_bytes=num_bytes,
            in_bytes=num_bytes,
            num_peers=np.repeat(np.array(self.num_peers)[:, None], num, axis=1),
            group_size=np.full(num, 1 + sum(self.num_peers)),
            num_nodes=np.full(num, self.num_nodes),
        )


AnyTransfer = Transfer | ExpectedTransfer
