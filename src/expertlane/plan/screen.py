"""Every candidate deployment priced at once, from expected counts and one rank of each stage."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np

from expertlane.balance.placement import Placement
from expertlane.balance.placement_file import Placements
from expertlane.cost.laws.execution import LIKELY, Terms
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.multi_token import MultiToken, with_drafting_layer
from expertlane.cost.step.batch_sizes import Scenarios
from expertlane.cost.step.expected_counts import ExpectedFanOut, sampled_layers
from expertlane.cost.step.operation import Floats, HandOver, Ints
from expertlane.cost.step.stage_mesh import StageMesh
from expertlane.memory import Capacity, PlacedModel, prefill_step_tokens
from expertlane.plan.candidates import Candidate, Goals, PlanRequest
from expertlane.plan.stage_times import ScenarioTimes, StageSteps, price
from expertlane.plan.throughput import (
    Pipelining,
    Prompts,
    Steps,
    ThroughputCurve,
    one_pool,
    step_estimates,
)
from expertlane.spec.workload import Workload


class TooLarge(NamedTuple):
    """A candidate that does not fit."""

    candidate: Candidate
    capacity: Capacity


@dataclass(frozen=True, eq=False)
class ScreenedCandidate:
    """A candidate that fits; N numbers of sequences, of which `place` is the best.

    Attributes:
        place: None where it breaks a limit with every number of sequences.
    """

    candidate: Candidate
    capacity: Capacity
    steps: Steps
    served: ThroughputCurve
    place: int | None

    @property
    def tps(self) -> float:
        """Output tokens a second at its best, 0 where it breaks a limit."""
        return 0.0 if self.place is None else float(self.served.tps[LIKELY, self.place])

    @property
    def num_seqs(self) -> int:
        """Running at once at its best, over the whole system; 0 where it breaks a limit."""
        return 0 if self.place is None else int(self.steps.num_seqs[self.place])

    def next_best(self, goals: Goals) -> "ScreenedCandidate":
        """The same with the best number of sequences among those that serve less than this one."""
        return replace(self, place=self.served.best(goals, self.tps))

    def nearest(self, goals: Goals) -> "ScreenedCandidate":
        """The same with the number of sequences that comes nearest to the limits."""
        return replace(self, place=int(self.served.breach(goals).argmin()))


Screened = ScreenedCandidate | TooLarge


def fitting(screened: Iterable[Screened]) -> list[ScreenedCandidate]:
    """The candidates that fit."""
    return [each for each in screened if isinstance(each, ScreenedCandidate)]


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
    """The parts of one phase.

    Attributes:
        place: of a part among scenarios.
        stages: [pp]; what a part takes on each, once it is priced.
    """

    def __init__(self, steps: StageSteps, parts: Iterable[_Part], num_drafts: int = 0) -> None:
        self.place = {part: place for place, part in enumerate(sorted(set(parts)))}
        num_seqs, num_new, num_cached, stage_seqs = np.array(list(self.place), dtype=np.int64).T
        layout = steps.mesh.layout
        self.scenarios = Scenarios(
            layout.tp, num_seqs, num_new, num_cached, stage_seqs, num_drafts, layout.dp
        )
        self.lists = steps.lists(self.scenarios)
        self.stages: list[ScenarioTimes] = []
        self._steps = steps

    def take(self, priced: Iterator[ScenarioTimes]) -> None:
        """Take the times of `lists` from those that come next."""
        self.stages = self._steps.stages(list(islice(priced, len(self.lists))))


@dataclass(frozen=True, eq=False)
class Structure:
    """Candidates that share their steps, which are priced once.

    Attributes:
        num_seqs: [N]; of a data-parallel rank, that decode steps are estimated for; none where no
            sequence fits.
        prefill_tokens: of a data-parallel rank's prefill step, at most.
        tokens_per_step: [3]; of a decoding sequence.
    """

    candidates: list[Candidate]
    steps: StageSteps
    workload: Workload
    room: Capacity
    num_seqs: Ints
    prefill_tokens: int
    tokens_per_step: Floats

    @cached_property
    def phases(self) -> list[_Phase]:
        """Decode and prefill; neither where no sequence fits."""
        if not len(self.num_seqs):
            return []
        hows = [Pipelining.of(candidate.options) for candidate in self.candidates]
        decode = [part for how in hows for part in self._decode_parts(how)]
        prefill = [self._prefill_part(how)[0] for how in hows]
        drafts = self.steps.num_drafts
        return [_Phase(self.steps, decode, drafts), _Phase(self.steps, prefill)]

    def results(self, links: LinkModel, terms: Terms, goals: Goals) -> Iterator[Screened]:
        """The outcome of every candidate, once `phases` are priced."""
        if not self.phases:
            yield from (TooLarge(candidate, self.room) for candidate in self.candidates)
            return
        layout, num_all = self.steps.mesh.layout, self.workload.num_sequences
        num_seqs = np.minimum(self.num_seqs * (layout.replicas * layout.dp), num_all)
        decode, prefill = ((phase, self._hand_over_s(links, phase)) for phase in self.phases)

        def estimates(
            of_phase: tuple[_Phase, Floats], parts: list[_Part], how: Pipelining
        ) -> Floats:
            phase, hand_over_s = of_phase
            return step_estimates(
                phase.stages,
                hand_over_s,
                np.array([phase.place[part] for part in parts]),
                terms,
                how,
                self.steps.model.num_hidden_layers,
                layout,
            )

        for candidate in self.candidates:
            how = Pipelining.of(candidate.options)
            decoding = estimates(decode, self._decode_parts(how), how)
            part, how_prefill, prompts = self._prefill_part(how)
            prefilling = estimates(prefill, [part], how_prefill)
            steps = Steps(
                layout,
                num_seqs,
                decoding,
                prefilling[:, 0],
                prompts,
                num_all,
                self.tokens_per_step,
            )
            served = one_pool(steps, self.workload)
            yield ScreenedCandidate(candidate, self.room, steps, served, served.best(goals))

    def _decode_parts(self, how: Pipelining) -> list[_Part]:
        context = self.workload.mean_context
        sizes = [-(-num // how.num_parts) for num in self.num_seqs.tolist()]
        num_new = 1 + self.steps.num_drafts
        return [_Part(num, num_new, context, self._stage_seqs(num)) for num in sizes]

    def _stage_seqs(self, num_seqs: int) -> int:
        """Sequences of all data-parallel ranks of the fullest replica, where one has so many."""
        layout = self.steps.mesh.layout
        return min(num_seqs * layout.dp, -(-self.workload.num_sequences // layout.replicas))

    def _prefill_part(self, how: Pipelining) -> tuple[_Part, Pipelining, Prompts]:
        """A part of a prefill step, how the step is cut, and the whole of it.

        Steps are cut between sequences: what holds one prompt, or a chunk of one, is not. Rotating
        micro-batches are whole steps, in flight together, of prompts that may run at once.
        """
        prompt, most = self.workload.prompt_len, self.prefill_tokens
        num_running = int(self.num_seqs[-1])
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
        model, mesh = self.steps.model, self.steps.mesh
        row_bytes = model.hidden_size * self.steps.types.activation_bytes
        num_bytes, layout = phase.scenarios.owned * row_bytes, mesh.layout
        if layout.pp == 1:
            return np.zeros((3, len(num_bytes)))
        ranks = np.arange(layout.replica_size - layout.stage_size)
        nodes, next_nodes = (each // mesh.ranks_per_node for each in (ranks, ranks + mesh.size))
        is_remote = np.full(len(num_bytes), (nodes != next_nodes).any())
        return links.hand_over(HandOver(num_bytes, is_remote)).bounds


_MOST_BATCHES = 12  # numbers of sequences that are tried
_PRICED_TOGETHER = 48  # structures: enough for long arrays, few enough to say how far it is


class Screen:
    """Prices candidates of one model on one cluster."""

    def __init__(self, request: PlanRequest) -> None:
        self._request = request
        self._profile = request.cluster.profile
        self._links = LinkModel(self._profile)
        self._terms = Terms.of(self._profile, request.setting.execution)
        self._fan_outs: dict[tuple[object, ...], ExpectedFanOut] = {}
        self._layers = sampled_layers(request.model, request.setting.routing)

    def run(
        self, candidates: Iterable[Candidate], advance: Callable[[int], None]
    ) -> list[Screened]:
        """All of them, in order of structure: those with the same steps after each other.

        Args:
            advance: called with a number of candidates that are done.
        """
        alike: defaultdict[object, list[Candidate]] = defaultdict(list)
        for candidate in candidates:
            layout, options, num_drafts = candidate
            key = layout, options.dispatch, options.num_redundant_experts, num_drafts
            alike[key].append(candidate)
        screened: list[Screened] = []
        rest = iter(alike.values())
        while some := list(islice(rest, _PRICED_TOGETHER)):
            structures = [self._structure(candidates) for candidates in some]
            phases = [phase for each in structures for phase in each.phases]
            lists = [steps for phase in phases for steps in phase.lists]
            types = self._request.setting.types
            priced = iter(price(self._profile, types, self._terms, lists))
            for phase in phases:
                phase.take(priced)
            for each in structures:
                screened += each.results(self._links, self._terms, self._request.goals)
            advance(sum(map(len, some)))
        return screened

    def _structure(self, candidates: list[Candidate]) -> Structure:
        (layout, options, num_drafts), request = candidates[0], self._request
        model, setting, workload = request.model, request.setting, request.workload
        placement = Placement.linear(model.num_experts, layout.ep, options.num_redundant_experts)
        placements: Placements = tuple(
            None if model.is_dense(layer) else placement for layer in range(model.num_hidden_layers)
        )
        assert options.dispatch != "auto", "candidates name their form"
        prefill_tokens = prefill_step_tokens(workload, layout, setting.step_tokens)
        held = with_drafting_layer(model, num_drafts)
        of_drafts = placements[-1:] * (num_drafts > 0)
        room = PlacedModel(held, layout, setting.types, placements + of_drafts).capacity(
            self._profile.device.memory_bytes, workload.max_len, prefill_tokens
        )
        mesh = StageMesh.of(layout, 0, 0, self._profile.ranks_per_node)
        fan_out = self._fan_out(mesh, placement)
        steps = StageSteps(
            model, setting.types, mesh, fan_out, options.dispatch, options.payload, num_drafts
        )
        drafts = setting.multi_token if num_drafts else MultiToken()
        wanted = -(-workload.num_sequences // (layout.replicas * layout.dp))
        num_seqs = _numbers_up_to(min(room.max_seqs, wanted))
        return Structure(
            candidates, steps, workload, room, num_seqs, prefill_tokens, drafts.tokens_bounds
        )

    def _fan_out(self, mesh: StageMesh, placement: Placement) -> ExpectedFanOut:
        key = mesh.size, placement.ep, placement.num_slots
        if key not in self._fan_outs:
            routing = self._request.setting.routing
            self._fan_outs[key] = ExpectedFanOut.mean(
                [
                    ExpectedFanOut.of_sample(mesh, placement, routing, layer)
                    for layer in self._layers
                ]
            )
        return self._fan_outs[key]


def _numbers_up_to(most: int) -> Ints:
    """Descending by halves, at most `_MOST_BATCHES`; returned ascending."""
    numbers: list[int] = []
    while most >= 1 and len(numbers) < _MOST_BATCHES:
        numbers.append(most)
        most //= 2
    return np.array(numbers[::-1], dtype=np.int64)
