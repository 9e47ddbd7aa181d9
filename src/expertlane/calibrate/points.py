"""Sizes of the operations and transfers that `expertlane calibrate` measures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product, zip_longest

from expertlane.cost.laws.device import moved_bytes
from expertlane.cost.step.operation import Kind, TransferKind, flops_of
from expertlane.engine.ranks.commands import Point, TransferPoint

_TRANSFERS = (  # the engine has no all-reduce
    TransferKind.ALL_GATHER,
    TransferKind.REDUCE_SCATTER,
    TransferKind.ALL_TO_ALL,
    TransferKind.SEND,
)


@dataclass(frozen=True)
class Grid:
    """Sizes to measure; those of attention are those of one rank.

    Attributes:
        gemm_m, gemm_nk: rows, and shapes of weights [n, k].
        router_nk: shapes of the router's float32 weights.
        expert_shapes: (hidden, inner) of experts, each by tokens for an expert × experts.
        memory_bytes: moved by small operations.
        heads: (query heads, key/value heads, head_dim).
        latent_heads: (query heads, key_dim, value_dim), for decodes of `latent_seqs`.
        decode_seqs, decode_positions: sequences, and positions of each.
        prefill_seqs, prefill_tokens: sequences, and new tokens of each.
        transfer_bytes: bytes to each other rank.
        contended_bytes: bytes of transfers that computing goes on beside.
        most_flops, most_bytes: limits; no operation that takes more is measured.
        num_rounds: repetitions of the whole grid.
        point_s: seconds for the repetitions of one operation in a round.
        step_seqs: sequences of a rank in the small model's steps, which give the overheads.
        step_layers: few and many; of the small model.
    """

    gemm_m: tuple[int, ...]
    gemm_nk: tuple[tuple[int, int], ...]
    router_nk: tuple[tuple[int, int], ...]
    expert_tokens: tuple[int, ...]
    expert_counts: tuple[int, ...]
    expert_shapes: tuple[tuple[int, int], ...]
    memory_bytes: tuple[int, ...]
    heads: tuple[tuple[int, int, int], ...]
    latent_heads: tuple[tuple[int, int, int], ...]
    latent_seqs: tuple[int, ...]
    decode_seqs: tuple[int, ...]
    decode_positions: tuple[int, ...]
    prefill_seqs: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    transfer_bytes: tuple[int, ...]
    contended_bytes: tuple[int, ...]
    most_flops: float
    most_bytes: float
    num_rounds: int
    point_s: float
    step_seqs: tuple[int, ...]
    step_layers: tuple[int, int]

    def points(self, dtype: str) -> list[Point]:
        """All operations whose FLOPs and bytes are few enough, those first that say most.

        Kinds take turns, so that as many as there is time for are a coarser grid of all.
        """
        memory = [Point(Kind.MEMORY, dtype, (size,)) for size in self.memory_bytes]
        every = [*self._products(dtype), *self._experts(dtype), *self._attention(dtype), *memory]
        of_kind: dict[tuple[Kind, str], list[Point]] = {}
        for point in filter(self._is_small, every):
            of_kind.setdefault((point.kind, point.dtype), []).append(point)
        in_turn = zip_longest(*map(_coarse_first, of_kind.values()))
        return [point for point in chain.from_iterable(in_turn) if point is not None]

    def _is_small(self, point: Point) -> bool:
        num_bytes = moved_bytes(point.kind, point.dtype, point.by_name)
        num_flops = flops_of(point.kind, point.by_name)
        return bool(num_flops <= self.most_flops and num_bytes <= self.most_bytes)

    def _products(self, dtype: str) -> Iterator[Point]:
        for m, (n, k) in product(self.gemm_m, self.gemm_nk):
            yield Point(Kind.GEMM, dtype, (m, n, k))
        for m, (n, k) in product(self.gemm_m, self.router_nk):
            if dtype != "float32" or (n, k) not in self.gemm_nk:
                yield Point(Kind.GEMM, "float32", (m, n, k))

    def _experts(self, dtype: str) -> Iterator[Point]:
        shapes = product(self.expert_tokens, self.expert_counts, self.expert_shapes)
        for tokens, active, (hidden, inner) in shapes:
            yield Point(Kind.EXPERTS, dtype, (tokens * active, active, hidden, inner, 3))

    def _attention(self, dtype: str) -> Iterator[Point]:
        for seqs, length in product(self.decode_seqs, self.decode_positions):
            positions = seqs * length
            for heads in self.heads:
                yield Point(Kind.DECODE_ATTENTION, dtype, (seqs, positions, *heads))
            for heads in self.latent_heads if seqs in self.latent_seqs else ():
                yield Point(Kind.LATENT_DECODE, dtype, (seqs, positions, *heads))
        for seqs, length in product(self.prefill_seqs, self.prefill_tokens):
            sizes = (seqs, seqs * length * (length + 1) // 2, seqs * length, seqs * length)
            for heads in self.heads:
                yield Point(Kind.PREFILL_ATTENTION, dtype, (*sizes, *heads))
            for heads in self.latent_heads:
                yield Point(Kind.LATENT_PREFILL, dtype, (*sizes, *heads))

    def transfers(self, num_ranks: int) -> list[TransferPoint]:
        """All transfers, over 2, 4, 8 … ranks up to `num_ranks`, and over so many."""
        counts = sorted({2**i for i in range(1, num_ranks.bit_length())} | {num_ranks})
        return [
            TransferPoint(kind, count, size)
            for count in counts
            if 1 < count <= num_ranks
            for kind in _TRANSFERS
            for size in self.transfer_bytes
            if kind is not TransferKind.SEND or count == 2
        ]


def _coarse_first(points: Sequence[Point]) -> list[Point]:
    """The last and the first, then those half-way between what came before, and so on."""
    num_bits = max(1, (len(points) - 1).bit_length())
    reversed_bits = (int(f"{each:0{num_bits}b}"[::-1], 2) for each in range(2**num_bits))
    places = [len(points) - 1, *reversed_bits]
    return [points[place] for place in dict.fromkeys(places) if place < len(points)]


CPU_GRID = Grid(
    gemm_m=(1, 4, 16, 64, 256, 1024),
    gemm_nk=((256, 256), (1024, 256), (256, 1024), (1024, 1024), (4096, 1024), (1024, 4096)),
    router_nk=((8, 512), (8, 2048), (64, 512), (64, 2048)),
    expert_tokens=(1, 4, 16, 64, 256),
    expert_counts=(1, 4, 16),
    expert_shapes=((256, 256), (512, 512), (1024, 256), (1024, 1024), (2048, 1024)),
    memory_bytes=tuple(4**i for i in range(4, 13)),
    heads=((4, 4, 64), (16, 16, 64), (16, 4, 64), (32, 8, 128)),
    latent_heads=((4, 576, 512), (16, 576, 512)),
    latent_seqs=(1, 16, 64),
    decode_seqs=(1, 4, 16, 64, 128),
    decode_positions=(16, 64, 256, 1024),
    prefill_seqs=(1, 4, 16),
    prefill_tokens=(16, 64, 256, 1024),
    transfer_bytes=tuple(4**i for i in range(3, 13)),
    contended_bytes=(4096, 65536, 1 << 20),
    most_flops=1e10,
    most_bytes=1e9,
    num_rounds=5,
    point_s=0.004,
    step_seqs=(2, 8, 32),
    step_layers=(2, 5),
)
GPU_GRID = replace(
    CPU_GRID,
    gemm_m=(1, 8, 64, 512, 4096),
    gemm_nk=(
        *((1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096), (16384, 4096), (8192, 8192)),
        (32768, 8192),
    ),
    router_nk=((8, 2048), (8, 8192), (256, 2048), (256, 8192)),
    expert_tokens=(1, 16, 128, 1024),
    expert_counts=(1, 8, 32),
    expert_shapes=((1024, 512), (2048, 2048), (4096, 1024), (4096, 2048), (8192, 32768)),
    memory_bytes=tuple(4**i for i in range(4, 15)),
    heads=((8, 8, 64), (32, 8, 128), (32, 4, 128), (16, 16, 512), (2, 2, 512)),
    latent_heads=((16, 576, 512), (128, 576, 512)),
    decode_positions=(64, 512, 4096),
    prefill_tokens=(64, 512, 4096),
    transfer_bytes=tuple(4**i for i in range(3, 14)),
    most_flops=2e13,
    most_bytes=5e9,
    point_s=0.01,
)
