"""Shared names: number types, stages of a rank, parts of a step's time, instruction sets."""

from enum import IntEnum, StrEnum
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]  # of weights and activations

# Of a projection: types of weights and of keys and values, and how a GPU's kernels are launched.
NumberType = Literal[Dtype, "float8", "nvfp4", "mxfp4", "int4"]
CacheType = Literal["model", Dtype, "float8"]
GpuExecution = Literal["graph", "eager"]

# Of instructions that our CPU kernels are compiled for; `engine/ops/build.py` says what each has.
CpuIsa = Literal["baseline", "avx2", "avx512", "avx512_bf16", "amx", "neon", "neon_bf16"]

OnFailure = Literal["replace", "shrink", "stop"]  # of a rank that died, hung or failed

EngineName = Literal["vllm", "sglang", "trtllm", "expertlane"]  # that serve a deployment

_LABELS = {"COLLECTIVES": "TP collectives", "HAND_OVER": "PP send/recv"}


class _LabelEnum(IntEnum):
    @property
    def label(self) -> str:
        """The name as a user reads it, for example `PP send/recv`."""
        return _LABELS.get(self.name) or self.name.lower().replace("_", "-")


class Stage(_LabelEnum):
    """Stages of a rank's work; the index of a column in every per-stage array."""

    IDLE = 0  # waiting for the next plan
    EMBED = 1
    ATTENTION = 2
    ROUTER = 3
    DISPATCH = 4  # counts, packing and sending tokens to the ranks of their experts
    EXPERTS = 5
    COMBINE = 6  # returning expert outputs and summing them
    COLLECTIVES = 7  # tensor-parallel all-gather, reduce-scatter and argmax exchange
    HAND_OVER = 8  # activations from one pipeline stage to the next
    HEAD = 9
    SETUP = 10  # building groups and weights; never part of a step
    GRAPH = 11  # a whole decode step as one launch; never part of a record


class Track(StrEnum):
    """Busy resources of a rank; the rows of a trace."""

    COMPUTE = "compute"
    NETWORK = "network"
    COPY = "copy"  # keys and values, or weights, that move in the background
    DESCHEDULED = "descheduled"  # ready, but other ranks had the cores


class Origin(StrEnum):
    """Source of a rank's weights, the fastest first."""

    KEPT = "kept"  # from its stage in the previous layout
    AHEAD = "ahead"  # loaded while the previous layout still ran
    COPIED = "copied"  # sent by another rank
    READ = "read"  # from a checkpoint, or drawn


class Phase(StrEnum):
    """Phase of a request's work that a step does."""

    PREFILL = "prefill"
    DECODE = "decode"


class Cause(StrEnum):
    """Causes of a measured step's time; the rows of every *why* table."""

    ATTENTION = "attention"
    ROUTER = "router"
    EXPERTS = "experts"
    HEAD = "embedding and head"
    DISPATCH_COMBINE = "dispatch and combine"
    TP_COLLECTIVES = "TP collectives"
    HAND_OVER = "PP send/recv"
    WAITING = "waiting for other ranks"
    PIPELINE_BUBBLE = "pipeline bubble"
    ENGINE = "scheduler overhead"


class Gap(StrEnum):
    """Time in which a rank neither computes nor transfers nor waits for another."""

    IDLE = "idle"  # it has nothing to do
    DESCHEDULED = "descheduled"  # it has, but other ranks have the cores


class ProjectedCause(StrEnum):
    """Causes of a modelled step's time.

    Unlike `Cause`, which has what a rank's clock can tell apart: a model knows why an operation
    takes its time, too, and what launches and contention add to it.
    """

    EXPERT_COMPUTE = "expert compute"
    OTHER_COMPUTE = "other compute"
    WEIGHT_READS = "weight reads"
    KV_READS = "KV reads"
    DISPATCH_COMBINE = "exposed dispatch and combine"
    TP_COLLECTIVES = "TP collectives"
    CONTENTION = "compute slowed by transfers"
    HAND_OVER = "PP send/recv"
    PIPELINE_BUBBLE = "pipeline bubble"
    IMBALANCE = "waiting for slower ranks"
    LAUNCH = "kernel launch"
    ENGINE = "scheduler overhead"


class Traffic(_LabelEnum):
    """Content of the bytes on a link."""

    PAYLOAD = 0  # hidden states
    METADATA = 1  # counts, expert ids, router weights, argmax candidates
    PADDING = 2  # rows that only fill a static shape


class Link(_LabelEnum):
    """Kind of a link."""

    INTRA_NODE = 0
    INTER_NODE = 1


# How much ranks look for silent errors in every step: nothing; that values are finite and that
# what is replicated is alike; also that every transfer and every token-expert pair arrives once.
CheckLevel = Literal["off", "light", "full"]


class CheckPoint(_LabelEnum):
    """Places in a step that are checked for silent errors, in the order of a layer."""

    PLACEMENT = 0
    EMBEDDING = 1
    BEFORE_ATTENTION = 2  # hidden states gathered over a tensor-parallel group
    ATTENTION = 3  # a rank's own part
    AFTER_ATTENTION = 4  # summed over the group, with what went in
    ROUTER = 5
    DISPATCH = 6
    EXPERTS = 7
    COMBINE = 8
    BEFORE_MLP = 9  # a dense layer's or a shared expert's
    MLP = 10
    AFTER_MLP = 11
    HAND_OVER = 12  # hidden states for the next pipeline stage
    HEAD = 13
    TOKENS = 14  # that are chosen
    SAMPLER = 15  # its counts
