"""A runner without ranks: it checks what it is given and computes tokens from what it was fed."""

from collections.abc import Callable, Sequence

import numpy as np

from expertlane.schedule.plan import StepOutcome, StepPlan


def next_token(seq: int, position: int, token: int) -> int:
    """A stand-in for the model: depends on the sequence, the position and the token fed there."""
    return (31 * seq + 7 * position + 3 * token + 1) % 1009


class FakeRunner:
    """Keeps a cache of token ids by (replica, dp rank, slot) and a log of events.

    Args:
        choose: which of the handles in flight is done first.
    """

    def __init__(self, choose: Callable[[Sequence[int]], int] = lambda handles: handles[0]) -> None:
        self.plans: list[StepPlan] = []
        self.fed: dict[int, list[int]] = {}
        self.in_flight: dict[int, StepPlan] = {}
        self.most_in_flight: dict[int, int] = {}
        self.events: list[tuple[str, int]] = []
        self._owner: dict[tuple[int, int, int], int] = {}
        self._choose = choose

    def submit(self, plan: StepPlan) -> int:
        running = set().union(*(seqs_of(other) for other in self.in_flight.values()))
        assert not running & set(seqs_of(plan)), "a sequence is in two steps at once"
        self.plans.append(plan)
        self.in_flight[plan.step] = plan
        num = sum(other.replica == plan.replica for other in self.in_flight.values())
        self.most_in_flight[plan.replica] = max(num, self.most_in_flight.get(plan.replica, 0))
        self.events.append(("submit", plan.step))
        return plan.step

    def first_done(self, handles: Sequence[int]) -> int:
        assert sorted(handles) == sorted(self.in_flight)
        return self._choose(handles)

    def collect(self, handle: int) -> StepOutcome:
        plan = self.in_flight.pop(handle)
        self.events.append(("collect", handle))
        token_ids = {}
        for micro_batch in plan.micro_batches:
            for dp_rank, batch in enumerate(micro_batch):
                ends = np.cumsum(batch.num_scheduled_tokens)
                assert batch.num_tokens == (ends[-1] if len(ends) else 0)
                for i, seq in enumerate(batch.seq_ids.tolist()):
                    place = (plan.replica, dp_rank, int(batch.slots[i]))
                    assert self._owner.setdefault(place, seq) == seq, "a slot changed hands"
                    cache = self.fed.setdefault(seq, [])
                    assert batch.num_computed_tokens[i] == len(cache)
                    start = ends[i] - batch.num_scheduled_tokens[i]
                    cache += batch.token_ids[start : ends[i]].tolist()
                    token_ids[seq] = next_token(seq, len(cache) - 1, cache[-1])
        return StepOutcome(token_ids, {}, (), submitted_s=0.0, finished_s=0.0)


def seqs_of(plan: StepPlan) -> list[int]:
    """All sequences of a plan."""
    return [
        seq for batches in plan.micro_batches for batch in batches for seq in batch.seq_ids.tolist()
    ]
