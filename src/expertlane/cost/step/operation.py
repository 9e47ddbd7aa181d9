"""Operations and transfers of a pipeline stage in a step, as numbers.

All ranks of a stage run the same sequence and differ in sizes alone, so an operation is one entry
with an array over ranks. R = ranks of the stage, `dp · tp`, in rank order.

Below: the number types that a projected deployment computes, stores and sends in, and their bytes.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from expertlane.errors import SpecError
from expertlane.spec.deployment import INPUTS_OF_SCALE, Options, PayloadType
from expertlane.spec.hf_config import NarrowType
from expertlane.spec.names import Link, NumberType, Stage

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Amounts = Ints | Floats  # counted, or expected

OUTSIDE = -1  # in place of a layer: embedding, head, PP transfer


class OpKind(StrEnum):
    """Kinds of operation; each has its own law of time."""

    GEMM = "gemm"
    EXPERTS = "experts"  # grouped products of a rank's experts, with what is between and around
    PREFILL_ATTENTION = "prefill_attention"
    DECODE_ATTENTION = "decode_attention"  # one new token a sequence
    LATENT_PREFILL = "latent_prefill"
    LATENT_DECODE = "latent_decode"
    SPARSE = "sparse_attention"  # prompts in the latent, of positions that an indexer chose
    SPARSE_GROUPED = "sparse_grouped"  # the same of grouped queries
    COMPRESSED = "compressed_attention"  # prompts, of windows and entries, over a float8 cache
    INDEX = "index"  # an indexer's scores, of prompts
    INDEX_DECODE = "index_decode"  # one new token a sequence, over pages
    CHOOSE = "choose"  # the best of these scores
    CONVOLUTION = "convolution"  # short causal ones by channel, before a state
    GATED_DELTA_PREFILL = "gated_delta_prefill"  # new tokens through the states of their sequences
    GATED_DELTA_DECODE = "gated_delta_decode"
    KIMI_DELTA_PREFILL = "kimi_delta_prefill"
    KIMI_DELTA_DECODE = "kimi_delta_decode"
    LIGHTNING_PREFILL = "lightning_prefill"
    LIGHTNING_DECODE = "lightning_decode"
    MAMBA1_PREFILL = "mamba1_prefill"
    MAMBA1_DECODE = "mamba1_decode"
    MAMBA2_PREFILL = "mamba2_prefill"
    MAMBA2_DECODE = "mamba2_decode"
    MEMORY = "memory"  # norms, rotation, packing, sums: bytes moved


STATES = tuple(
    kind
    for kind in OpKind
    if kind.startswith(("gated_delta", "kimi_delta", "lightning", "mamba1", "mamba2"))
)
SIZES: dict[OpKind, tuple[str, ...]] = {
    OpKind.GEMM: ("m", "n", "k"),
    # token-expert pairs, experts with any, width in and out, inner width, matrices (3 if gated)
    OpKind.EXPERTS: ("pairs", "active", "hidden", "inner", "matrices"),
    # sequences, query-key pairs of one head, new tokens, positions read; all summed over sequences
    **dict.fromkeys(
        (OpKind.PREFILL_ATTENTION, OpKind.SPARSE_GROUPED),
        ("seqs", "query_key_pairs", "tokens", "positions", "heads", "kv_heads", "head_dim"),
    ),
    OpKind.DECODE_ATTENTION: ("seqs", "positions", "heads", "kv_heads", "head_dim"),
    # of latent attention: in the latent, key_dim = rank + rope and value_dim = rank; where keys and
    # values are expanded, the widths of a head
    OpKind.LATENT_PREFILL: (
        "seqs",
        "query_key_pairs",
        "tokens",
        "positions",
        "heads",
        "key_dim",
        "value_dim",
    ),
    OpKind.LATENT_DECODE: ("seqs", "positions", "heads", "key_dim", "value_dim"),
    **dict.fromkeys(
        (OpKind.SPARSE, OpKind.COMPRESSED),
        ("seqs", "query_key_pairs", "tokens", "positions", "heads", "key_dim", "value_dim"),
    ),
    # pairs that are scored, new tokens, bytes of keys and queries, scores that are written
    **dict.fromkeys(
        (OpKind.INDEX, OpKind.INDEX_DECODE),
        ("query_key_pairs", "tokens", "heads", "head_dim", "read_bytes", "scores"),
    ),
    OpKind.CHOOSE: ("query_key_pairs", "tokens", "topk"),
    OpKind.CONVOLUTION: ("seqs", "tokens", "channels", "kernel"),
    # values of a rank's state of a sequence; FLOPs of a token, and values that it moves
    **dict.fromkeys(STATES, ("seqs", "tokens", "state_values", "token_flops", "token_values")),
    OpKind.MEMORY: ("bytes",),
}


ATTENTION = (
    OpKind.PREFILL_ATTENTION,
    OpKind.DECODE_ATTENTION,
    OpKind.LATENT_PREFILL,
    OpKind.LATENT_DECODE,
    OpKind.SPARSE,
    OpKind.SPARSE_GROUPED,
    OpKind.COMPRESSED,
)
# Of mixers beside attention; no machine's own measurement has them.
OF_MIXERS = (
    OpKind.SPARSE,
    OpKind.SPARSE_GROUPED,
    OpKind.COMPRESSED,
    OpKind.INDEX,
    OpKind.INDEX_DECODE,
    OpKind.CHOOSE,
    OpKind.CONVOLUTION,
    *STATES,
)
BYTES_ALONE = (OpKind.MEMORY, OpKind.CHOOSE, OpKind.CONVOLUTION)  # counted without FLOPs


def flops_of(
    kind: OpKind, sizes: Mapping[str, npt.NDArray[Any] | float]
) -> npt.NDArray[Any] | float:
    """FLOPs of an operation, a multiply and an add counted as two; whole where its sizes are.

    Args:
        sizes: the sizes that `SIZES` names for the kind.
    """
    if kind in BYTES_ALONE:
        return 0
    if kind is OpKind.GEMM:
        return 2 * sizes["m"] * sizes["n"] * sizes["k"]
    if kind is OpKind.EXPERTS:
        return 2 * sizes["pairs"] * (sizes["hidden"] * sizes["inner"] * sizes["matrices"])
    if kind in STATES:
        return sizes["tokens"] * sizes["token_flops"]
    if kind in (OpKind.INDEX, OpKind.INDEX_DECODE):
        return 2 * sizes["query_key_pairs"] * (sizes["heads"] * sizes["head_dim"])
    assert kind in ATTENTION, kind
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

    kind: OpKind
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


# Of a value of hidden states, and of keys and values.
ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1, "int8": 1}
SCALED_VALUES = 128  # values of a float8 payload that share one float32 scale
# Of a weight with its share of the scales: float8 has a float32 for every 128 × 128 weights, NVFP4
# a byte for every 16, MXFP4 (OCP Microscaling Formats 1.0) a byte for every 32, INT4 (as Kimi-K2.5
# has it) a bfloat16 for every 32.
WEIGHT_BYTES: dict[str, float] = {
    **ITEM_BYTES,
    "float8": 1 + 4 / 128**2,
    "nvfp4": 1 / 2 + 1 / 16,
    "mxfp4": 1 / 2 + 1 / 32,
    "int4": 1 / 2 + 2 / 32,
}
# What checkpoints so quantised have in the type: of DeepSeek-V3, of NVIDIA's DeepSeek-R1-FP4, of
# gpt-oss, of Kimi-K2.5.
_QUANTISED: dict[str, tuple[str, ...]] = {
    "float8": ("attention", "mlp", "experts"),
    "int8": ("attention", "mlp", "experts"),
    "nvfp4": ("mlp", "experts"),
    "mxfp4": ("experts",),
    "int4": ("experts",),
}


def weight_bytes(num_weights: Amounts | int, number_type: str) -> Ints:
    """Bytes of weights with their scales, whole; of the shape of `num_weights`."""
    return np.ceil(np.asarray(num_weights) * WEIGHT_BYTES[number_type]).astype(np.int64)


@dataclass(frozen=True)
class NumberTypes:
    """The types of weights, of hidden states, and of keys and values.

    Where weights are narrower than activations, what checkpoints so quantised keep stays in the
    type of activations: embedding, output head and the absorbed products of latent attention;
    beside NVFP4 all of attention; beside MXFP4 and INT4 all but the experts. Router weights are
    always float32.

    Attributes:
        others: type of the matrices beside experts, where experts alone are in `weights`; None
            where it is no other narrow type.
        narrow_head: the output head has one byte per weight: it was rounded while loading.
        inputs_of_scale: inputs that share a scale in weights of one byte, in the engine's memory;
            None where scales are the checkpoint's.
        rounds_inputs: the engine rounds inputs of float8 matrices to float8 first; times that were
            measured of libraries include that.

    Raises:
        SpecError: an unknown type, or activations or a cache in a type of weights alone.
    """

    weights: str = "bfloat16"
    activations: str = "bfloat16"
    kv: str = "bfloat16"
    others: str | None = None
    narrow_head: bool = False
    inputs_of_scale: int | None = None
    rounds_inputs: bool = False

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "kv"):
            value, known = getattr(self, name), WEIGHT_BYTES if name == "weights" else ITEM_BYTES
            if value not in known:
                raise SpecError(f"type of {name} is {value!r}; valid: {', '.join(known)}")
        if ITEM_BYTES[self.activations] == 1:
            raise SpecError(
                f"activations in {self.activations} are no type of a whole model; use bfloat16"
            )

    @classmethod
    def asked(cls, weights: str, kv: str = "model") -> "NumberTypes":
        """Types by the names of `--dtype` and `--kv-dtype`; beside narrow weights bfloat16.

        Args:
            kv: `model` for that of hidden states.
        """
        activations = "bfloat16" if weights in _QUANTISED else weights
        return cls(weights, activations, activations if kv == "model" else kv)

    def narrower(self, known: Container[str]) -> "list[NumberTypes]":
        """The types with narrower weights, the widest first; keys and values stay as they are.

        Args:
            known: types that a device computes in.
        """
        widths = {each: WEIGHT_BYTES[each] for each in get_args(NumberType) if each in known}
        names = [each for each in widths if widths[each] < WEIGHT_BYTES[self.weights]]
        names.sort(key=lambda each: -widths[each])
        return [replace(self.asked(each), kv=self.kv) for each in names]

    @classmethod
    def all_of(cls, number_type: str) -> "NumberTypes":
        """One type for everything, as the engine has it unless weights have one byte."""
        return cls(number_type, number_type, number_type)

    @classmethod
    def of_engine(cls, number_type: str, options: Options) -> "NumberTypes":
        """Types of the engine where it widens weights of one byte."""
        rounds_inputs = options.activations == "float8"
        return replace(cls.asked(number_type, options.kv_dtype), rounds_inputs=rounds_inputs)

    def of_deployment(self, options: Options) -> "NumberTypes":
        """These types with a deployment's options: its own type of keys and values goes first."""
        types = self.of_engine(self.weights, options)
        return replace(types, kv=self.kv) if options.kv_dtype == "model" else types

    @classmethod
    def kept_as(
        cls, number_type: str, options: Options, stored: NarrowType | Literal["mxfp4"] | None
    ) -> "NumberTypes":
        """Types of the engine where it can keep weights of one byte.

        Args:
            stored: what most matrices of a checkpoint are in, if in one byte: they stay so. Experts
                in MXFP4 do too, unless all weights are to be rounded.
        """
        asked, types = options.weights, cls.of_engine(number_type, options)
        if stored == "mxfp4" and asked == "model":
            return replace(types, weights=stored)
        stored = None if stored == "mxfp4" else stored
        if asked == "model" and stored is None:
            return types
        return replace(
            types,
            weights=stored or asked,
            narrow_head=asked == "int8",
            inputs_of_scale=INPUTS_OF_SCALE,
        )

    @property
    def kept(self) -> str:
        """The type of weights that are not quantised."""
        return self.activations if self.weights in _QUANTISED else self.weights

    def of_part(self, part: Literal["attention", "mlp", "experts"]) -> str:
        """The type of the matrices of attention, of dense and shared MLPs, or of experts."""
        if self.others is not None:
            return self.weights if part == "experts" else self.others
        return self.weights if part in _QUANTISED.get(self.weights, (part,)) else self.kept

    @property
    def activation_bytes(self) -> int:
        """Bytes of one value of a hidden state."""
        return ITEM_BYTES[self.activations]

    @property
    def index_type(self) -> str:
        """The type that an indexer's scores are computed in: float8 beside weights as narrow."""
        is_narrow = "float8" in (self.weights, self.others) or self.weights == "nvfp4"
        return "float8" if is_narrow else self.kept

    @property
    def of_compressed(self) -> OpKind:
        """The kernel for prompts of compressed attention.

        Its own takes float8 caches alone; others go by the kernel for chosen positions.
        """
        return OpKind.COMPRESSED if self.kv == "float8" else OpKind.SPARSE

    def cached_bytes(self, num_values: int, num_rows: int) -> int:
        """Bytes of keys and values in the cache.

        Args:
            num_rows: keys and values of heads; one of float8 has a scale of one byte.
        """
        return num_values * ITEM_BYTES[self.kv] + (num_rows if self.kv == "float8" else 0)

    def __str__(self) -> str:
        kv = f", keys and values {self.kv}" if self.kv != self.activations else ""
        others = f", beside experts {self.others}" if self.others is not None else ""
        return self.weights + others + kv


@dataclass(frozen=True)
class PayloadBytes:
    """A hidden state as it is dispatched.

    Attributes:
        values: bytes of the values: payload.
        scales: bytes of their scales: metadata.
        is_narrowed: whether it is rounded before and widened after.
    """

    values: int
    scales: int
    is_narrowed: bool

    @classmethod
    def of(cls, payload: PayloadType, activation_bytes: int, hidden_size: int) -> "PayloadBytes":
        """Bytes in a payload type; hidden states as narrow already are sent as they are."""
        item = {"model": activation_bytes, "bfloat16": 2, "float8": 1, "int8": 1}[payload]
        if item >= activation_bytes:
            return cls(hidden_size * activation_bytes, 0, False)
        blocks = -(-hidden_size // SCALED_VALUES) if payload == "float8" else 0
        return cls(hidden_size * item, 4 * blocks, True)
