"""Every candidate deployment priced at once, from expected counts and one rank of each stage."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import inf, log
from typing import NamedTuple

import numpy as np

from expertlane.balance.holding import Placements, placements_of
from expertlane.balance.placement import Placement
from expertlane.cost.closed_form import ManySteps, Pipelining, StepInputs, joined_points
from expertlane.cost.laws.frameworks import find_framework
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import LIKELY, Terms
from expertlane.cost.memory import Capacity, PlacedModel, prefill_step_tokens
from expertlane.cost.shared_parts import Shape, SharedParts
from expertlane.cost.step.counts import StageMesh
from expertlane.cost.step.expected_counts import ExpectedFanOut, sampled_layers
from expertlane.cost.step.operation import Ints
from expertlane.cost.throughput import (
    Goals,
    MultiToken,
    PromptArrivals,
    Prompts,
    Steps,
    ThroughputCurve,
    breach,
    one_pool,
    together,
)
from expertlane.planner.candidates import Candidate, PlanRequest
from expertlane.spec.deployment import DispatchForm, Options
from expertlane.spec.layout import Layout
from expertlane.spec.workload import NOTHING_SHARED, Workload


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
        """Output tokens/s at its best; 0 where it breaks a limit."""
        return 0.0 if self.place is None else float(self.served.tps[LIKELY, self.place])

    @property
    def num_seqs(self) -> int:
        """Running sequences at its best, over the whole system; 0 where it breaks a limit."""
        return 0 if self.place is None else int(self.steps.num_seqs[self.place])

    @property
    def most_seqs(self) -> int:
        """The most sequences that fit and that the workload has."""
        return int(self.steps.num_seqs[-1])

    def at(self, num_seqs: int, workload: Workload) -> "ScreenedCandidate":
        """The candidate at another number of sequences, interpolated between those priced."""
        steps, known = self.steps, self.steps.num_seqs
        place = int(np.searchsorted(known, num_seqs))
        if place < len(known) and known[place] == num_seqs:
            return replace(self, place=place)
        between = [np.interp(num_seqs, known, of_bound) for of_bound in steps.decode_s]
        steps = replace(
            steps,
            num_seqs=np.insert(known, place, num_seqs),
            decode_s=np.insert(steps.decode_s, place, between, axis=1),
        )
        return replace(self, steps=steps, served=one_pool(steps, workload), place=place)

    def within(
        self, goals: Goals, factor: float = 1.0, of_sequence: float = 0.0
    ) -> tuple[int, float]:
        """The most sequences within the limits, and their tokens/s; 0 and 0 if none are.

        Interpolates between priced numbers, linearly in logarithms.

        Args:
            factor: correction of the formula's use of a limit.
            of_sequence: further use of a limit per sequence, a share.
        """
        missed = self.served.breach(goals) * factor + of_sequence * self.steps.num_seqs
        tps = self.served.tps[LIKELY]
        kept = np.where(missed <= 1, tps, -1.0)
        place = int(kept.argmax())
        if kept[place] < 0:
            return 0, 0.0
        num = int(self.steps.num_seqs[place])
        if place + 1 == len(tps) or missed[place + 1] <= 1 or missed[place] <= 0:
            return num, float(tps[place])
        if not np.isfinite(missed[place + 1]):
            return num, float(tps[place])
        share = -log(missed[place]) / log(missed[place + 1] / missed[place])
        ratio = float(self.steps.num_seqs[place + 1]) / num
        more = int(num * ratio**share)
        return more, float(tps[place] * (tps[place + 1] / tps[place]) ** share)

    def nearest(self, goals: Goals) -> "ScreenedCandidate":
        """The candidate at the number of sequences that comes nearest to the limits."""
        return replace(self, place=int(self.served.breach(goals).argmin()))


Screened = ScreenedCandidate | TooLarge


def fitting(screened: Iterable[Screened]) -> list[ScreenedCandidate]:
    """The candidates that fit."""
    return [each for each in screened if isinstance(each, ScreenedCandidate)]


_MOST_BATCHES = 12  # numbers of sequences that are tried


@dataclass(frozen=True, eq=False)
class _Structure:
    """Candidates that share their parts, which are priced once.

    Attributes:
        sized: None where no sequence fits.
    """

    candidates: list[Candidate]
    capacity: Capacity
    sized: StepInputs | None


_Spread = tuple[int, tuple[Placement, ...]]


@dataclass(frozen=True, eq=False)
class ScreenCache:
    """Results that screens of one model share, on parts of one cluster.

    Attributes:
        fan_outs: by size of a stage, placements of its experts, and copy method.
        slots: by `ep` and redundant experts; a placement of that many slots, linear.
        capacities: capacity of a rank, by all sizes that it depends on but replicas.
    """

    fan_outs: dict[_Spread, ExpectedFanOut] = field(default_factory=dict)
    slots: dict[tuple[int, int], Placement] = field(default_factory=dict)
    capacities: dict[object, Capacity] = field(default_factory=dict)


class Screen:
    """Prices candidates of one model on one cluster.

    Args:
        known: results of other screens.
        are_pools: candidates are pools, for prefill or for decode. Their sequences share no memory:
            a decode pool gets the keys and values of whole prompts.
    """

    def __init__(
        self, request: PlanRequest, known: ScreenCache | None = None, *, are_pools: bool = False
    ) -> None:
        self._request, self._are_pools = request, are_pools
        setting, profile = request.setting, request.cluster.profile
        self._profile = profile
        framework = find_framework(profile.framework) if profile.framework else None
        self._prompt_wait_steps = 0 if framework is None else framework.prompt_wait_steps
        self._links = LinkModel(profile)
        self._terms = Terms.of(profile, setting.execution)
        self._known = known or ScreenCache()
        self._layers = sampled_layers(request.model, setting.routing)

    def run(
        self, candidates: Iterable[Candidate], advance: Callable[[int], None]
    ) -> list[Screened]:
        """Screen candidates, in order of structure: those with the same steps after each other.

        Args:
            advance: called with a number of candidates when they are done.
        """
        alike: defaultdict[object, list[Candidate]] = defaultdict(list)
        for candidate in candidates:
            layout, options, num_drafts = candidate
            key = (
                layout,
                options.dispatch,
                options.placement,
                options.num_redundant_experts,
                num_drafts,
            )
            alike[key].append(candidate)
        setting = self._request.setting
        shared = SharedParts(
            self._request.model,
            setting.types,
            self._profile,
            self._terms,
            has_drafts=setting.multi_token.num_drafts > 0,
        )
        structures = [self._structure(each, shared) for each in alike.values()]
        chunks: defaultdict[object, list[int]] = defaultdict(list)
        for number, each in enumerate(structures):
            layout, _, num_drafts = each.candidates[0]
            if each.sized is not None:
                chunks[layout.pp, num_drafts].append(number)
        many = [self._many([structures[each] for each in chunk]) for chunk in chunks.values()]
        if many:
            points, firsts = joined_points(many)
            priced = shared.price(points)
            for of_chunk, first in zip(many, firsts, strict=True):
                of_chunk.take(priced, first)
        found: dict[int, list[ScreenedCandidate]] = {}
        for of_chunk, chunk in zip(many, chunks.values(), strict=True):
            some = [structures[number] for number in chunk]
            results = self._results(of_chunk, some)
            found |= zip(chunk, results, strict=True)
            advance(sum(map(len, results)))
        screened: list[Screened] = []
        for number, each in enumerate(structures):
            if each.sized is None:
                advance(len(each.candidates))
                screened += [TooLarge(candidate, each.capacity) for candidate in each.candidates]
            else:
                screened += found[number]
        return screened

    def _structure(self, candidates: list[Candidate], shared: SharedParts) -> _Structure:
        (layout, options, num_drafts), request = candidates[0], self._request
        slots = self._slots(layout.ep, options.num_redundant_experts)
        workload, form = request.workload, options.dispatch
        prefill_tokens = prefill_step_tokens(workload, layout, request.setting.step_tokens)
        capacity = self._capacity(layout, slots, num_drafts, prefill_tokens)
        wanted = -(-workload.num_sequences // (layout.replicas * layout.dp))
        num_seqs = _numbers_up_to(min(capacity.max_seqs, wanted))
        if not len(num_seqs):
            return _Structure(candidates, capacity, None)
        assert form != "auto", "candidates name their form"
        mesh = StageMesh.of(layout, 0, 0, self._profile.ranks_per_node)
        fan_out = self._fan_out(mesh, options)
        shape = Shape(mesh, fan_out, form, options.payload)
        prompt_len = self._computed_prompt_len(capacity)
        sized = StepInputs(layout, (shared.add(shape), shape), num_seqs, prefill_tokens, prompt_len)
        return _Structure(candidates, capacity, sized)

    def _computed_prompt_len(self, capacity: Capacity) -> int:
        """Mean tokens of a prompt that are computed, cached prefixes left out."""
        workload, prefixes = self._request.workload, self._request.prefixes
        if not prefixes.num:
            return workload.prompt_len
        length = workload.prompt_len if self._are_pools else workload.max_len
        of_each = length / prefixes.block_size - prefixes.num_blocks
        found = prefixes.found_share(capacity.num_blocks, of_each)
        return max(workload.prompt_len - round(found * prefixes.num_tokens), 1)

    def _slots(self, ep: int, num_redundant: int) -> Placement:
        known = self._known.slots
        if (key := (ep, num_redundant)) not in known:
            known[key] = Placement.linear(self._request.model.num_experts, ep, num_redundant)
        return known[key]

    def _capacity(
        self, layout: Layout, slots: Placement, num_drafts: int, prefill_tokens: int
    ) -> Capacity:
        """Capacity of a layout, from one replica, as all are alike."""
        known, sizes = (
            self._known.capacities,
            (layout.pp, layout.dp, layout.tp, layout.ep, layout.dcp),
        )
        prefixes = NOTHING_SHARED if self._are_pools else self._request.prefixes
        key = *sizes, slots.num_slots, num_drafts, prefill_tokens, prefixes
        if key not in known:
            model, types = self._request.model, self._request.setting.types
            placements: Placements = tuple(
                None if model.is_dense(layer) else slots for layer in range(model.num_hidden_layers)
            )
            held = PlacedModel(model, layout, types, placements).with_drafts(num_drafts)
            known[key] = held.capacity(
                self._profile.device.memory_bytes,
                self._request.workload.max_len,
                prefill_tokens,
                prefixes,
            )
        return replace(known[key], layout=layout)

    def _fan_out(self, mesh: StageMesh, options: Options) -> ExpectedFanOut:
        """Mean fan-out of a few layers, placed as in the projection in full."""
        routing = self._request.setting.routing
        placements = self._placements(mesh.layout, options)
        known, key = self._known.fan_outs, (mesh.size, tuple(placements))
        if key not in known:
            known[key] = ExpectedFanOut.mean(
                [
                    ExpectedFanOut.of_sample(mesh, placement, routing, layer)
                    for layer, placement in zip(self._layers, placements, strict=True)
                ]
            )
        return known[key]

    def _placements(self, layout: Layout, options: Options) -> list[Placement]:
        """Placements of a few layers; where experts are placed by load, as in full."""
        num_redundant, per_node = options.num_redundant_experts, self._profile.ranks_per_node
        if options.is_by_load:
            routing = self._request.setting.routing
            return routing.placements(self._layers, layout, num_redundant, per_node)
        slots = self._slots(layout.ep, num_redundant)
        if options.placement == "linear" and options.placement_file is None:
            return [slots] * len(self._layers)
        of_layers = placements_of(self._request.model, layout, options)
        return [of_layers[layer] or slots for layer in self._layers]

    def _many(self, structures: Sequence[_Structure]) -> ManySteps:
        """Steps of structures with equally many stages and drafts."""
        request = self._request
        hows = [
            Pipelining.of(candidate.options) for each in structures for candidate in each.candidates
        ]
        return ManySteps(
            [each.sized for each in structures if each.sized is not None],
            list(dict.fromkeys(hows)),
            request.model,
            request.workload,
            structures[0].candidates[0].num_drafts,
            request.setting.types.activation_bytes,
            self._links,
            self._terms,
            self._prompt_wait_steps,
        )

    def _results(
        self, many: ManySteps, structures: Sequence[_Structure]
    ) -> list[list[ScreenedCandidate]]:
        """By structure, its screened candidates in their order."""
        curves = {how: _Curves(many, how, self._request) for how in many.hows}
        return [
            [
                curves[Pipelining.of(candidate.options)].option(candidate, number, each.capacity)
                for candidate in each.candidates
            ]
            for number, each in enumerate(structures)
        ]


class _Curves:
    """Throughput of structures that are cut alike."""

    def __init__(self, many: ManySteps, how: Pipelining, request: PlanRequest) -> None:
        goals, self._workload = request.goals, request.workload
        self._num_seqs, self._decode_s = many.num_seqs, many.decode(how)
        self._prefill_s, self._prompts = many.prefill(how)
        self._prompt_wait_steps = many.prompt_wait_steps
        drafts = request.setting.multi_token if many.num_drafts else MultiToken()
        self._tokens_per_step = drafts.tokens_bounds
        at, self._alone_s = many.structure, many.alone_s
        batched_s = self._prefill_s * (self._prompts.num_steps / self._prompts.num_seqs)
        self._tps, self._tpot_s, self._ttft_s = together(
            self._num_seqs,
            self._decode_s,
            self._decode_s / self._tokens_per_step[:, None],
            batched_s[:, at],
            self._alone_s[:, at],
            many.arriving(self._tokens_per_step),
        )
        self._ends = np.cumsum(many.num_sizes).tolist()
        kept = np.where(breach(goals, self._tpot_s, self._ttft_s) <= 1, self._tps[LIKELY], -1)
        starts = np.array([0, *self._ends[:-1]])
        most = np.maximum.reduceat(kept, starts)
        is_most = np.where(kept == most[at], np.arange(len(at)), len(at))
        first = np.minimum.reduceat(is_most, starts) - starts
        self._places = [
            place if best >= 0 else None
            for place, best in zip(first.tolist(), most.tolist(), strict=True)
        ]

    def option(self, candidate: Candidate, number: int, capacity: Capacity) -> ScreenedCandidate:
        """The screened candidate of a structure."""
        at = slice(self._ends[number - 1] if number else 0, self._ends[number])
        num_seqs = self._num_seqs[at]
        steps = Steps(
            candidate.layout,
            num_seqs,
            self._decode_s[:, at],
            self._prefill_s[:, number],
            Prompts(*(int(each[number]) for each in self._prompts)),
            self._workload.num_sequences,
            self._alone_s[:, number],
            self._tokens_per_step,
            self._prompt_wait_steps,
        )
        served = ThroughputCurve(
            num_seqs, self._tps[:, at], self._tpot_s[:, at], self._ttft_s[:, at]
        )
        return ScreenedCandidate(candidate, capacity, steps, served, self._places[number])


def _numbers_up_to(most: int) -> Ints:
    """Numbers of sequences up to `most`: by halves, at most `_MOST_BATCHES`, ascending."""
    numbers: list[int] = []
    while most >= 1 and len(numbers) < _MOST_BATCHES:
        numbers.append(most)
        most //= 2
    return np.array(numbers[::-1], dtype=np.int64)


_LEAST_GAIN = 0.02  # share of prefill saved: less is not worth a second form


def with_fastest_prefill(
    options: Sequence[ScreenedCandidate], request: PlanRequest
) -> list[ScreenedCandidate]:
    """Further options: the same with the prefill of the fastest form, where that is another.

    Nothing else of a step turns on how the other phase dispatches, so none is to be screened anew.
    """
    fastest: dict[object, ScreenedCandidate] = {}
    keys = [_but_form(each.candidate) for each in options]
    prompt_s = [_prompt_s(each) for each in options]
    least: dict[object, float] = {}
    for key, seconds, each in zip(keys, prompt_s, options, strict=True):
        if seconds < least.get(key, inf):
            least[key], fastest[key] = seconds, each
    arriving: dict[object, PromptArrivals] = {}
    pairs = [
        (each, prefilled_as(each, fastest[key], request, arriving))
        for key, seconds, each in zip(keys, prompt_s, options, strict=True)
        if seconds > (1 + _LEAST_GAIN) * least[key]
    ]
    return [after for before, after in pairs if after.tps >= before.tps]


def _prompt_s(option: ScreenedCandidate) -> float:
    """Key for the fastest prefill: seconds of a lone prompt plus one beside those of all ranks."""
    return float(option.steps.alone_s[LIKELY] + option.steps.batched_s[LIKELY])


def _but_form(candidate: Candidate) -> object:
    layout, options, num_drafts = candidate
    how = options.overlap, options.num_micro_batches, options.micro_batch_schedule
    return layout, how, options.num_redundant_experts, num_drafts


def prefilled_as(
    option: ScreenedCandidate,
    best: ScreenedCandidate,
    request: PlanRequest,
    arriving: dict[object, PromptArrivals],
) -> ScreenedCandidate:
    """An option with another's prefill.

    Args:
        arriving: known `PromptArrivals` by numbers of sequences; new ones are added.
    """
    form = best.candidate.options.dispatch
    assert form != "auto", "candidates name their form"
    steps = replace(
        option.steps,
        prefill_s=best.steps.prefill_s,
        prompts=best.steps.prompts,
        alone_s=best.steps.alone_s,
    )
    layout, num_drafts = option.candidate.layout, option.candidate.num_drafts
    key = layout.replicas, layout.dp, num_drafts, steps.num_seqs.tobytes()
    if key not in arriving:
        arriving[key] = steps.arriving(request.workload)
    served = one_pool(steps, request.workload, arriving[key])
    candidate = option.candidate._replace(options=_prefilling(option.candidate.options, form))
    return replace(
        option, candidate=candidate, steps=steps, served=served, place=served.best(request.goals)
    )


@cache
def _prefilling(options: Options, form: DispatchForm) -> Options:
    return replace(options, prefill_dispatch=form)
