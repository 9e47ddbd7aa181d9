"""Times of operations on one device: rooflines, corrected where measurements are known.

The roofline of an operation is the least that it can take, from its sizes and a datasheet: FLOPs
over the peak or bytes over the bandwidth, whichever is longer. What a device really takes is this
times a fitted correction, which is looked up at sizes derived here too.

A profile's surface `gemm.bfloat16` holds for that kind and type, `memory` for all types; the term
`gemm_floor_s` is what an operation of the kind takes beside its roofline, however small it is.
Where `gemm.bfloat16.<library>` holds too, and is faster, a deployment is taken to use that library.

Experts wider than a law of `experts` knows are priced by the law of `gemm`, each matrix a product
at its own size: a single one of them fills a device, as those of small experts do only together.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from expertlane.cost.laws.frameworks import generation_of
from expertlane.cost.laws.profile import Device, Profile
from expertlane.cost.laws.times import Basis, Surface, Times, where
from expertlane.cost.step.operation import (
    ATTENTION,
    BYTES_ALONE,
    ITEM_BYTES,
    SIZES,
    STATES,
    WEIGHT_BYTES,
    Floats,
    NumberTypes,
    OpKind,
    flops_of,
)
from expertlane.errors import SpecError
from expertlane.spec.mixers import STATE_BYTES
from expertlane.spec.model import ModelConfig

Sizes = Mapping[str, Floats | float]

_SCORE_BYTES = 4  # of an indexer's score of a position, a float32
_POSITION_BYTES = 4  # of a chosen position, an int32
_Work = tuple[Floats | float, dict[str, Floats | float]]  # bytes, and `Roofline.at`


@dataclass(frozen=True, eq=False)
class Roofline:
    """An operation against a device's peaks.

    Attributes:
        seconds: [R]; 0 where there is nothing to do.
        at: sizes by which a law may be looked up, 1 or more where there is anything to do.
        compute_s, memory_s: [R]; FLOPs over the peak, and bytes over the bandwidth.
    """

    seconds: Floats
    at: Sizes
    compute_s: Floats
    memory_s: Floats

    @property
    def bound_by_flops(self) -> Floats:
        """[R]; 1 where FLOPs take far longer than bytes, 0 where bytes do, and between."""
        squares = self.compute_s**2, self.memory_s**2
        share: Floats = squares[0] / np.maximum(squares[0] + squares[1], 1e-60)
        return share


def roofline(
    device: Device, kind: OpKind, dtype: str, sizes: Sizes, floor_s: float = 0.0
) -> Roofline:
    """The roofline of an operation.

    Args:
        dtype: number type of the weights; for attention, of keys and values.
        sizes: the sizes that `SIZES` names for the kind; each [R] or one for all.
        floor_s: fixed time of an operation, however small it is.

    Raises:
        SpecError: the datasheet has no figure for the type.
    """
    num_bytes, at = _WORK[kind](sizes, _item_bytes(kind, dtype))
    memory_s = np.asarray(num_bytes) / device.memory_bytes_per_s
    if kind in BYTES_ALONE:
        busy_s = np.where(memory_s > 0, memory_s + floor_s, 0.0)
        return Roofline(busy_s, at, np.zeros_like(busy_s), memory_s)
    compute_s = np.asarray(flops_of(kind, sizes)) / peak_flops_per_s(device, kind, dtype)
    busy_s = np.maximum(compute_s, memory_s) + floor_s
    busy_s = busy_s if compute_s.all() else np.where(compute_s > 0, busy_s, 0.0)
    return Roofline(busy_s, at, compute_s, memory_s)


def moved_bytes(kind: OpKind, dtype: str, sizes: Sizes) -> Floats | float:
    """The least bytes that an operation reads and writes."""
    return _WORK[kind](sizes, _item_bytes(kind, dtype))[0]


def _item_bytes(kind: OpKind, dtype: str) -> float:
    return ITEM_BYTES[dtype] if kind in ATTENTION else WEIGHT_BYTES[dtype]


def looked_up_by(kind: OpKind, sizes: Sizes) -> Sizes:
    """The sizes by which a law of the kind may be looked up, as `Roofline.at` has them."""
    return _WORK[kind](sizes, 1)[1]


def peak_flops_per_s(device: Device, kind: OpKind, dtype: str) -> float:
    """The dense peak that a kind of operation computes at.

    Raises:
        SpecError: the datasheet has none.
    """
    is_float8 = kind in ATTENTION and dtype == "float8"
    computes_in = device.float8_attention if is_float8 else dtype
    peak = device.flops_per_s.get(computes_in)
    if peak is None:
        known = ", ".join(device.flops_per_s)
        raise SpecError(f"{device.name} has no peak for {computes_in}, only for {known}")
    return peak


def _gemm(sizes: Sizes, item: float) -> _Work:
    m, n, k = sizes["m"], sizes["n"], sizes["k"]
    return item * (n * k + m * k) + max(item, 2) * m * n, {"m": m, "n": n, "k": k}


def _experts(sizes: Sizes, item: float) -> _Work:
    pairs, active, hidden = sizes["pairs"], sizes["active"], sizes["hidden"]
    inner, matrices = sizes["inner"], sizes["matrices"]
    activations = pairs * (2 * hidden + matrices * inner)
    at = {
        "pairs_per_expert": pairs / np.maximum(active, 1),
        "active": active,
        "hidden": hidden,
        "inner": inner,
    }
    return item * active * (hidden * inner * matrices) + max(item, 2) * activations, at


def _attention(sizes: Sizes, item: float) -> _Work:
    is_prefill, is_latent = "tokens" in sizes, "key_dim" in sizes
    queries, heads = sizes["tokens" if is_prefill else "seqs"], sizes["heads"]
    positions = sizes["positions"]
    if is_latent:
        key_dim, both = sizes["key_dim"], sizes["key_dim"] + sizes["value_dim"]
        num_bytes = item * positions * key_dim + max(item, 2) * queries * heads * both
        widths = {"key_dim": key_dim}
    else:
        head_dim, kv_heads = sizes["head_dim"], sizes["kv_heads"]
        rows = item * positions * kv_heads + max(item, 2) * queries * heads
        num_bytes = 2 * head_dim * rows
        widths = {"group": heads / kv_heads, "head_dim": head_dim}
    if is_prefill:
        keys_per_query = sizes["query_key_pairs"] / np.maximum(queries, 1)
        at = {"keys_per_query": keys_per_query, "query_heads": queries * heads}
    elif is_latent:
        at = {"seqs": queries, "heads": heads}
    else:
        at = {"seq_kv_heads": queries * kv_heads}
    if not is_prefill:
        at["positions_per_seq"] = positions / np.maximum(queries, 1)
    return num_bytes, at | widths


def _memory(sizes: Sizes, item: float) -> _Work:
    return sizes["bytes"], {"bytes": sizes["bytes"]}


def _sparse(sizes: Sizes, item: float) -> _Work:
    """Chosen positions are read once, however many tokens chose them: the least."""
    tokens, heads, key_dim = sizes["tokens"], sizes["heads"], sizes["key_dim"]
    rows = max(item, 2) * tokens * heads * (key_dim + sizes["value_dim"])
    at = {"tokens": tokens, "keys_per_query": _keys_per_query(sizes), "heads": heads}
    return item * sizes["positions"] * key_dim + rows, at


def _keys_per_query(sizes: Sizes) -> Floats | float:
    return sizes["query_key_pairs"] / np.maximum(sizes["tokens"], 1)


def _index(sizes: Sizes, item: float) -> _Work:
    """Keys and queries in, scores out."""
    at = {"tokens": sizes["tokens"], "keys_per_query": _keys_per_query(sizes)}
    return sizes["read_bytes"] + _SCORE_BYTES * sizes["scores"], at


def _choose(sizes: Sizes, item: float) -> _Work:
    """Scores in, positions out."""
    pairs, tokens = sizes["query_key_pairs"], sizes["tokens"]
    moved = _SCORE_BYTES * pairs + _POSITION_BYTES * tokens * sizes["topk"]
    return moved, {"tokens": tokens, "keys_per_query": _keys_per_query(sizes), "bytes": moved}


def _convolution(sizes: Sizes, item: float) -> _Work:
    """Inputs and outputs, and each sequence's latest inputs read and written."""
    seqs, tokens = sizes["seqs"], sizes["tokens"]
    moved = 2 * max(item, 2) * sizes["channels"] * (tokens + seqs * (sizes["kernel"] - 1))
    return moved, {"bytes": moved, "tokens_per_seq": tokens / np.maximum(seqs, 1)}


