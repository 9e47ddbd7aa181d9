"""A rank's running totals of time, tokens and bytes, cheap enough for every step of a server.

Unlike a record of a step they let layers run in one C++ call, which adds to the same memory.
"""

from array import array
from collections.abc import Callable, Sequence
from time import monotonic_ns

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertlane.results.step_record import RankTotals
from expertlane.spec.names import Link, Stage

# Cells that C++ adds to: the time when the current stage began, the stage, nanoseconds by stage.
_STAGE, _SPENT = 1, 2
_OWN = len(Link)  # in place of a link: rows that stay on the rank

Sent = tuple[int, ...]  # bytes by link


def links_of(nodes: Sequence[int], rank: int) -> list[int]:
    """The kind of link [size] from one place in a group to each, for `Meter.sent`.

    Args:
        nodes: [size]; node of each member.
        rank: the sender's place in the group.
    """
    links = [Link.INTRA_NODE if node == nodes[rank] else Link.INTER_NODE for node in nodes]
    return [_OWN if place == rank else int(link) for place, link in enumerate(links)]


class Meter:
    """Totals since the meter was made; see `RankTotals`.

    Attributes:
        num_steps: steps; counted by the recorder.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_steps = 0
        self._cells = array("q", [monotonic_ns(), Stage.IDLE, *[0] * len(Stage)])
        self._waited = [0] * len(Stage)
        self._sent = [0] * (len(Link) + 1)
        self._overlapped = self._exposed = 0
        self._num_pairs_saved, self._copies_s = 0, 0.0
        self._tokens = np.zeros((num_layers, num_experts), dtype=np.int64)
        # By layer: the experts held now, and tokens of each since they are held.
        self._held: dict[int, tuple[Sequence[int], Tensor]] = {}

    @property
    def address(self) -> int:
        """Address of the cells that C++ adds to, int64 each."""
        return self._cells.buffer_info()[0]

    def enter(self, stage: Stage, now_ns: int) -> None:
        """End the current stage at `now_ns`, and begin another."""
        cells = self._cells
        cells[2 + cells[1]] += now_ns - cells[0]  # hot: names would cost a third more
        cells[0], cells[1] = now_ns, stage

    def waited(self, begun_ns: int) -> None:
        """Add a wait for other ranks, which ends now, to the current stage."""
        waited_ns = monotonic_ns() - begun_ns
        self._waited[self._cells[_STAGE]] += waited_ns

    def transferred(self, posted_ns: int, needed_ns: int) -> None:
        """Add a transfer that ends now: hidden until `needed_ns`, exposed from then on."""
        self._overlapped += needed_ns - posted_ns
        self._exposed += monotonic_ns() - needed_ns

    def sent(self, links: Sequence[int], num_rows: Sequence[int], row_bytes: int) -> None:
        """Add rows that are sent to the members of a group.

        Args:
            links: [size]; of `links_of`.
            num_rows: [size].
        """
        sent = self._sent
        for link, num in zip(links, num_rows, strict=True):
            sent[link] += num * row_bytes

    def sent_by(self, run: Callable[[], None]) -> Sent:
        """Bytes that a call sends, by link; they are not added to the totals.

        A graph that records the call adds them with `add_sent` each time it is launched.
        """
        before, self._sent = self._sent, [0] * len(self._sent)
        run()
        sent, self._sent = tuple(self._sent), before
        return sent

    def add_sent(self, sent: Sent) -> None:
        """Add the bytes that a launched graph sends, as no Python counts them."""
        self._sent = [total + more for total, more in zip(self._sent, sent, strict=True)]

    def shared_out(self, num_saved: int, seconds: float) -> None:
        """Add effect and cost of balancing a layer's copies; see `StepCounters.count_copies`."""
        self._num_pairs_saved += num_saved
        self._copies_s += seconds

    def counts(self, layer: int, experts: Sequence[int], device: torch.device) -> Tensor:
        """Counts [num_held] int64 of tokens of each expert held in a layer; callers add to them.

        Args:
            experts: [num_held]; logical ids. The same object as long as they do not change.
        """
        held = self._held.get(layer)
        if held is None or held[0] is not experts:
            self._take(layer)
            held = experts, torch.zeros(len(experts), dtype=torch.int64, device=device)
            self._held[layer] = held
        return held[1]

    def _take(self, layer: int) -> None:
        if layer in self._held:
            experts, counts = self._held[layer]
            np.add.at(self._tokens[layer], list(experts), counts.cpu().numpy())
            counts.zero_()

    def totals(self) -> RankTotals:
        """The totals so far, the current stage included."""
        now_ns = monotonic_ns()
        self.enter(Stage(self._cells[_STAGE]), now_ns)
        for layer in self._held:
            self._take(layer)
        experts = np.flatnonzero(self._tokens.any(axis=0))
        return RankTotals(
            num_steps=self.num_steps,
            spent_ns=_whole(self._cells[_SPENT:]),
            waited_ns=_whole(self._waited),
            experts=experts.astype(np.int64),
            num_tokens=np.ascontiguousarray(self._tokens[:, experts]),
            sent_bytes=_whole(self._sent[:_OWN]),
            overlapped_ns=self._overlapped,
            exposed_ns=self._exposed,
            num_pairs_saved=self._num_pairs_saved,
            copies_ns=round(1e9 * self._copies_s),
        )


def _whole(numbers: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)
