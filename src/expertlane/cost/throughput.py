"""Formulas by which a plan's candidates are screened: from times of steps to TPS, TPOT and TTFT.

Rows that are shown are simulated (`simulator.steady`); they keep their rates in a `ThroughputCurve`
too, as its one point.

Steady state: as soon as one is finished another begins. In one pool prompts come one by one, and
each holds up the decodes of its replica. In disaggregated pools both run side by side, and the
slower one sets the pace.

In one pool TTFT ends with the last step of a prompt. In disaggregated pools a client gets all
tokens from the one that decodes, as in `simulate`: TTFT ends when the first decode step begins, so
KV transfer and the wait for a place there are in it, and TPOT is decoding alone.

Multi-token prediction: with N drafts a decode step takes 1 + N tokens of a sequence through the
model and the head: its last token and what was guessed to follow. Then N passes of the layers that
draft (`ModelConfig.draft_kinds`) and of the head guess anew, each from the one before; the first of
them takes all of the step's tokens. Guesses are right with the same probability P each, and count
up to the first wrong one, so that a step yields 1 + P + P² + … + P^N tokens on average. P depends
on the text: bounds have it lower and higher by `ACCEPTANCE_UNSURE`. Every sequence is taken to get
that average in every step: what chance does to single steps is not modelled.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from expertlane.cost.laws.profile import BOUNDS, LIKELY
from expertlane.cost.step.expected_counts import largest_normal
from expertlane.cost.step.operation import Floats, Ints
from expertlane.errors import SpecError
from expertlane.results.estimate import Estimate
from expertlane.results.metrics import ServedRequest, serving_record
from expertlane.results.serving_record import SLOResult
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.layout import Layout
from expertlane.spec.workload import SLO, Workload

Number = TypeVar("Number", int, Ints)


class Prompts(NamedTuple, Generic[Number]):
    """Prompts in a data-parallel rank's prefill step, or in a round of rotating ones.

    Attributes, numbers or arrays of them:
        num_seqs: prompts, or one chunk of one in each step in flight.
        num_new, num_cached: new tokens of each, and cached ones before them.
        num_steps: steps that a prompt takes.
        length: tokens of a prompt that are computed, in all steps.
    """

    num_seqs: Number
    num_new: Number
    num_cached: Number
    num_steps: Number
    length: Number


@dataclass(frozen=True, eq=False)
class Steps:
    """A deployment's steps; bounds: low, likely, high.

    Attributes:
        num_seqs: [N]; sequences in a decode step, over the whole system.
        decode_s: [3, N].
        prefill_s: [3]; one step, of `prompts` on each data-parallel rank.
        most_seqs: sequences that are there at once, over the whole system; fewer than
            data-parallel ranks leave some idle.
        alone_s: [3]; what a prompt adds to a replica's steps if no other rank computes any.
        tokens_per_step: [3]; of a decoding sequence, more than one where drafts are accepted.
        prompt_wait_steps: see `schedule.request.Limits`.
    """

    layout: Layout
    num_seqs: Ints
    decode_s: Floats
    prefill_s: Floats
    prompts: Prompts[int]
    most_seqs: int
    alone_s: Floats
    tokens_per_step: Floats = field(default_factory=lambda: np.ones(len(BOUNDS)))
    prompt_wait_steps: int = 0

    @property
    def batched_s(self) -> Floats:
        """[3]; seconds of a prompt where all data-parallel ranks compute equally many."""
        seconds: Floats = self.prefill_s * (self.prompts.num_steps / self.prompts.num_seqs)
        return seconds

    def arriving(self, workload: Workload) -> "PromptArrivals":
        """Prompts at each number of sequences."""
        sizes = self.layout.replicas, self.layout.dp
        tokens, wait_steps = self.tokens_per_step, self.prompt_wait_steps
        return PromptArrivals.of(self.num_seqs, *sizes, tokens, workload, wait_steps)

    @property
    def num_caches(self) -> int:
        """Data-parallel ranks that have any sequence."""
        return min(self.layout.replicas * self.layout.dp, self.most_seqs)

    @property
    def num_prompts(self) -> int:
        """Prompts in a prefill step, over the whole system."""
        return min(self.prompts.num_seqs * self.num_caches, self.most_seqs)

    @property
    def token_s(self) -> Floats:
        """[3, N]; seconds of decoding per token of every sequence."""
        seconds: Floats = self.decode_s / self.tokens_per_step[:, None]
        return seconds

    @property
    def prefill_tps(self) -> Floats:
        """[3]; computed prompt tokens/s while nothing is decoded, at the low time first."""
        tps: Floats = self.num_prompts * self.prompts.num_new / self.prefill_s
        return tps


@dataclass(frozen=True)
class Goals:
    """Limits that a deployment must keep; None for no limit.

    Attributes:
        max_tpot_s, max_ttft_s: limits of the means.
        slos: limits of other statistics.
    """

    max_tpot_s: float | None = None
    max_ttft_s: float | None = None
    slos: tuple[SLO, ...] = ()

    @classmethod
    def of(cls, slos: Iterable[SLO]) -> "Goals":
        """The limits that were asked for."""
        means = {"tpot.mean": "max_tpot_s", "ttft.mean": "max_ttft_s"}
        named: dict[str, float] = {}
        others = []
        for slo in slos:
            if slo.name in means:
                name = means[slo.name]
                named[name] = min(slo.limit_s, named.get(name, slo.limit_s))
            else:
                others.append(slo)
        return cls(**named, slos=tuple(others))

    @property
    def all(self) -> tuple[SLO, ...]:
        """Every limit as an objective."""
        tpot, ttft = self.max_tpot_s, self.max_ttft_s
        of_means = [] if tpot is None else [SLO("tpot", "mean", tpot)]
        of_means += [] if ttft is None else [SLO("ttft", "mean", ttft)]
        return *of_means, *self.slos

    @cached_property
    def of_means(self) -> "tuple[float | None, float | None]":
        """Limits of mean TPOT and TTFT for a formula that knows means: none may be above them."""
        tpot = [each.limit_s for each in self.slos if each.metric in ("tpot", "itl")]
        ttft = [each.limit_s for each in self.slos if each.metric == "ttft"]
        tpot += [] if self.max_tpot_s is None else [self.max_tpot_s]
        ttft += [] if self.max_ttft_s is None else [self.max_ttft_s]
        return min(tpot, default=None), min(ttft, default=None)

    def results(
        self, tpot_s: Floats, ttft_s: Floats, served: Sequence[ServedRequest[Floats]]
    ) -> tuple[SLOResult, ...]:
        """Each limit, with the value that was reached.

        Args:
            tpot_s, ttft_s: [3]; means.
            served: a sample.
        """
        means = {"tpot": tpot_s, "ttft": ttft_s}
        of_means = self.all[: len(self.all) - len(self.slos)]
        found = [SLOResult(each, Estimate.between(means[each.metric])) for each in of_means]
        others = serving_record(served, self.slos).slos if self.slos else ()
        return *found, *others


@dataclass(frozen=True, eq=False)
class ThroughputCurve:
    """A deployment under a workload, at N numbers of running sequences; bounds: low, likely, high.

    Attributes:
        num_seqs: [N]; over the whole system.
        tps: [3, N]; output tokens a second over the whole system.
        tpot_s: [3, N]; mean time of a sequence's tokens after the first, with others' prefills in
            one pool.
        ttft_s: [3, N]; from a prompt's arrival to its last step's end, or of two pools to the first
            step that decodes, with its waits; infinite where prefill takes all of the time.
        slos: each limit with the value reached; where simulated, at one number of sequences.
    """

    num_seqs: Ints
    tps: Floats
    tpot_s: Floats
    ttft_s: Floats
    slos: tuple[SLOResult, ...] | None = None

    def best(self, goals: Goals) -> int | None:
        """The place with most tokens a second among those that keep the goals; None if none."""
        keeps = self.breach(goals) <= 1
        return int(np.where(keeps, self.tps[LIKELY], -1).argmax()) if keeps.any() else None

    def breach(self, goals: Goals) -> Floats:
        """[N]; factor by which the worst limit is missed; 1 or less where all are kept."""
        if self.slos is None:
            return breach(goals, self.tpot_s, self.ttft_s)
        return np.array([max((each.excess for each in self.slos), default=0.0)])


def breach(goals: Goals, tpot_s: Floats, ttft_s: Floats) -> Floats:
    """[P]; factor by which the worse limit is missed; 1 or less where both are kept.

    Args:
        tpot_s, ttft_s: [3, P].
    """
    worst = np.zeros(tpot_s.shape[1])
    for limit, value in zip(goals.of_means, (tpot_s, ttft_s), strict=True):
        if limit is not None:
            worst = np.maximum(worst, value[LIKELY] / limit)
    return worst


def one_pool(
    steps: Steps, workload: Workload, arriving: "PromptArrivals | None" = None
) -> ThroughputCurve:
    """The curve of one pool that computes prompts and decodes.

    Args:
        arriving: from `Steps.arriving`, if already known.
    """
    tps, tpot_s, ttft_s = together(
        steps.num_seqs,
        steps.decode_s,
        steps.token_s,
        steps.batched_s[:, None],
        steps.alone_s[:, None],
        arriving or steps.arriving(workload),
    )
    return ThroughputCurve(steps.num_seqs, tps, tpot_s, ttft_s)


class PromptArrivals(NamedTuple):
    """Prompts that arrive one by one, whenever a request ends; [3, P] or [1, P] each.

    Attributes:
        of_rank: mean prompts of a data-parallel rank in a decode step.
        most: mean over steps of the most prompts of any rank: all wait for that one.
        share: share of data-parallel ranks with a prompt, in a step that has any.
        held_steps: steps that a prompt waits for those of other ranks.
    """

    of_rank: Floats
    most: Floats
    share: Floats
    held_steps: Floats

    @classmethod
    def of(
        cls,
        num_seqs: Ints,
        replicas: Ints | int,
        dp: Ints | int,
        tokens_per_step: Floats,
        workload: Workload,
        prompt_wait_steps: int = 0,
    ) -> "PromptArrivals":
        """Arrivals at P numbers of sequences.

        Prompts that are held back until every rank has one come once in so many steps, one to a
        rank, or as many as have come when the wait is over.

        Args:
            num_seqs, replicas, dp: [P].
            prompt_wait_steps: see `schedule.request.Limits`.
        """
        tokens = tokens_per_step[:, None]
        if (tokens == tokens[0]).all():
            tokens = tokens[:1]
        num_ranks: Ints = np.clip(-(-num_seqs // replicas), 1, dp)  # ranks that have sequences
        of_rank = num_seqs / (replicas * num_ranks * workload.output_len) * tokens
        most, share = _most_of(of_rank, num_ranks), np.minimum(of_rank, 1.0)
        if not prompt_wait_steps:
            return cls(of_rank, most, share, np.zeros_like(of_rank))
        gathered = np.clip(prompt_wait_steps * of_rank, of_rank, 1.0)
        is_held = (of_rank < 1) & (num_ranks > 1)
        held_steps = np.where(is_held, gathered / of_rank / 2, 0.0)  # mean of first and last
        most = np.where(is_held, of_rank / gathered, most)
        return cls(of_rank, most, np.where(is_held, gathered, share), held_steps)


_MOST_COUNTED = 12.0  # means of Poisson variables above this are taken to be normal
_NUM_TERMS = 32


def _most_of(mean: Floats, num: Ints) -> Floats:
    """Mean of the largest of `num` independent Poisson variables; approximate where large."""
    few = np.minimum(mean, _MOST_COUNTED)
    chance: Floats = np.exp(-few)
    below: Floats = chance.copy()
    power = num.astype(np.float64)
    most: Floats = 1 - below**power
    for count in range(1, _NUM_TERMS):
        chance = chance * (few / count)
        below = np.minimum(below + chance, 1.0)
        most = most + (1 - below**power)
    if (mean > _MOST_COUNTED).any():
        sizes, which = np.unique(num, return_inverse=True)
        deviations = np.array([largest_normal(size) for size in sizes.tolist()])[which]
        normal: Floats = np.where(mean > _MOST_COUNTED, mean + deviations * np.sqrt(mean), most)
        return normal
    return most


def together(
    num_seqs: Ints,
    decode_s: Floats,
    token_s: Floats,
    batched_s: Floats,
    alone_s: Floats,
    arriving: PromptArrivals,
) -> tuple[Floats, Floats, Floats]:
    """Tokens a second, TPOT and TTFT, [3, P] each, where one pool computes prompts and decodes.

    A prompt on one data-parallel rank holds up the decodes of all. As more come, each rank has one
    in more of the steps, so that more of them share the wait.

    Args:
        num_seqs: [P]; over the whole system.
        decode_s, token_s, batched_s, alone_s: [3, P]; as in `Steps`.
    """
    share = arriving.share
    prompt_s = share * batched_s + (1 - share) * alone_s
    step_s = decode_s + arriving.most * prompt_s
    tpot_s = token_s * (step_s / decode_s)
    busy = arriving.of_rank * prompt_s / step_s
    wait_s = prompt_s * busy / (2 * (1 - busy))  # M/D/1, a server for each data-parallel rank
    ttft_s = step_s * (1 + arriving.held_steps) + prompt_s + wait_s
    return (num_seqs / tpot_s)[::-1], tpot_s, ttft_s


def two_pools(
    prefill: Steps,
    decode: Steps,
    transfer_s: Floats,
    workload: Workload,
) -> ThroughputCurve:
    """The curve of a prefill pool and a decode pool.

    No more sequences are in both together than the workload has, or than have a place to decode or
    are computed before: while a prompt is computed and travels, its sequence is not decoded.

    Args:
        transfer_s: [3]; of a prompt's keys and values.
    """
    could_tps = decode.num_seqs / decode.token_s
    fed_tps = prefill.prefill_tps[:, None] / prefill.prompts.length * workload.output_len
    before_s = prefill.prompts.num_steps * prefill.prefill_s + transfer_s
    of_sequence_s = decode.token_s + before_s[:, None] / workload.output_len
    tps = np.minimum(could_tps, fed_tps)
    in_prefill = tps / workload.output_len * before_s[:, None]
    num_asked = np.minimum(workload.num_sequences, decode.num_seqs + in_prefill)
    tps = np.minimum(tps, num_asked / of_sequence_s)
    # A pool that is fed less has fewer sequences running; a step of fewer is taken to be as long.
    # All others wait for prefill or for a place: what Little's law leaves of a request's time.
    waited_s = num_asked * workload.output_len / tps - workload.output_len * decode.token_s
    busy = np.minimum(tps / fed_tps, _MOST_BUSY)
    alone_s = _prompt_s(prefill, busy) + transfer_s[:, None]
    return ThroughputCurve(
        num_seqs=decode.num_seqs,
        tps=tps[::-1],
        tpot_s=decode.token_s,
        ttft_s=np.maximum(waited_s, alone_s) + decode.decode_s / 2,  # a step begins as one ends
    )


_MOST_BUSY = 0.95  # a queue that is never empty has no mean wait; admission keeps it short


def _prompt_s(steps: Steps, busy: Floats) -> Floats:
    """[3, N]; seconds of a prompt and its wait: M/D/1, one server for each data-parallel rank.

    Args:
        busy: [3, N]; share of time in which prompts are computed.
    """
    own_s = steps.prompts.length * steps.num_caches / steps.prefill_tps[:, None]
    whole: Floats = own_s * busy / (2 * (1 - busy))
    return whole + steps.prompts.num_steps * steps.prefill_s[:, None]


_MOST_DRAFTS = 16
ACCEPTANCE_UNSURE = 0.1  # an assumption: texts differ about so much


@dataclass(frozen=True)
class MultiToken:
    """Number of drafts, and the probability that one is accepted.

    Raises:
        SpecError: no such number or probability.
    """

    num_drafts: int = 0
    acceptance: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.num_drafts <= _MOST_DRAFTS:
            raise SpecError(f"{self.num_drafts} drafts per step; valid: 0 to {_MOST_DRAFTS}")
        if not 0 <= self.acceptance <= 1:  # NaN neither
            raise SpecError(f"acceptance {self.acceptance:g}; valid: 0 to 1")

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a decoding sequence in a step, on average; 1 without drafts."""
        return sum(self.acceptance**place for place in range(self.num_drafts + 1))

    def at(self, bound: int) -> "MultiToken":
        """Drafts with the acceptance of a bound of time: the highest acceptance, the low bound.

        Args:
            bound: place in `BOUNDS`.
        """
        moved = self.acceptance + (LIKELY - bound) * ACCEPTANCE_UNSURE
        return replace(self, acceptance=min(max(moved, 0.0), 1.0))

    @property
    def tokens_bounds(self) -> Floats:
        """[3]; `tokens_per_step` of the low, likely and high time."""
        return np.array([self.at(bound).tokens_per_step for bound in range(len(BOUNDS))])

    def num_steps(self, output_len: int) -> int:
        """Steps that give a sequence a token, the one that ends its prompt among them."""
        return 1 + ceil(round((output_len - 1) / self.tokens_per_step, 6))


class MultiTokenAdapter:
    """Corrects positions in plans: schedulers count one token a decode, drafts yield more."""

    def __init__(self, multi_token: MultiToken) -> None:
        self._extra = multi_token.tokens_per_step - 1
        self._num_decodes: Floats = np.zeros(1024)  # by sequence

    def adapt(self, plan: StepPlan) -> StepPlan:
        """The plan with the positions that its decodes have reached."""
        parts = tuple(tuple(map(self._batch, part)) for part in plan.micro_batches)
        return replace(plan, micro_batches=parts)

    def _batch(self, batch: Batch) -> Batch:
        if not batch.num_seqs:
            return batch
        most = int(batch.seq_ids.max())
        if most >= len(self._num_decodes):
            self._num_decodes = np.concatenate([self._num_decodes, np.zeros(most + 1)])
        is_decode = batch.yields_token & (batch.num_scheduled_tokens == 1)
        further = np.round(self._extra * self._num_decodes[batch.seq_ids]) * is_decode
        self._num_decodes[batch.seq_ids[is_decode]] += 1
        return replace(batch, num_computed_tokens=batch.num_computed_tokens + further.astype(int))