def _state(sizes: Sizes, item: float, num_written: Floats | float | None = None) -> _Work:
    """The state of each sequence is read and written once a step.

    Args:
        num_written: states that are written; None for one a sequence.
    """
    tokens, seqs = sizes["tokens"], sizes["seqs"]
    values = seqs * sizes["state_values"]
    written = values if num_written is None else num_written * sizes["state_values"]
    moved = STATE_BYTES * (values + written) + max(item, 2) * tokens * sizes["token_values"]
    return moved, {"state_values": values, "tokens_per_seq": tokens / np.maximum(seqs, 1)}


def _state_decode(sizes: Sizes, item: float) -> _Work:
    """A state is read once a sequence, and written after each token: any draft may be the last."""
    return _state(sizes, item, sizes["tokens"])


_WORK: dict[OpKind, Callable[[Sizes, float], _Work]] = {
    OpKind.GEMM: _gemm,
    OpKind.EXPERTS: _experts,
    **dict.fromkeys(ATTENTION, _attention),
    **dict.fromkeys((OpKind.SPARSE, OpKind.COMPRESSED), _sparse),
    OpKind.INDEX: _index,
    OpKind.INDEX_DECODE: _index,
    OpKind.CHOOSE: _choose,
    OpKind.CONVOLUTION: _convolution,
    **{kind: _state_decode if kind.endswith("_decode") else _state for kind in STATES},
    OpKind.MEMORY: _memory,
}


