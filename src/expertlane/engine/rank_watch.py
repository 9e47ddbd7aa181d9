"""Totals of serving ranks (time, tokens, bytes), which the launcher reads twice a second."""

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertlane.balance.holding import Placements
from expertlane.balance.transition import Arrangement
from expertlane.engine.comm.progress import Position
from expertlane.engine.elastic.rebalancing import Rebalancer
from expertlane.engine.elastic.recovery import CurrentArrangement
from expertlane.engine.ranks.commands import ReadTotals, Ticket
from expertlane.engine.ranks.losses import Silence
from expertlane.engine.ranks.pool import RankPool
from expertlane.results.step_record import RankTotals
from expertlane.spec.layout import Layout, Members
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Link, Stage

READ_S = 0.5  # between two readings, at least
_KEPT_S = 120.0


@dataclass(frozen=True, eq=False)
class Reading:
    """Totals of all ranks at one time.

    Attributes:
        members: the ranks.
        time_s: time of the reading, on the monotonic clock.
        num_steps: [world_size]; steps that each rank took part in.
        spent_s, waited_s: [world_size, num_stages]; wall time in each stage of a step, and the
            part of it spent waiting for other ranks.
        num_tokens: [num_moe_layers, num_experts]; token-expert pairs.
        rank_tokens: [num_moe_layers, world_size]; pairs that each rank computed; zero where
            another rank of its expert tensor-parallel group reports them.
        link_bytes: [num_links]; sent over each kind of link, summed over ranks.
        overlapped_s, exposed_s: time of transfers that steps overlapped, and the wait for their
            results, summed over ranks; see `RankTotals`.
    """

    members: Members
    time_s: float
    num_steps: npt.NDArray[np.int64]
    spent_s: npt.NDArray[np.float64]
    waited_s: npt.NDArray[np.float64]
    num_tokens: npt.NDArray[np.int64]
    rank_tokens: npt.NDArray[np.int64]
    link_bytes: npt.NDArray[np.int64]
    overlapped_s: float
    exposed_s: float


