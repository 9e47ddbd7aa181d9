"""Routing traces in files, and two placements compared on one."""

import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from expertlane.balance.copies import num_equal_before
from expertlane.balance.placement import (
    Placement,
    between_ranks,
    max_over_mean,
    moves,
    rank_loads,
    total_max_over_mean,
)
from expertlane.errors import SpecError, UserError, naming
from expertlane.spec.files import TRACE_BYTES, check_regular, write_whole
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import RANGES, shown, take

SCHEMA_VERSION = 1
_KEYS = ("schema_version", "model", "num_experts", "layers", "topk_ids", "step")
# NumPy reads an array's header as Python's syntax.
DAMAGED_ARRAY = (ValueError, TypeError, EOFError, SyntaxError, TokenError)
_DAMAGED = (zipfile.BadZipFile, zlib.error, RuntimeError, struct.error, *DAMAGED_ARRAY)

Step = tuple[int, Sequence[Mapping[int, npt.NDArray[np.integer]]]]


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The router's choices of some steps of a model.

    Attributes:
        model: its name.
        num_experts: logical experts of a layer.
        layers: the MoE layers' indices among the hidden layers, ascending.
        topk_ids: [num_layers, num_tokens, num_experts_per_tok], int16 or int32; tokens in the
            order in which they were computed. There may be none.
        step: [num_tokens]; the step in which each was computed, never falling.

    Raises:
        SpecError: shapes that do not fit, an expert that is none, or one chosen twice by a token.
    """

    model: str
    num_experts: int
    layers: tuple[int, ...]
    topk_ids: npt.NDArray[np.int16] | npt.NDArray[np.int32]
    step: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        ids = self.topk_ids
        take("num_experts", self.num_experts, "trace: num_experts")
        for layer in self.layers:
            RANGES["layer"].take("trace: layers", layer, "holds")
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise SpecError("trace: layers must be indices of hidden layers, one or more, rising")
        if ids.ndim != 3 or ids.dtype not in (np.int16, np.int32):
            raise SpecError(
                f"trace: topk_ids is {ids.dtype} of shape {ids.shape}; it must be int16 or int32, "
                "[num_layers, num_tokens, num_experts_per_tok]"
            )
        if len(ids) != len(self.layers):
            raise SpecError(f"trace: {len(self.layers)} layers, but topk_ids of {len(ids)}")
        if self.step.shape != ids.shape[1:2] or self.step.dtype.kind != "i":
            raise SpecError(
                f"trace: step is {self.step.dtype} of shape {self.step.shape}; it must be integer, "
                f"one for each of the {ids.shape[1]} tokens"
            )
        if (np.diff(self.step) < 0).any():
            raise SpecError("trace: step falls; tokens must stand in the order of their steps")
        self._check_ids()

    def _check_ids(self) -> None:
        ids = self.topk_ids
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise SpecError(
                f"trace: {self.num_experts_per_tok} experts per token; "
                f"valid: 1 to {self.num_experts}"
            )
        if not ids.size:
            return
        for wrong in (ids.min(), ids.max()):
            if not 0 <= wrong < self.num_experts:
                raise SpecError(
                    f"trace: a token chose expert {wrong}; "
                    f"there are experts 0 to {self.num_experts - 1}"
                )
        if (np.diff(np.sort(ids, axis=-1), axis=-1) == 0).any():
            raise SpecError("trace: a token chose an expert twice")

    @classmethod
    def of_steps(cls, model: ModelConfig, layers: Sequence[int], steps: Iterable[Step]) -> Self:
        """The trace of some steps, put in order.

        Args:
            layers: layers with choices.
            steps: their numbers, and parts that are joined in the order given: by layer, the
                choices of some tokens, [num_tokens, num_experts_per_tok].

        Raises:
            ValueError: in some step the layers differ in their number of tokens.
        """
        steps = sorted(steps, key=itemgetter(0))
        nothing = np.zeros((0, model.num_experts_per_tok), dtype=np.int16)
        columns = [np.stack([nothing] * len(layers))]
        for _, parts in steps:
            of_layers = [[part[layer] for part in parts if layer in part] for layer in layers]
            columns.append(np.stack([np.concatenate([nothing, *each]) for each in of_layers]))
        numbers = np.array([step for step, _ in steps], dtype=np.int64)
        return cls(
            model.name,
            model.num_experts,
            tuple(layers),
            np.concatenate(columns, axis=1).astype(np.int16),
            np.repeat(numbers, [each.shape[1] for each in columns[1:]]),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens in the trace."""
        return int(self.topk_ids.shape[1])

    @property
    def num_experts_per_tok(self) -> int:
        """Experts that a token chooses in a layer."""
        return int(self.topk_ids.shape[2])

    def load(self) -> npt.NDArray[np.int64]:
        """[num_layers, num_experts]; how many tokens chose each expert."""
        return np.stack(
            [np.bincount(ids.ravel(), minlength=self.num_experts) for ids in self.topk_ids]
        )