_SAME_WIDTH = {"float16": "bfloat16", "bfloat16": "float16"}
_WIDER_FOR_TWIN = 1.15  # bounds widen by this where the law of the other 16-bit type stands in
# Of a roofline with no measurements: the share of the peak that kernels reach, from worst to best.
_EFFICIENCY = 0.6
_LEAST_EFFICIENCY = 0.2
_KNOWN_DOUBLINGS = 1.0  # doublings outside a library's law, up to which it may be the faster one
_OUT_OF_CACHES_S = 1e-4  # a roofline from which on no operation lives on what caches hold
_NO_FACTOR = (1.0, 1.0, 1.0)
_WIDE = 2**25  # weights of an expert's matrix, from where on it may fill a device by itself


class DeviceModel:
    """Times of operations on the device of a profile."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._laws: dict[tuple[OpKind, str], tuple[Surface, float]] = {}
        self._libraries: dict[str, list[Surface]] = {}

    def times(self, kind: OpKind, dtype: str, sizes: Mapping[str, Floats | float]) -> Times:
        """Seconds with bounds, without launch overheads.

        Args:
            dtype: one of `WEIGHT_BYTES`; of the cache for attention. Outputs are at least 16 bits
                wide.
            sizes: those that `SIZES` names for the kind; each [R] or one for all. Nothing to do
                (no rows, pairs, tokens or bytes) takes no time.

        Raises:
            SpecError: the profile has no figure for the type.
        """
        law = self._laws.get((kind, dtype))
        if law is None:
            law = self._laws[kind, dtype] = self._law(kind, dtype)
        surface, floor_s = law
        base = roofline(self._profile.device, kind, dtype, sizes, floor_s)
        times = surface.times(base.seconds, base.at)
        for other in self._others(kind, dtype):
            times = _faster(times, other, base)
        is_own = Basis.MEASURED in (surface.basis, self._profile.own_basis)
        if kind is OpKind.EXPERTS and not is_own:
            is_wide = _is_wide(surface, sizes) & (base.seconds > 0)
            if is_wide.any():
                times = where(is_wide, self._products(dtype, sizes, times), times)
        if self._profile.compute_factor != _NO_FACTOR:
            factors = np.array(self._profile.compute_factor)[:, None] ** base.bound_by_flops
            basis = max(times.basis, Basis.FITTED)
            times = replace(times, bounds=times.bounds * factors, basis=basis)
        if not is_own:
            times = _no_faster_than_peak(times, base.seconds - floor_s)
        if base.seconds.all():
            return times
        return replace(times, is_extrapolated=times.is_extrapolated & (base.seconds > 0))

    def _products(self, dtype: str, sizes: Mapping[str, Floats | float], otherwise: Times) -> Times:
        """Experts as products of their mean rows, one after the other, and the activation.

        Args:
            otherwise: times to fall back on where no product of the type was measured.
        """
        surface, floor_s = self._law(OpKind.GEMM, dtype)
        if not surface.axes:
            return otherwise
        hidden, inner, matrices = sizes["hidden"], sizes["inner"], sizes["matrices"]
        active = np.maximum(sizes["active"], 1)
        rows = np.maximum(sizes["pairs"] / active, 1)

        def product(n: Floats | float, k: Floats | float) -> Times:
            one = roofline(self._profile.device, OpKind.GEMM, dtype, {"m": rows, "n": n, "k": k})
            return surface.times(one.seconds * active + floor_s, one.at)

        moved = sizes["pairs"] * (inner * (matrices * max(WEIGHT_BYTES[dtype], 2)))
        activation = self.times(OpKind.MEMORY, dtype, {"bytes": moved})
        up, down = product(inner, hidden), product(hidden, inner)
        # Corrections of experts are theirs, whatever law stands in.
        factors = self._profile.factors
        own = factors.get(OpKind.EXPERTS, 1.0)
        of_products = own / factors.get(OpKind.GEMM, 1.0)
        of_activation = own / factors.get(OpKind.MEMORY, 1.0)
        products = of_products * ((matrices - 1) * up.bounds + down.bounds)
        return Times(
            products + of_activation * activation.bounds,
            max(up.basis, activation.basis),
            up.is_extrapolated | down.is_extrapolated,
            max(up.wider, activation.wider),
        )

    def has_one_law(self, kind: OpKind, dtype: str) -> bool:
        """True if one law gives all times of an operation, whatever its sizes."""
        return kind is not OpKind.EXPERTS and not self._others(kind, dtype)

    def _others(self, kind: OpKind, dtype: str) -> list[Surface]:
        """Laws of other libraries for the same operation, named `experts.float8.<library>`."""
        begin = f"{kind}.{dtype}."
        if begin not in self._libraries:
            surfaces = self._profile.surfaces.items()
            self._libraries[begin] = [law for name, law in surfaces if name.startswith(begin)]
        return self._libraries[begin]

    def _law(self, kind: OpKind, dtype: str) -> tuple[Surface, float]:
        if kind in BYTES_ALONE and not has_law(self._profile, kind, dtype):
            kind = OpKind.MEMORY
        types = ITEM_BYTES if kind in ATTENTION else WEIGHT_BYTES
        if dtype not in types:
            raise SpecError(f"{dtype} is not priced; known types are {', '.join(types)}")
        device = self._profile.device
        known = roofline(device, kind, dtype, dict.fromkeys(SIZES[kind], 1.0)).at
        surface = self._surface(kind, dtype)
        for axis in surface.axes:
            if axis not in known:
                raise SpecError(
                    f"profile {self._profile.name} looks {kind} up by {axis}; "
                    f"it has {', '.join(known)}"
                )
        floor = self._profile.terms.get(f"{kind}_floor_s")
        return surface, floor.value if floor else 0.0

    def _surface(self, kind: OpKind, dtype: str) -> Surface:
        surfaces = self._profile.surfaces
        if (own := f"{kind}.{dtype}") in surfaces:
            return surfaces[own]
        twin = f"{kind}.{_SAME_WIDTH.get(dtype, '')}"
        if twin in surfaces:
            known = surfaces[twin]
            return replace(
                known,
                low=known.low / _WIDER_FOR_TWIN,
                high=known.high * _WIDER_FOR_TWIN,
                wider=known.wider * _WIDER_FOR_TWIN,
                basis=Basis.BOUND,
                origin=f"as {twin}: {known.origin}",
            )
        return surfaces.get(str(kind)) or assumed_law()


def assumed_law() -> Surface:
    """The law of an operation that nothing was measured for, of any type."""
    return Surface(
        axes={},
        correction=np.array(-np.log(_EFFICIENCY)),
        low=_EFFICIENCY,
        high=_EFFICIENCY / _LEAST_EFFICIENCY,
        basis=Basis.BOUND,
        origin=f"datasheet's roofline at {_LEAST_EFFICIENCY:.0%} to 100% of the peak",
    )


def has_law(profile: Profile, kind: OpKind, dtype: str) -> bool:
    """True if something was measured for a kind of operation: of this type, its twin, or any."""
    names = f"{kind}.{dtype}", f"{kind}.{_SAME_WIDTH.get(dtype, '')}", str(kind)
    return any(name in profile.surfaces for name in names)


def stand_ins(profile: Profile, types: NumberTypes, model: ModelConfig) -> Iterator[str]:
    """Cautions on laws that rest on another measurement than one would expect, or on none."""
    parts: list[tuple[str, OpKind, str]] = []
    if model.state is not None:
        kinds = (OpKind(f"{model.state.kind}_{phase}") for phase in ("prefill", "decode"))
        parts += [(model.state.title, kind, types.activations) for kind in kinds]
    if (indexer := model.indexer) is not None:
        kind = OpKind.SPARSE_GROUPED if indexer.by_group else OpKind.SPARSE
        kind = types.of_compressed if model.compressed is not None else kind
        name = "Compressed" if kind is OpKind.COMPRESSED else "Sparse"
        cached = f"{name} attention of prompts over a {types.kv} cache"
        scored_in = types.activations if indexer.by_group else types.index_type
        scored = f"Scores of an indexer in {scored_in}"
        parts.append((cached, kind, types.kv))
        both = (OpKind.INDEX, OpKind.INDEX_DECODE)
        parts += [(scored, kind, scored_in) for kind in both]
    unknown = [title for title, kind, dtype in parts if not has_law(profile, kind, dtype)]
    if unknown:
        yield (
            f"{' and '.join(dict.fromkeys(unknown))}: nothing was measured; times are between the "
            f"roofline of {profile.device.name} and {1 / _LEAST_EFFICIENCY:g} times that."
        )
    if model.compressed is not None:
        phase = "" if types.of_compressed is OpKind.SPARSE else "of single tokens "
        yield (
            f"Compressed attention {phase}is priced as latent attention to as many chosen "
            "positions: those of its window, and its entries."
        )
        if types.of_compressed is OpKind.COMPRESSED and generation_of(profile.name) == "Blackwell":
            yield (
                "Prompts in layers with chosen entries took SGLang 1.6 times as long as projected "
                "on Blackwell, mostly outside the bounds (docs/validation.md, modules of sparse "
                "attention)."
            )
    elif indexer is not None:
        alike = "attention of grouped queries" if indexer.by_group else "latent attention"
        yield (
            f"Decode attention to the positions that an indexer chose is priced as {alike} to as "
            "many positions."
        )
    laws, twin = profile.surfaces, _SAME_WIDTH.get(types.activations, "")
    own, other = (f"{OpKind.DECODE_ATTENTION}.{dtype}" for dtype in (types.activations, twin))
    if own not in laws and other in laws:
        yield (
            f"{profile.device.name} was measured in {twin} only: {types.activations} gets the same "
            f"times, with bounds {_WIDER_FOR_TWIN - 1:.0%} wider; --dtype {twin} needs no such "
            "assumption."
        )
    if types.kv != types.activations and any(f"{kind}.{types.kv}" in laws for kind in ATTENTION):
        yield (
            f"Attention over a {types.kv} cache has measurements of its own: with few or short "
            "sequences it is not always the faster one."
        )


def _is_wide(law: Surface, sizes: Mapping[str, Floats | float]) -> npt.NDArray[np.bool_]:
    """[R]; whether experts are wider than any that the law was fitted to."""
    hidden, inner = np.asarray(sizes["hidden"]), np.asarray(sizes["inner"])
    if not {"hidden", "inner"} <= set(law.axes):
        return np.zeros(np.broadcast(hidden, inner).shape, dtype=np.bool_)
    is_beyond = (hidden > law.axes["hidden"][-1]) | (inner > law.axes["inner"][-1])
    is_wide: npt.NDArray[np.bool_] = is_beyond & (hidden * inner >= _WIDE)
    return is_wide


def _no_faster_than_peak(times: Times, peak_s: Floats) -> Times:
    """Times that keep to the datasheet.

    Published tables have long operations above the peak, measured on data that was in caches.

    Args:
        peak_s: [R]; bytes over bandwidth or FLOPs over peak.
    """
    least_s = np.where(peak_s > _OUT_OF_CACHES_S, peak_s, 0.0)
    if not least_s.any():
        return times
    return replace(times, bounds=np.maximum(times.bounds, least_s))


def _faster(times: Times, other: Surface, base: Roofline) -> Times:
    """The lesser of the times and another law's, on ranks whose sizes that law knows."""
    found, doublings = other.times_and_doublings(base.seconds, base.at)
    is_faster = (found.seconds < times.seconds) & (doublings <= _KNOWN_DOUBLINGS)
    return where(is_faster, found, times)
