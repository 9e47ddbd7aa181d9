"""Candidates that run the same steps: one layout, dispatch form and placement."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from expertlane.cost.laws.execution import Terms
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.step.batch_sizes import Scenarios
from expertlane.cost.step.operation import Floats, HandOver, Ints
from expertlane.cost.step.stage_mesh import StageMesh
from expertlane.cost.step.step_list import ExpectedStepList
from expertlane.memory import Capacity
from expertlane.plan.candidates import Candidate
from expertlane.plan.setting import Traffic
from expertlane.plan.stage_times import ScenarioTimes, StageSteps
from expertlane.plan.step_time import Pipelining, StepEstimates, step_estimates


class Prompts(NamedTuple):
    """What a data-parallel rank computes in a prefill step, or a round of rotating ones.

    Attributes:
        num_seqs: prompts, or one chunk of one in each step in flight.
        num_new, num_cached: tokens of each, and those before them.
        num_steps: that a prompt takes.
    """

    num_seqs: int
    num_new: int
    num_cached: int
    num_steps: int


@dataclass(frozen=True, eq=False)
class Screened:
    """A candidate's steps; N numbers of sequences.

    Attributes:
        capacity: what memory allows; a candidate that does not fit has no estimates.
        num_seqs: [N]; sequences of a data-parallel rank in a decode step, ascending.
        decode: None where it does not fit.
        prefill: one step, or round of rotating ones; None where it does not fit.
        prompts: of that step.
    """

    candidate: Candidate
    capacity: Capacity
    num_seqs: Ints
    decode: StepEstimates | None = None
    prefill: StepEstimates | None = None
    prompts: Prompts | None = None


class _Part(NamedTuple):
    """Sequences of a data-parallel rank in a part of a micro-batch, and of each its tokens.

    Attributes:
        stage_seqs: sequences of all data-parallel ranks.
    """

    num_seqs: int
    num_new: int
    num_cached: int
    stage_seqs: int


class _Phase:
    """The parts of one phase, and what they take."""

    def __init__(self, plan: StageSteps, parts: list[_Part]) -> None:
        self._plan = plan
        self._parts = sorted(set(parts))
        columns = np.array(self._parts, dtype=np.int64).T
        self.scenarios = Scenarios(plan.tp, *columns)
        self.lists = plan.lists(self.scenarios)
        self.stages: list[ScenarioTimes] = []
        self.imbalance_s: list[Floats] = []

    def take_prices(self, priced: Iterator[ScenarioTimes]) -> None:
        """Those of `lists`, in order."""
        own = list(islice(priced, len(self.lists)))
        self.stages, self.imbalance_s = self._plan.stages(own), self._plan.imbalance_s(own)

    def places(self, parts: list[_Part]) -> Ints:
        """Where each part stands."""
        place = {part: number for number, part in enumerate(self._parts)}
        return np.array([place[part] for part in parts])


class Structure:
    """Prices once what its candidates share.

    Args:
        num_seqs: [N]; that decode steps are estimated for.
        prefill_tokens: of a data-parallel rank's prefill step, at most.

    Attributes:
        candidates: those of this structure.
    """

    def __init__(
        self,
        candidates: list[Candidate],
        plan: StageSteps,
        mesh: StageMesh,
        traffic: Traffic,
        room: Capacity,
        num_seqs: Ints,
        prefill_tokens: int,
    ) -> None:
        self.candidates = candidates
        self._plan = plan
        self._mesh = mesh
        self._traffic = traffic
        self._room = room
        self._num_seqs = num_seqs
        self._prefill_tokens = prefill_tokens
        self._phases: list[_Phase] = []

    @property
    def fits(self) -> bool:
        """Whether any sequence does."""
        return self._room.max_seqs > 0

    def lists(self) -> list[ExpectedStepList]:
        """All steps of both phases; to be priced."""
        hows = [how_of(candidate) for candidate in self.candidates]
        decode = [part for how in hows for part in self._decode_parts(how)]
        prefill = [self._prefill_part(how)[0] for how in hows]
        self._phases = [_Phase(self._plan, decode), _Phase(self._plan, prefill)]
        return [steps for phase in self._phases for steps in phase.lists]

    def take_prices(self, priced: Iterator[ScenarioTimes]) -> None:
        """Those of `lists`, in order."""
        for phase in self._phases:
            phase.take_prices(priced)

    def results(self, links: LinkModel, terms: Terms) -> Iterator[Screened]:
        """Of every candidate."""
        if not self.fits:
            for candidate in self.candidates:
                yield Screened(candidate, self._room, self._num_seqs)
            return
        hand_overs = [self._hand_over_s(links, phase) for phase in self._phases]
        decode, prefill = self._phases
        for candidate in self.candidates:
            how = how_of(candidate)
            part, how_prefill, prompts = self._prefill_part(how)
            decoding, prefilling = (
                step_estimates(
                    phase.stages,
                    phase.imbalance_s,
                    hand_over_s,
                    phase.places(parts),
                    terms,
                    of_phase,
                    self._plan.num_layers,
                    self._mesh.layout.replica_size,
                )
                for phase, hand_over_s, parts, of_phase in (
                    (decode, hand_overs[0], self._decode_parts(how), how),
                    (prefill, hand_overs[1], [part], how_prefill),
                )
            )
            yield Screened(candidate, self._room, self._num_seqs, decoding, prefilling, prompts)

    def _decode_parts(self, how: Pipelining) -> list[_Part]:
        context = self._traffic.mean_context
        sizes = [-(-num // how.num_parts) for num in self._num_seqs.tolist()]
        return [_Part(num, 1, context, self._stage_seqs(num)) for num in sizes]

    def _stage_seqs(self, num_seqs: int) -> int:
        """Of all data-parallel ranks of the fullest replica, where one has so many."""
        layout = self._mesh.layout
        return min(num_seqs * layout.dp, -(-self._traffic.num_sequences // layout.replicas))

    def _prefill_part(self, how: Pipelining) -> tuple[_Part, Pipelining, Prompts]:
        """A part of a prefill step, how the step is cut, and the whole of it.

        Steps are cut between sequences: what holds one prompt, or a chunk of one, is not. Rotating
        micro-batches are whole steps, in flight together, of prompts that may run at once.
        """
        prompt, most = self._traffic.prompt_len, self._prefill_tokens
        num_running = int(self._num_seqs[-1])
        rotating = min(how.num_micro_batches, num_running)
        in_flight = rotating if how.schedule == "rotating" else 1
        seqs = min(most // prompt, num_running // in_flight)
        if seqs < 2:
            new = min(prompt, most)
            cached = (prompt - new) // 2  # on average over a prompt's chunks
            whole = Pipelining(False, in_flight, how.schedule)
            num_steps = -(-prompt // new)
            part = _Part(1, new, cached, self._stage_seqs(1))
            return part, whole, Prompts(in_flight, new, cached, num_steps)
        num_parts = 1 + how.overlap
        if how.schedule == "rotating":
            how = Pipelining(how.overlap, in_flight, how.schedule)
        else:
            num_parts = how.num_parts
        if num_parts > seqs:
            how, num_parts = Pipelining(False, in_flight, how.schedule), 1
        of_part = -(-seqs // num_parts)
        part = _Part(of_part, prompt, 0, self._stage_seqs(of_part))
        num_seqs = min(of_part * num_parts * in_flight, num_running)
        return part, how, Prompts(num_seqs, prompt, 0, 1)

    def _hand_over_s(self, links: LinkModel, phase: _Phase) -> Floats:
        """[3, S]; to the next stage, over the slowest link that any rank uses."""
        num_bytes = phase.scenarios.owned * self._plan.row_bytes
        layout = self._mesh.layout
        if layout.pp == 1:
            return np.zeros((3, len(num_bytes)))
        ranks = np.arange(layout.replica_size - layout.stage_size)
        per_node = self._mesh.ranks_per_node
        is_remote = bool((ranks // per_node != (ranks + layout.stage_size) // per_node).any())
        times = links.hand_over(HandOver(num_bytes, np.full(len(num_bytes), is_remote)))
        return np.stack([times.low, times.seconds, times.high])


def how_of(candidate: Candidate) -> Pipelining:
    """How a candidate's steps are cut."""
    options = candidate.options
    return Pipelining(
        bool(options.overlap), options.num_micro_batches, options.micro_batch_schedule
    )