class RankWatch:
    """Reads the totals of all ranks twice a second; used in the thread that has the pool.

    Attributes:
        layers: the indices of the MoE layers.
        members: the ranks whose totals the readings hold.
        readings: those of the last two minutes, the latest last; never empty. Other threads may
            copy it.
    """

    def __init__(
        self,
        pool: RankPool,
        arranged: CurrentArrangement,
        model: ModelConfig,
        rebalancer: Rebalancer | None = None,
    ) -> None:
        self.members, self.num_experts = arranged.now.members, model.num_experts
        self.layers = model.moe_layers
        self._num_layers = model.num_hidden_layers
        self.rebalancer = rebalancer
        self._pool, self._arranged = pool, arranged
        self._first = arranged.now  # the arrangement with which these members began
        self._ticket: Ticket[RankTotals] | None = None
        self._before: dict[int, RankTotals] = {}  # by process number: totals of earlier processes
        self._asked_s = time.monotonic()
        self._latest = pool.call(ReadTotals(), ranks=self.numbers)
        first = self._reading(self._latest)
        self.readings: deque[Reading] = deque([first], maxlen=int(_KEPT_S / READ_S))

    @property
    def layout(self) -> Layout:
        """The present layout."""
        return self.members.layout

    @property
    def stage_of_layer(self) -> list[int]:
        """[num_moe_layers]; the pipeline stage of each MoE layer."""
        stages = self.layout.stage_of_layers(self._num_layers)
        return [stages[layer] for layer in self.layers]

    @property
    def numbers(self) -> tuple[int, ...]:
        """[world_size]; the process of each rank."""
        return self.members.numbers

    def poll(self) -> None:
        """Add a reading if all ranks have answered, and ask them again when due; never waits.

        Raises:
            RankError: a rank died.
        """
        if self._ticket is not None:
            if not self._ticket.is_done:
                return
            results = self._ticket.results
            self._ticket = None
            self._latest = [self._with_before(number, results[number]) for number in self.numbers]
            self.readings.append(self._reading(self._latest))
        if time.monotonic() - self._asked_s >= READ_S:
            self._ask()

    def _ask(self) -> None:
        self._asked_s = time.monotonic()
        self._ticket = self._pool.submit(ReadTotals(), ranks=self.numbers)

    def begin_again(self, replaced: Collection[int]) -> None:
        """Ask the ranks of a new epoch; to totals of new processes, add those of the replaced."""
        self._ticket = None
        for number, totals in zip(self.numbers, self._latest, strict=True):
            if number in replaced:
                self._before[number] = totals
        self._ask()

    def reshape(self, arrangement: Arrangement) -> None:
        """Watch the ranks of another layout, which count from zero.

        Their totals go on from those that the same process numbers had before. Ranks that are gone
        stay part of the sums over ranks.
        """
        self._ticket = None
        for number, totals in zip(self.numbers, self._latest, strict=True):
            self._before[number] = totals
        none = self._latest[0].nothing()
        self.members, self._first = arrangement.members, arrangement
        self._latest = [self._before.get(number, none) for number in self.numbers]
        self.readings = deque([self._reading(self._latest)], maxlen=self.readings.maxlen)

    def _with_before(self, number: int, totals: RankTotals) -> RankTotals:
        return totals + self._before[number] if number in self._before else totals

    @property
    def positions(self) -> list[Position]:
        """[world_size]; the position in a step that each rank reported last."""
        return [self._pool.position(number) for number in self.numbers]

    def silence(self) -> Silence | None:
        """The longest silence of ranks that have a command; see `RankPool.silence`."""
        return self._pool.silence()

    @property
    def placements(self) -> Sequence[Placements]:
        """[replicas][num_hidden_layers]; which rank of a replica holds which expert."""
        now = self._arranged.now  # other threads may ask between a change and `reshape`
        return (now if now.members == self.members else self._first).placements

    def since(self, seconds: float) -> Reading:
        """The latest reading at least `seconds` older than the last one, else the oldest."""
        readings = list(self.readings)
        until_s = readings[-1].time_s - seconds
        return next((each for each in reversed(readings) if each.time_s <= until_s), readings[0])

    def imbalance(self, seconds: float) -> dict[int, float]:
        """By hidden layer, pairs of the fullest rank over the mean of its expert-parallel group.

        Counts the last `seconds`. Of several replicas, the highest ratio; layers without tokens are
        left out.
        """
        latest, old = self.readings[-1], self.since(seconds)
        layout = latest.members.layout
        if old.members != latest.members:  # the layout has just changed
            return {}
        found = {}
        for layer, of_rank in zip(self.layers, latest.rank_tokens - old.rank_tokens, strict=True):
            by_replica = of_rank.reshape(layout.replicas, -1)
            shares = [each.max() * layout.ep / each.sum() for each in by_replica if each.sum() > 0]
            if shares:
                found[layer] = float(max(shares))
        return found

    def _of_stages(self, of_ranks: Sequence[int]) -> list[int]:
        """[replicas x pp]; the maximum over the ranks of each pipeline stage."""
        size = self.layout.stage_size
        return [max(of_ranks[first : first + size]) for first in range(0, len(of_ranks), size)]

    def _reading(self, totals: Sequence[RankTotals]) -> Reading:
        tokens = np.zeros((len(self.layers), self.num_experts), dtype=np.int64)
        of_rank = np.zeros((len(self.layers), len(totals)), dtype=np.int64)
        for rank, each in enumerate(totals):
            own = each.num_tokens[self.layers]
            tokens[:, each.experts] += own
            of_rank[:, rank] = own.sum(axis=1)
        gone = [each for number, each in self._before.items() if number not in self.numbers]
        for each in gone:
            tokens[:, each.experts] += each.num_tokens[self.layers]
        both = [*totals, *gone]
        return Reading(
            members=self.members,
            time_s=time.monotonic(),
            num_steps=np.array([each.num_steps for each in totals]),
            spent_s=np.array([each.spent_ns for each in totals]).reshape(-1, len(Stage)) / 1e9,
            waited_s=np.array([each.waited_ns for each in totals]).reshape(-1, len(Stage)) / 1e9,
            num_tokens=tokens,
            rank_tokens=of_rank,
            link_bytes=np.array([each.sent_bytes for each in both])
            .reshape(-1, len(Link))
            .sum(axis=0),
            overlapped_s=sum(each.overlapped_ns for each in both) / 1e9,
            exposed_s=sum(each.exposed_ns for each in both) / 1e9,
        )
