"""Every candidate deployment priced at once, from expected counts and one rank of each stage."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from expertlane.balance.placement import Placement
from expertlane.balance.placement_file import Placements
from expertlane.cost.laws.execution import Terms
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.step.batch_sizes import Scenarios
from expertlane.cost.step.expected_counts import ExpectedFanOut, sampled_layers
from expertlane.cost.step.operation import Floats, HandOver, Ints
from expertlane.cost.step.stage_mesh import StageMesh
from expertlane.cost.step.step_list import ExpectedStepList
from expertlane.memory import Capacity, capacity, prefill_step_tokens
from expertlane.plan.candidates import Candidate
from expertlane.plan.request import Setting, Traffic
from expertlane.plan.stage_times import ScenarioTimes, StageSteps, price
from expertlane.plan.throughput import Pipelining, Prompts, StepEstimates, step_estimates
from expertlane.spec.deployment import DispatchChoice
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig


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
        hows = [pipelining_of(candidate) for candidate in self.candidates]
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
            how = pipelining_of(candidate)
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
        return links.hand_over(HandOver(num_bytes, np.full(len(num_bytes), is_remote))).bounds


def pipelining_of(candidate: Candidate) -> Pipelining:
    """How a candidate's steps are cut."""
    options = candidate.options
    return Pipelining(
        bool(options.overlap), options.num_micro_batches, options.micro_batch_schedule
    )


_MOST_BATCHES = 12  # numbers of sequences that are tried
_PRICED_TOGETHER = 48  # structures: enough for long arrays, few enough to say how far it is


class Screen:
    """Prices candidates of one model on one cluster."""

    def __init__(
        self, model: ModelConfig, cluster: ModelledCluster, traffic: Traffic, setting: Setting
    ) -> None:
        self._model = model
        self._cluster = cluster
        self._traffic = traffic
        self._setting = setting
        self._profile = cluster.profile
        self._links = LinkModel(cluster.profile)
        self._terms = Terms.of(cluster.profile, setting.execution)
        self._fan_outs: dict[tuple[object, ...], ExpectedFanOut] = {}
        self._layers = sampled_layers(model, setting.routing)

    def run(
        self, candidates: Iterable[Candidate], advance: Callable[[int], None]
    ) -> list[Screened]:
        """All of them, in order of structure: those with the same steps after each other.

        Args:
            advance: called with a number of candidates that are done.
        """
        alike: defaultdict[tuple[Layout, DispatchChoice, int], list[Candidate]] = defaultdict(list)
        for candidate in candidates:
            layout, options = candidate
            alike[layout, options.dispatch, options.num_redundant_experts].append(candidate)
        screened: list[Screened] = []
        rest = iter(alike.values())
        while some := list(islice(rest, _PRICED_TOGETHER)):
            screened += self._price(some)
            advance(sum(map(len, some)))
        return screened

    def _price(self, alike: Iterable[list[Candidate]]) -> list[Screened]:
        """Of each structure's candidates."""
        structures = [self._structure(candidates) for candidates in alike]
        fitting = [each for each in structures if each.fits]
        lists = [steps for each in fitting for steps in each.lists()]
        priced = iter(price(self._profile, self._setting.types, self._terms, lists))
        for each in fitting:
            each.take_prices(priced)
        return [
            screened for each in structures for screened in each.results(self._links, self._terms)
        ]

    def placement(self, layout: Layout, num_redundant: int) -> Placement:
        """Of every MoE layer."""
        return Placement.linear(self._model.num_experts, layout.ep, num_redundant)

    def _structure(self, candidates: list[Candidate]) -> Structure:
        candidate, model, setting = candidates[0], self._model, self._setting
        layout = candidate.layout
        placement = self.placement(layout, candidate.options.num_redundant_experts)
        placements: Placements = tuple(
            None if model.is_dense(layer) else placement for layer in range(model.num_hidden_layers)
        )
        form = candidate.options.dispatch
        assert form != "auto", "candidates name their form"
        traffic = self._traffic
        prefill_tokens = prefill_step_tokens(
            layout, traffic.num_sequences, traffic.prompt_len, setting.step_tokens
        )
        room = capacity(
            model,
            layout,
            placements,
            setting.types,
            self._profile.device.memory_bytes,
            traffic.full_len,
            prefill_tokens,
        )
        mesh = StageMesh.of(layout, 0, 0, self._profile.ranks_per_node)
        plan = StageSteps(
            model,
            setting.types,
            mesh,
            self._fan_out(mesh, placement, candidate.options.num_redundant_experts),
            form,
            candidate.options.payload,
        )
        num_seqs = _numbers_up_to(min(room.max_seqs, self._wanted(layout)))
        return Structure(candidates, plan, mesh, traffic, room, num_seqs, prefill_tokens)

    def _wanted(self, layout: Layout) -> int:
        """Sequences of a data-parallel rank if all are running."""
        return -(-self._traffic.num_sequences // (layout.replicas * layout.dp))

    def _fan_out(self, mesh: StageMesh, placement: Placement, num_redundant: int) -> ExpectedFanOut:
        layout = mesh.layout
        key = layout.dp * layout.tp, layout.ep, num_redundant
        if key not in self._fan_outs:
            routing = self._setting.routing
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
