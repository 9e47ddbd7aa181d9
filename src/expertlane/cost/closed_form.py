"""The closed form of a step: its time without a clock, for many deployments at once.

It is what the replay (`cost/replay.py`) gives where routing is even. Times of parts
(`cost/shared_parts.py`) are added up: layers to stages, stages to micro-batches, those to steps.

All are told by arrays: S structures (a layout with a dispatch form, slots for experts and drafts),
each at some numbers of sequences, F of them in all.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import BOUNDS, LIKELY, Execution, Terms
from expertlane.cost.shared_parts import (
    COMPUTE,
    IN_SERIES,
    LAUNCHES,
    MOVED,
    SLOWED,
    Points,
    PricedPoints,
    Shape,
)
from expertlane.cost.step.operation import Floats, HandOver, Ints
from expertlane.cost.throughput import PromptArrivals, Prompts
from expertlane.spec.deployment import MicroBatchSchedule, Options
from expertlane.spec.layout import Layout, partition
from expertlane.spec.model import ModelConfig
from expertlane.spec.workload import Workload

_LOW = BOUNDS.index("low")
_LEAST_ADDED = 0.05  # least that a prompt adds to a step of decodes, as a share of its own step


class Pipelining(NamedTuple):
    """Micro-batches and overlap of a step.

    Attributes:
        overlap: whether a micro-batch runs in two halves.
    """

    overlap: bool = False
    num_micro_batches: int = 1
    schedule: MicroBatchSchedule = "drained"

    @classmethod
    def of(cls, options: Options) -> "Pipelining":
        """The pipelining of a deployment with these options."""
        overlap = bool(options.overlap)
        return cls(overlap, options.num_micro_batches, options.micro_batch_schedule)

    @property
    def num_parts(self) -> int:
        """Parts that a data-parallel rank's batch is cut into."""
        return self.num_micro_batches * (1 + self.overlap)


class StepInputs(NamedTuple):
    """The sizes of a structure that its steps depend on.

    Attributes:
        shape: shape of its parts, with its number.
        num_seqs: [N], ascending; sequences of a data-parallel rank to estimate decode steps for.
        prefill_tokens: tokens of a data-parallel rank's prefill step, at most.
        prompt_len: mean tokens of a prompt that are computed, those after a cached prefix.
    """

    layout: Layout
    shape: tuple[int, Shape]
    num_seqs: Ints
    prefill_tokens: int
    prompt_len: int


class _PrefillPart(NamedTuple):
    """Parts of a prefill step, by structure; [S] each.

    Attributes:
        part_seqs: sequences of a part.
        num_micro_batches, overlap: how the step is cut; a step of one prompt is not.
    """

    part_seqs: Ints
    num_micro_batches: Ints
    overlap: npt.NDArray[np.bool_]
    prompts: Prompts[Ints]


