"""Silent errors found by ranks in a step, and the first of them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertlane.spec.names import CheckPoint

OUTSIDE = -1  # the layer of what is in none


class Place(NamedTuple):
    """A place in a step; places compare in the order in which a step reaches them.

    Attributes:
        micro_batch: micro-batch of the step.
        layer: hidden layer; `OUTSIDE` before the first, past any after the last.
        point: number of a `CheckPoint`.
    """

    micro_batch: int
    layer: int
    point: int

    @classmethod
    def of(cls, micro_batch: int, layer: int, point: CheckPoint) -> "Place":
        """The place of a check; the head and what follows come after all layers."""
        is_last = layer == OUTSIDE and point >= CheckPoint.HEAD
        return cls(micro_batch, _AFTER_LAYERS if is_last else layer, point)

    def __str__(self) -> str:
        layer = f"layer {self.layer}, " if OUTSIDE < self.layer < _AFTER_LAYERS else ""
        return f"{layer}{CheckPoint(self.point).label.replace('-', ' ')}"


_AFTER_LAYERS = 1 << 30


class SilentError(NamedTuple):
    """A silent error.

    Attributes:
        ranks: possible causes.
        text: one line, in which `{}` becomes step and place.
    """

    place: Place
    ranks: tuple[int, ...]
    text: str

    def line(self, step: int) -> str:
        """The error line for a user."""
        return self.text.replace("{}", f"step {step}, {self.place}")


@dataclass(frozen=True, eq=False)
class Alike:
    """Checksums of values that all ranks of a group must hold alike, in the order of the step.

    Attributes:
        ranks: global ranks of the group.
        places: [N, 3]; as `Place`.
        sums: [N].
    """

    ranks: list[int]
    places: npt.NDArray[np.int64]
    sums: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TransferSums:
    """Checksums of transfers between a rank and others of a group.

    Attributes:
        ranks: global ranks of the group.
        places: [N, 3]; as `Place`.
        numbers: [N]; index of the transfer in the group, by its begin.
        peers: [N]; the other rank.
        is_sent: [N]; sent by this rank; else received.
        sums: [N].
    """

    ranks: list[int]
    places: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    peers: npt.NDArray[np.int64]
    is_sent: npt.NDArray[np.bool_]
    sums: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RankChecks:
    """Findings and checksums of one rank in a step.

    Attributes:
        places, texts: faults that it found alone, in order.
        alike: by group.
        transferred: by group; empty unless transfers are checked.
        etp_rank: its rank among those that share an expert.
        layers: [L]; hidden layers with experts; empty unless pairs are counted.
        chosen: [L, num_experts]; token-expert pairs of tokens that this rank owns.
        arrived: [L, num_experts]; pairs that its experts were given.
    """

    places: npt.NDArray[np.int64]
    texts: list[str]
    alike: list[Alike]
    etp_rank: int
    layers: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.int64]
    arrived: npt.NDArray[np.int64]
    transferred: list[TransferSums] = field(default_factory=list)


def first_found(ranks: Sequence[int], checks: Sequence[RankChecks]) -> SilentError | None:
    """The earliest error of a step that any of its ranks saw; of several there, the lowest rank's.

    Args:
        ranks: [num_ranks]; global, of a replica.
        checks: [num_ranks].
    """
    found = [
        *_faults(ranks, checks),
        *_differences(ranks, checks),
        *_transfers(ranks, checks),
        *_pairs(ranks, checks),
    ]
    return min(found, key=lambda each: (each.place, each.ranks), default=None)


def _faults(ranks: Sequence[int], checks: Sequence[RankChecks]) -> Iterator[SilentError]:
    for rank, own in zip(ranks, checks, strict=True):
        if own.texts:
            yield SilentError(
                Place(*own.places[0].tolist()), (rank,), f"rank {rank}, {{}}: {own.texts[0]}"
            )


def _differences(ranks: Sequence[int], checks: Sequence[RankChecks]) -> Iterator[SilentError]:
    """The first place of each group where its ranks have different checksums."""
    groups: defaultdict[tuple[int, ...], dict[int, Alike]] = defaultdict(dict)
    for rank, own in zip(ranks, checks, strict=True):
        for alike in own.alike:
            groups[tuple(alike.ranks)][rank] = alike
    for members, by_rank in groups.items():
        first, *others = by_rank.values()
        if len(by_rank) == len(members) and all(
            np.array_equal(first.sums, other.sums) and np.array_equal(first.places, other.places)
            for other in others
        ):
            continue
        length = min(len(by_rank[rank].sums) if rank in by_rank else 0 for rank in members)
        rows = [
            [
                (*by_rank[rank].places[row].tolist(), int(by_rank[rank].sums[row]))
                for rank in members
            ]
            for row in range(length)
        ]
        row = next((each for each in rows if len(set(each)) > 1), None)
        if row is None:
            longest = max(by_rank.values(), key=lambda each: len(each.sums))
            yield SilentError(
                Place(*longest.places[length].tolist()), members, f"{named(members)} {_FIRST}"
            )
            continue
        yield SilentError(Place(*row[0][:3]), *_who_differs(members, row))


_FIRST = "differ first in {}"


def _who_differs(members: Sequence[int], values: Sequence[object]) -> tuple[tuple[int, ...], str]:
    """The ranks that may be wrong, and a text: those against a majority, if there is one."""
    value, most = Counter(values).most_common(1)[0]
    others = tuple(rank for rank, own in zip(members, values, strict=True) if own != value)
    if 2 * most <= len(members):
        return tuple(members), f"{named(members)} {_FIRST}"
    majority = [rank for rank in members if rank not in others]
    verb = "differs" if len(others) == 1 else "differ"
    return others, f"{named(others)} {verb} from {named(majority)} first in {{}}"


_Transfer = tuple[tuple[int, ...], int, int, int]  # the group, its number, from whom to whom


def _transfers(ranks: Sequence[int], checks: Sequence[RankChecks]) -> Iterator[SilentError]:
    """Transfers whose checksums differ between sender and receiver."""
    sent: dict[_Transfer, int] = {}
    came: dict[_Transfer, tuple[int, Place]] = {}
    for rank, own in zip(ranks, checks, strict=True):
        for each in own.transferred:
            group = tuple(each.ranks)
            rows = zip(
                *(column.tolist() for column in (each.numbers, each.peers, each.is_sent)),
                *(column.tolist() for column in (each.sums, each.places)),
                strict=True,
            )
            for number, peer, is_sent, total, place in rows:
                if is_sent:
                    sent[group, number, rank, peer] = total
                else:
                    came[group, number, peer, rank] = total, Place(*place)
    for key, (total, place) in came.items():
        if sent.get(key) != total:
            _, _, source, to = key
            text = f"data from rank {source} to rank {to} changed in transfer, in {{}}"
            yield SilentError(place, (source, to), text)


def _pairs(ranks: Sequence[int], checks: Sequence[RankChecks]) -> Iterator[SilentError]:
    """Layers in which not as many pairs of an expert arrived as were chosen."""
    by_layer: defaultdict[int, list[tuple[int, RankChecks, int]]] = defaultdict(list)
    for rank, own in zip(ranks, checks, strict=True):
        for row, layer in enumerate(own.layers.tolist()):
            by_layer[layer].append((rank, own, row))
    for layer, members in by_layer.items():
        chosen = sum(own.chosen[row] for _, own, row in members)
        for etp_rank in {own.etp_rank for _, own, _ in members}:
            of_slice = [(r, own, row) for r, own, row in members if own.etp_rank == etp_rank]
            arrived = sum(own.arrived[row] for _, own, row in of_slice)
            wrong = np.flatnonzero(chosen != arrived)
            if len(wrong):
                expert = int(wrong[0])
                num, came = int(chosen[expert]), int(arrived[expert])
                text = (
                    f"in {{}}, {num:,} tokens chose expert {expert}, but {came:,} arrived at the "
                    "ranks that hold it"
                )
                place = Place.of(0, layer, CheckPoint.DISPATCH)
                yield SilentError(place, tuple(rank for rank, _, _ in of_slice), text)
                break


def named(ranks: Iterable[int]) -> str:
    """Ranks in words: `ranks 0, 1 and 3`."""
    *first, last = map(str, ranks)
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"
