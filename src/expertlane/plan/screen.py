"""Every candidate deployment priced at once, from expected traffic and one rank of each stage."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import islice

import numpy as np

from expertlane.balance.placement import Placement
from expertlane.balance.placement_file import Placements
from expertlane.cost.laws.execution import Terms
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile_file import ModelledCluster
from expertlane.cost.step.expected_counts import ExpectedFanOut, sampled_layers
from expertlane.cost.step.operation import Ints
from expertlane.cost.step.stage_mesh import StageMesh
from expertlane.memory import capacity, prefill_step_tokens
from expertlane.plan.candidates import Candidate
from expertlane.plan.setting import Setting, Traffic
from expertlane.plan.stage_times import StageSteps, price
from expertlane.plan.structure import Screened, Structure
from expertlane.spec.deployment import DispatchChoice
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig

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