@dataclass(eq=False)
class ManySteps:
    """Steps of structures with equally many pipeline stages and drafts.

    Attributes:
        structures: each with at least one number of sequences.
        hows: ways in which steps are cut.
        terms: launch and driver terms.
        prompt_wait_steps: see `schedule.request.Limits`.
    """

    structures: Sequence[StepInputs]
    hows: Sequence[Pipelining]
    model: ModelConfig
    workload: Workload
    num_drafts: int
    activation_bytes: int
    links: LinkModel
    terms: Terms
    prompt_wait_steps: int = 0
    _priced: list[tuple[int, Floats]] = field(default_factory=list, init=False)
    _arriving: PromptArrivals | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        layouts = [each.layout for each in self.structures]
        sizes = [(each.replicas, each.dp, each.tp, each.replica_size) for each in layouts]
        self.replicas, self.dp, self.tp, replica_size = np.array(sizes).T
        self._shape = np.array([each.shape[0] for each in self.structures])
        self._pp = layouts[0].pp
        per_node = self.structures[0].shape[1].mesh.ranks_per_node
        self._is_remote = replica_size > per_node  # some rank's next stage is on another node
        self.num_sizes = np.array([len(each.num_seqs) for each in self.structures])
        self.structure = np.arange(len(layouts)).repeat(self.num_sizes)  # [F]
        self._of_rank = np.concatenate([each.num_seqs for each in self.structures])
        self._tokens = np.array([each.prefill_tokens for each in self.structures])
        self._prompt_len = np.array([each.prompt_len for each in self.structures])
        self._driver_s = np.stack([self.terms.step_s(each) for each in layouts], axis=1)

    @cached_property
    def num_seqs(self) -> Ints:
        """[F]; sequences in a decode step, over the whole system."""
        of_all = self._of_rank * (self.replicas * self.dp)[self.structure]
        num_seqs: Ints = np.minimum(of_all, self.workload.num_sequences)
        return num_seqs

    def points(self) -> Points:
        """All parts of all steps, for pricing."""
        whole = _joined([*self._points.values()])
        return _joined([whole, whole.further()]) if self.num_drafts else whole

    def take(self, priced: PricedPoints, first: int) -> None:
        """Take the prices of `points`, which begin at `first` in a longer list."""
        num = self._slices["token"].stop
        own, experts = (
            each[first : first + num * (1 + (self.num_drafts > 0))]
            for each in (priced.own, priced.of_experts)
        )
        self._priced = [
            (times, self._stage(priced, kind, own, experts, num))
            for kind, times in self._kinds_of_stages().items()
        ]

    def _kinds_of_stages(self) -> Counter[tuple[int, int, bool, bool]]:
        """Number of stages by kind: its layers, and whether it has an end of the model."""
        num_layers, pp = self.model.num_hidden_layers, self._pp
        kinds: dict[object, tuple[int, int, bool, bool]] = {}
        counts: Counter[tuple[int, int, bool, bool]] = Counter()
        for pp_rank, layers in enumerate(partition(num_layers, pp)):
            ends = pp_rank == 0, pp_rank == pp - 1
            of_layers = Counter(map(self.model.kind_of_layer, layers))
            key = frozenset(of_layers.items()), *ends
            counts[kinds.setdefault(key, (layers.start, layers.stop, *ends))] += 1
        return counts

    def _stage(
        self,
        priced: PricedPoints,
        kind: tuple[int, int, bool, bool],
        own: Ints,
        experts: Ints,
        num: int,
    ) -> Floats:
        """[rows, P]; price of a part on a kind of stage."""
        start, stop, is_first, is_last = kind
        total = priced.embedding * is_first + priced.arrival * (not is_first)
        if is_last:
            total = total + priced.head
        num_sparse = 0
        of_layers = Counter(map(self.model.kind_of_layer, range(start, stop)))
        for of, times in of_layers.items():
            total = total + times * priced.layers[of]
            num_sparse += times * (of.mlp == "experts")
        found: Floats = total[:, own[:num]]
        if num_sparse:
            found = found + num_sparse * priced.experts[:, experts[:num]]
        if is_last and self.num_drafts:
            head = priced.head[:, own[num:]]
            first = self._draft(priced, own[:num], experts[:num]) + head
            later = self._draft(priced, own[num:], experts[num:]) + head
            found = found + first + (self.num_drafts - 1) * later
        return found

    def _draft(self, priced: PricedPoints, own: Ints, experts: Ints) -> Floats:
        """[rows, P]; price of a pass of the drafting layers, without the head."""
        kinds = self.model.draft_kinds
        found: Floats = sum((priced.layers[kind] for kind in kinds), priced.projection)[:, own]
        num_sparse = sum(kind.mlp == "experts" for kind in kinds)
        return found + num_sparse * priced.experts[:, experts] if num_sparse else found

    @cached_property
    def alone_s(self) -> Floats:
        """[3, S]; see `Steps.alone_s`; a step of prompts and decodes reads weights once."""
        one = np.ones(len(self.structures), dtype=np.int64)
        prompt_s, token_s = (
            self._estimates(of, "drained", one, np.zeros(len(one), dtype=np.bool_))
            for of in ("prompt", "token")
        )
        num_steps = -(-self._prompt_len // self._points["prompt"].num_new)
        more_s: Floats = np.maximum(prompt_s - token_s, _LEAST_ADDED * prompt_s) * num_steps
        return more_s

    def arriving(self, tokens_per_step: Floats) -> PromptArrivals:
        """Prompts at each number of sequences."""
        if self._arriving is None:
            sizes = self.replicas[self.structure], self.dp[self.structure]
            self._arriving = PromptArrivals.of(
                self.num_seqs, *sizes, tokens_per_step, self.workload, self.prompt_wait_steps
            )
        return self._arriving

    def decode(self, how: Pipelining) -> Floats:
        """[3, F]; seconds of decode steps."""
        num = len(self._of_rank)
        cut = np.full(num, how.num_micro_batches), np.full(num, how.overlap)
        return self._estimates(how.num_parts, how.schedule, *cut)

    def prefill(self, how: Pipelining) -> tuple[Floats, Prompts[Ints]]:
        """Seconds of prefill steps, [3, S], and their prompts; of a round of rotating ones."""
        part = self._prefill_parts[how]
        seconds = self._estimates(how, how.schedule, part.num_micro_batches, part.overlap)
        return seconds, part.prompts

    def _estimates(
        self,
        of: object,
        schedule: MicroBatchSchedule,
        num_micro_batches: Ints,
        overlap: npt.NDArray[np.bool_],
    ) -> Floats:
        """Seconds of steps whose parts have their points under a key."""
        at, points = self._slices[of], self._points[of]
        is_decode = isinstance(of, int)
        structure = self.structure if is_decode else np.arange(len(self.structures))
        return step_estimates(
            [(times, priced[:, at]) for times, priced in self._priced],
            self._hand_over_s(points, structure),
            self._driver_s[:, structure],
            self.terms,
            schedule,
            num_micro_batches,
            overlap,
            self.model.num_hidden_layers,
        )

    def _hand_over_s(self, points: Points, structure: Ints) -> Floats:
        """[3, P]; seconds to the next stage, over the slowest link that any rank uses."""
        if self._pp == 1:
            return np.zeros((3, len(structure)))
        owned = -(-points.num_seqs * points.num_new // self.tp[structure])
        num_bytes = owned * (self.model.carried_size * self.activation_bytes)
        return self.links.hand_over(HandOver(num_bytes, self._is_remote[structure])).bounds

    @cached_property
    def _slices(self) -> dict[object, slice]:
        """Range of each set of points among all."""
        sizes = [len(each.shape) for each in self._points.values()]
        ends = np.cumsum(sizes).tolist()
        slices = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        return dict(zip(self._points, slices, strict=True))

    @cached_property
    def _points(self) -> dict[object, Points]:
        """Points of decode steps, by the parts that a batch is cut into; of prefill steps, by how.

        And of a prompt (or a chunk of one) and of a token on one rank, all others idle.
        """
        every, of_token = np.arange(len(self.structures)), (1 + self.num_drafts, self.num_drafts)
        context, found = self.workload.mean_context, dict[object, Points]()
        for num in dict.fromkeys(how.num_parts for how in self.hows):
            seqs = -(-self._of_rank // num)
            found[num] = self._points_of(self.structure, seqs, of_token, context)
        for how, part in self._prefill_parts.items():
            new, cached = part.prompts.num_new, part.prompts.num_cached
            found[how] = self._points_of(every, part.part_seqs, (new, 0), cached)
        one, chunk = np.ones_like(every), np.minimum(self._prompt_len, self._tokens)
        cached = self.workload.prompt_len - self._prompt_len + (self._prompt_len - chunk) // 2
        found["prompt"] = self._points_of(every, one, (chunk, 0), cached)
        found["token"] = self._points_of(every, one, of_token, context)
        alone = {of: replace(found[of], stage_seqs=one) for of in ("prompt", "token")}
        return found | alone

    def _points_of(
        self,
        structure: Ints,
        num_seqs: Ints,
        new_and_drafts: tuple[Ints | int, int],
        num_cached: Ints | int,
    ) -> Points:
        fullest = -(-self.workload.num_sequences // self.replicas)  # a replica's sequences
        stage_seqs = np.minimum(num_seqs * self.dp[structure], fullest[structure])
        new, cached, drafts = (
            np.broadcast_to(np.asarray(each, dtype=np.int64), num_seqs.shape)
            for each in (new_and_drafts[0], num_cached, new_and_drafts[1])
        )
        tp, dp, shape = (each[structure] for each in (self.tp, self.dp, self._shape))
        return Points(tp, num_seqs, new, cached, stage_seqs, drafts, dp, shape=shape)

    @cached_property
    def _prefill_parts(self) -> dict[Pipelining, _PrefillPart]:
        last = np.cumsum(self.num_sizes) - 1
        most_running = self._of_rank[last]
        lengths = self._prompt_len, self.workload.prompt_len - self._prompt_len
        return {
            how: _prefill_part(how, *lengths, self._tokens, most_running)
            for how in dict.fromkeys(self.hows)
        }


def _prefill_part(
    how: Pipelining, prompt_len: Ints, cached: Ints, most_tokens: Ints, num_running: Ints
) -> _PrefillPart:
    """A part of a prefill step, how the step is cut, and the whole of it.

    Steps are cut between sequences: what holds one prompt, or a chunk of one, is not. Rotating
    micro-batches are whole steps, in flight together, of prompts that may run at once.

    Args:
        prompt_len, cached: [S]; tokens of a prompt that are computed, and found in the cache.
    """
    is_rotating = how.schedule == "rotating"
    rotating = np.minimum(how.num_micro_batches, num_running)
    in_flight = rotating if is_rotating else np.ones_like(rotating)
    seqs = np.minimum(most_tokens // prompt_len, num_running // in_flight)
    is_one = seqs < 2
    chunk = np.minimum(prompt_len, most_tokens)
    num_new = np.where(is_one, chunk, prompt_len)
    num_cached = cached + np.where(is_one, (prompt_len - chunk) // 2, 0)  # mean over its chunks
    num_parts = (1 + how.overlap) if is_rotating else how.num_parts
    is_cut = ~is_one & (num_parts <= seqs)
    parts = np.where(is_cut, num_parts, 1)
    part_seqs = np.where(is_one, 1, -(-seqs // parts))
    num_micro_batches = in_flight if is_rotating else np.where(is_cut, how.num_micro_batches, 1)
    whole = np.minimum(part_seqs * parts * in_flight, num_running)
    num_steps = np.where(is_one, -(-prompt_len // chunk), 1)
    num_seqs = np.where(is_one, in_flight, whole)
    prompts = Prompts(num_seqs, num_new, num_cached, num_steps, prompt_len)
    return _PrefillPart(part_seqs, num_micro_batches, is_cut & how.overlap, prompts)


def _joined(parts: Sequence[Points]) -> Points:
    """The points of several, one after the other."""
    names = [each.name for each in fields(Points)]
    return Points(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    )


def joined_points(many: Sequence[ManySteps]) -> tuple[Points, list[int]]:
    """The points of all, and where each one's begin."""
    of_each = [each.points() for each in many]
    ends = np.cumsum([len(each.shape) for each in of_each]).tolist()
    return _joined(of_each), [0, *ends[:-1]]


def step_estimates(
    stages: Sequence[tuple[int, Floats]],
    hand_over_s: Floats,
    driver_s: Floats,
    terms: Terms,
    schedule: MicroBatchSchedule,
    num_micro_batches: Ints,
    overlap: npt.NDArray[np.bool_],
    num_layers: int,
) -> Floats:
    """[3, P]; seconds of steps, low, likely and high, or of a round where micro-batches rotate.

    A drained step of m micro-batches takes the way through all stages and m - 1 times the slowest,
    after the driver. A round of m rotating ones takes m times the slowest, or the driver and the
    way through all if that is longer: the driver plans one while the others run.

    Args:
        stages: number of alike stages, and the price of a part there: [rows, P].
        hand_over_s: [3, P]; seconds of a part's message to the next stage.
        driver_s: [3, P]; seconds between steps.
        num_micro_batches: [P]; m.
        overlap: [P]; whether a micro-batch runs in two halves.
        num_layers: layers of the model.
    """
    num_stages = sum(num for num, _ in stages)
    through = hand_over_s * ((1 + overlap) * (num_stages - 1))
    slowest = np.zeros_like(through)
    for num, priced in stages:
        seconds = _micro_batch(priced, terms, overlap, num_layers / num_stages)
        through, slowest = through + num * seconds, np.maximum(slowest, seconds)
    total: Floats
    if schedule == "rotating":
        of_one = np.maximum(through + driver_s, num_micro_batches * driver_s)
        total = np.maximum(num_micro_batches * slowest, of_one)
    else:
        total = through + (num_micro_batches - 1) * slowest + driver_s
    return total


def _micro_batch(
    priced: Floats, terms: Terms, overlap: npt.NDArray[np.bool_], layers_of_stage: float
) -> Floats:
    """[3, P]; seconds of a micro-batch on a stage, its halves side by side with overlap."""
    halves = 1 + overlap
    computing, moving = halves * priced[COMPUTE], halves * priced[MOVED]
    seconds = computing + moving
    if overlap.any():
        # The share that transfers take of computing beside them, mean over transfers.
        share = halves * priced[SLOWED] / np.maximum(moving[LIKELY], 1e-12)
        slowed = share * np.minimum(moving[LIKELY], computing[LIKELY])
        ramp = moving[LIKELY] / halves / max(layers_of_stage, 1)  # the first layer's hides nothing
        beside = np.maximum(moving[LIKELY], computing[LIKELY] + slowed) + ramp
        beside = np.minimum(beside, seconds[LIKELY])
        seconds[LIKELY] = np.where(overlap, beside, seconds[LIKELY])
        side_by_side = np.maximum(computing[_LOW], moving[_LOW])
        seconds[_LOW] = np.where(overlap, side_by_side, seconds[_LOW])
    return _launched(seconds, halves * priced[LAUNCHES], halves * priced[IN_SERIES], terms)


def _launched(seconds: Floats, num_kernels: Floats, in_series_s: Floats, terms: Terms) -> Floats:
    """[3, P]; seconds with launch overheads, by `Terms.execution`."""
    launch_s = terms.launch_s[:, None]
    match terms.execution:
        case Execution.EAGER:
            return np.maximum(seconds, num_kernels * launch_s)
        case Execution.GRAPH:
            return seconds + launch_s
        case Execution.SERIAL:
            return seconds + in_series_s