def write_trace(trace: RoutingTrace, path: Path) -> None:
    """Write a trace as a compressed `.npz`, under exactly the name given.

    Raises:
        UserError: the folder can't be written to.
    """
    write_whole(
        path,
        lambda file: np.savez_compressed(
            file,
            schema_version=np.array(SCHEMA_VERSION),
            model=np.array(trace.model),
            num_experts=np.array(trace.num_experts),
            layers=np.array(trace.layers, dtype=np.int64),
            topk_ids=trace.topk_ids,
            step=trace.step,
        ),
    )


def read_trace(path: Path) -> RoutingTrace:
    """Read what `write_trace` wrote.

    Raises:
        UserError: the file is missing, damaged or of another kind or schema version, or breaks a
            rule of a trace; one line that names the file.
    """
    check_regular(path, TRACE_BYTES)
    try:
        with zipfile.ZipFile(path) as archive:
            found = _arrays(path, archive)
    except _DAMAGED as error:
        raise UserError(f"{path} is not a routing trace, or is damaged") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    with naming(path):
        return _parse(found)


def _arrays(path: Path, archive: zipfile.ZipFile) -> dict[str, npt.NDArray[Any]]:
    """All arrays; none is made before it is known how large it is, packed or not."""
    names = set(archive.namelist())
    if missing := [key for key in _KEYS if f"{key}.npy" not in names]:
        raise UserError(f"{path} is not a routing trace: it lacks {missing[0]}")
    sizes = {key: archive.getinfo(f"{key}.npy").file_size for key in _KEYS}
    if sum(sizes.values()) > TRACE_BYTES:
        raise UserError(
            f"{path}: {sum(sizes.values()):,} bytes when unpacked; at most {TRACE_BYTES:,} are read"
        )
    found = {}
    for key, size in sizes.items():
        with archive.open(f"{key}.npy") as member:
            found[key] = read_array(member, size)
    return found


def read_array(file: IO[bytes], num_bytes: int) -> npt.NDArray[Any]:
    """The array in a `.npy` file of `num_bytes`, none of whose objects are unpickled.

    Raises:
        ValueError: it claims more than the file has; see `DAMAGED_ARRAY` for others.
    """
    is_first = np.lib.format.read_magic(file) == (1, 0)
    formats = np.lib.format
    header = formats.read_array_header_1_0 if is_first else formats.read_array_header_2_0
    shape, _, dtype = header(file)
    if prod(shape) * dtype.itemsize > num_bytes:  # else as much is set aside as it claims
        raise ValueError("larger than its file")
    file.seek(0)
    found: npt.NDArray[Any] = formats.read_array(file, allow_pickle=False)
    return found


def _parse(found: dict[str, npt.NDArray[Any]]) -> RoutingTrace:
    _check_kind(found, "schema_version", "i", 0)
    if (version := int(found["schema_version"])) != SCHEMA_VERSION:
        raise UserError(f"schema_version is {version}; this expertlane reads {SCHEMA_VERSION}")
    for key, kind, num_dims in (("model", "U", 0), ("num_experts", "i", 0), ("layers", "i", 1)):
        _check_kind(found, key, kind, num_dims)
    model = str(found["model"])
    if not model.isprintable():
        raise UserError(f"model is {shown(model)}; it must be a name, one line of text")
    return RoutingTrace(
        model,
        int(found["num_experts"]),
        tuple(found["layers"].tolist()),
        found["topk_ids"],
        found["step"],
    )


def _check_kind(found: dict[str, npt.NDArray[Any]], key: str, kind: str, num_dims: int) -> None:
    array = found[key]
    if array.dtype.kind != kind or array.ndim != num_dims:
        raise UserError(
            f"{key} is {array.dtype} of shape {array.shape}, not what a routing trace has"
        )


@dataclass(frozen=True)
class PlacementScore:
    """A placement of one layer, or of all, on a trace.

    Attributes:
        max_over_mean: fullest over mean of `Placement.rank_loads`; for all layers, the sum
            of their fullest ranks over the sum of their means. 0 without tokens.
        cross_node_copies: copies of tokens sent to another node; None where it is not known which
            tokens chose an expert.
    """

    max_over_mean: float
    cross_node_copies: int | None


