"""Steps that are submitted and not committed."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from expertlane.schedule.plan import Batch, StepPlan
from expertlane.schedule.running import Rows, RunningTable
from expertlane.spec.names import Phase


class _Flight(NamedTuple):
    """A step in flight: its rows of each table that takes part, and the batch of each."""

    replica: int
    phase: Phase
    of_tables: list[tuple[RunningTable, Rows, Batch]]


class StepsInFlight:
    """What each step in flight computes of which table, and how many each replica has.

    Attributes:
        num: [replicas].
    """

    def __init__(self, num_replicas: int) -> None:
        self.num = [0] * num_replicas
        self._flights: dict[int, _Flight] = {}  # by step

    def __bool__(self) -> bool:
        return bool(self._flights)

    def begin(self, plan: StepPlan, of_tables: Iterable[tuple[RunningTable, Rows, Batch]]) -> None:
        """Add a step that is submitted, on those of the tables whose batch holds anything."""
        taking_part = [each for each in of_tables if each[2].num_seqs]
        for table, rows, batch in taking_part:
            table.begin_step(rows, plan.step, batch)
        self._flights[plan.step] = _Flight(plan.replica, plan.phase, taking_part)
        self.num[plan.replica] += 1

    def end(self, plan: StepPlan) -> list[tuple[RunningTable, Rows, Batch]]:
        """Take out a finished step; gives what it computed."""
        self.num[plan.replica] -= 1
        return self._flights.pop(plan.step).of_tables

    def has_phase(self, replica: int, phase: Phase) -> bool:
        """Whether a replica has a step of a phase in flight."""
        flights = self._flights.values()
        return any(each.replica == replica and each.phase is phase for each in flights)

    def lose(self, kept: Iterable[StepPlan], lost: Iterable[RunningTable]) -> None:
        """Keep some steps alone, without what they compute of tables that are lost."""
        gone = set(map(id, lost))
        flights, self._flights = self._flights, {}
        self.num = [0] * len(self.num)
        for plan in kept:
            flight = flights[plan.step]
            left = [each for each in flight.of_tables if id(each[0]) not in gone]
            self._flights[plan.step] = flight._replace(of_tables=left)
            self.num[plan.replica] += 1

    def move(self, num_replicas: int, new_replicas: Mapping[int, int]) -> None:
        """Give replicas other numbers.

        Args:
            new_replicas: by the number so far, of each that has steps in flight.
        """
        self.num = [0] * num_replicas
        for step, flight in self._flights.items():
            replica = new_replicas[flight.replica]
            self._flights[step] = flight._replace(replica=replica)
            self.num[replica] += 1