@dataclass(frozen=True)
class Comparison:
    """Before and after, for one layer or all.

    Attributes:
        layer: index among the hidden layers, or None for all.
        num_moves: experts that ranks must fetch from others to get from before to after.
    """

    layer: int | None
    before: PlacementScore
    after: PlacementScore
    num_moves: int


def compare(
    layers: Sequence[int],
    load: npt.NDArray[np.int64],
    topk_ids: npt.NDArray[np.integer] | None,
    before: Sequence[Placement],
    after: Sequence[Placement],
    ranks_per_node: int,
) -> list[Comparison]:
    """Layer by layer, then all layers; tokens are taken to sit on the nodes in turn.

    Args:
        layers, load, topk_ids: as in `RoutingTrace`; `topk_ids` None where only loads are known.
        before, after: [num_layers].
        ranks_per_node: consecutive ranks that share a node.
    """
    needed = between_ranks(moves(before, after, ranks_per_node))
    num_moves = np.bincount([move.layer for move in needed], minlength=len(before))
    old, new = (_score(load, topk_ids, each, ranks_per_node) for each in (before, after))
    counts = (*num_moves.tolist(), len(needed))
    return list(map(Comparison, (*layers, None), old, new, counts))


def _score(
    load: npt.NDArray[np.int64],
    topk_ids: npt.NDArray[np.integer] | None,
    placements: Sequence[Placement],
    ranks_per_node: int,
) -> list[PlacementScore]:
    """The score of each layer, then of all layers together."""
    loads = rank_loads(placements, load, ranks_per_node)
    ratios = (*max_over_mean(loads).tolist(), total_max_over_mean(loads))
    if topk_ids is None:
        return [PlacementScore(ratio, None) for ratio in ratios]
    num_nodes = placements[0].ep // ranks_per_node
    source_node = spread_sources(topk_ids.shape[1], num_nodes)
    copies = [
        cross_node_copies(ids, each, ranks_per_node, source_node)
        for ids, each in zip(topk_ids, placements, strict=True)
    ]
    return list(map(PlacementScore, ratios, (*copies, sum(copies))))


_CHUNK = 16_384  # tokens whose choices are laid out as a dense matrix at a time


def coactivation(topk_ids: npt.NDArray[np.integer], num_experts: int) -> npt.NDArray[np.float32]:
    """[num_experts, num_experts]; how many tokens chose both; zero on the diagonal.

    Args:
        topk_ids: [num_tokens, num_experts_per_tok], of one layer.
    """
    counts = np.zeros((num_experts, num_experts), dtype=np.float32)
    for start in range(0, len(topk_ids), _CHUNK):
        ids = topk_ids[start : start + _CHUNK]
        chose = np.zeros((len(ids), num_experts), dtype=np.float32)
        np.put_along_axis(chose, ids.astype(np.int64), 1.0, axis=1)
        counts += chose.T @ chose
    np.fill_diagonal(counts, 0.0)
    return counts


def spread_sources(num_tokens: int, num_nodes: int) -> npt.NDArray[np.int64]:
    """[num_tokens]; a source node for each token, in turn, where the real ones are unknown."""
    return np.arange(num_tokens) % num_nodes


def cross_node_copies(
    topk_ids: npt.NDArray[np.integer],
    placement: Placement,
    ranks_per_node: int,
    source_node: npt.NDArray[np.integer],
) -> int:
    """Copies of tokens that cross nodes: one for each remote node that a token must reach.

    A pair goes to a copy of its expert on the token's own node where there is one; else the
    copies take turns, so that each gets the same share.

    Args:
        topk_ids: [num_tokens, num_experts_per_tok], of one layer.
        ranks_per_node: consecutive ranks that share a node.
        source_node: [num_tokens]; where each token is.
    """
    num_tokens, top_k = topk_ids.shape
    node_of_rank = np.arange(placement.ep) // ranks_per_node
    is_held = placement.slots().T >= 0  # [num_experts, ep]
    node_of_copy = node_of_rank[np.argsort(~is_held, axis=1, kind="stable")]
    num_copies = is_held.sum(axis=1)
    first_ranks = np.arange(0, placement.ep, ranks_per_node)
    is_on_node = np.logical_or.reduceat(is_held, first_ranks, axis=1)
    token = np.repeat(np.arange(num_tokens), top_k)
    expert_of_pair = topk_ids.ravel().astype(np.int64)
    is_remote = ~is_on_node[expert_of_pair, source_node[token]]
    token, remote = token[is_remote], expert_of_pair[is_remote]
    copy = num_equal_before(remote, placement.num_experts) % num_copies[remote]
    reached = np.zeros((num_tokens, len(first_ranks)), dtype=bool)
    reached[token, node_of_copy[remote, copy]] = True
    return int(reached.sum())
