"""Plans and outcomes of steps, and the protocol of what runs them."""

from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from expertlane.results.step_record import RankRecord
from expertlane.spec.names import Phase
from expertlane.spec.sampling import PromptPart, SamplingState, TokenLogprobs

HandleT = TypeVar("HandleT")

UNKNOWN = -1  # a token that the step before gives: ranks know it, the scheduler not yet


@dataclass(frozen=True, eq=False)
class Batch:
    """Some tokens of some sequences, for one data-parallel rank; may be empty.

    Attributes:
        seq_ids: [num_seqs].
        num_scheduled_tokens: [num_seqs]; new tokens of each sequence, each at least 1.
        num_computed_tokens: [num_seqs]; positions already in the cache.
        token_ids: [num_tokens]; the new tokens, sequence after sequence; some may be `UNKNOWN`.
        block_tables: [num_seqs, max_num_blocks], padded with -1; position p of a sequence is in
            block `block_tables[seq, p // block_size]` of the paged cache, at p % block_size.
        yields_token: [num_seqs]; whether the sequence's last new token ends all it has so far, so
            that a next token is to be sampled. False in all but the last chunk of a prompt.
    """

    seq_ids: npt.NDArray[np.int64]
    num_scheduled_tokens: npt.NDArray[np.int64]
    num_computed_tokens: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64]
    block_tables: npt.NDArray[np.int32]
    yields_token: npt.NDArray[np.bool_]

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch."""
        return len(self.seq_ids)

    @property
    def num_tokens(self) -> int:
        """New tokens in the batch."""
        return len(self.token_ids)

    @property
    def yielding_seq_ids(self) -> list[int]:
        """The sequences that get a next token, in their order."""
        seq_ids: list[int] = self.seq_ids[self.yields_token].tolist()
        return seq_ids

    def only(self, seqs: npt.NDArray[np.intp]) -> "Batch":
        """The batch of some sequences, in the order given."""
        chosen = np.zeros(self.num_seqs, dtype=np.bool_)
        chosen[seqs] = True
        return self._part(chosen, np.repeat(chosen, self.num_scheduled_tokens))

    def split(self, num_parts: int) -> list["Batch"]:
        """Cut into `num_parts` batches at sequence borders, near-equal in tokens."""
        borders, ends = self._borders(num_parts)
        return [
            self._part(slice(start, stop), slice(ends[start], ends[stop]))
            for start, stop in pairwise(borders)
        ]

    def _part(self, seqs: Any, tokens: Any) -> "Batch":
        """Some sequences and their new tokens, by slices or masks."""
        return Batch(
            self.seq_ids[seqs],
            self.num_scheduled_tokens[seqs],
            self.num_computed_tokens[seqs],
            self.token_ids[tokens],
            self.block_tables[seqs],
            self.yields_token[seqs],
        )

    def num_tokens_of_halves(self) -> list[int]:
        """[2]; new tokens of the two batches that `split` makes."""
        if self.num_tokens == self.num_seqs:  # a decode step has no time to lose
            first = (self.num_tokens + 1) // 2
        else:
            borders, ends = self._borders(2)
            first = int(ends[borders[1]])
        return [first, self.num_tokens - first]

    def _borders(self, num_parts: int) -> tuple[list[int], npt.NDArray[np.int64]]:
        """Sequences to cut between, and the first token of each sequence."""
        ends = np.concatenate(([0], np.cumsum(self.num_scheduled_tokens)))
        shares = np.arange(num_parts + 1) * (self.num_tokens / num_parts)
        halfway = (ends[:-1] + ends[1:]) / 2
        return np.searchsorted(halfway, shares, side="right").tolist(), ends  # the nearest ends


@dataclass(frozen=True, eq=False)
class RankBatch:
    """A micro-batch for one data-parallel rank: its own batch, and sizes of the others'.

    Attributes:
        num_tokens: [dp]; new tokens of every data-parallel rank.
        num_tokens_of_halves: [dp][2]; new tokens of each if all batches are split in two.
        can_split: whether any of the batches has several sequences.
    """

    own: Batch
    num_tokens: list[int]
    num_tokens_of_halves: list[list[int]]
    can_split: bool

    @classmethod
    def of_dp_ranks(cls, batches: Sequence[Batch]) -> "list[RankBatch]":
        """[dp]; one for each data-parallel rank's batch."""
        num_tokens = [batch.num_tokens for batch in batches]
        of_halves = [batch.num_tokens_of_halves() for batch in batches]
        can_split = any(batch.num_seqs > 1 for batch in batches)
        return [cls(batch, num_tokens, of_halves, can_split) for batch in batches]


@dataclass(frozen=True, eq=False)
class _Step:
    """A step, as far as every rank of a replica is told the same.

    Attributes:
        admitted: by sequence id, sampling state of the sequences that begin, or begin again,
            with this step; not of those that take the likeliest token.
        released: earlier such sequences that do not go on; dropped before `admitted` is taken.
        masks: by sequence id, the allowed next tokens of those that yield one and may not take
            any: a bit a token, the lowest of a byte first.
        num_uncommitted: earlier steps of the replica that are not committed: all before them
            are, and their changes are never undone.
        return_logits: send the logits of every sequence's last token back with the outcome.
        record: measure times and counters.
        record_routing: keep the experts that each token chose too; implies `record`.
        record_events: keep every event of a rank with its times; implies `record`.
        record_operations: keep every operation of a rank, for replay; implies `record`. Then at
            most one rank a core computes at a time.
    """

    step: int
    replica: int
    phase: Phase
    _: KW_ONLY
    admitted: dict[int, SamplingState] = field(default_factory=dict)
    released: tuple[int, ...] = ()
    masks: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    num_uncommitted: int = 0
    return_logits: bool = False
    record: bool = True
    record_routing: bool = False
    record_events: bool = False
    record_operations: bool = False


@dataclass(frozen=True, eq=False)
class RankStep(_Step):
    """A step for one data-parallel rank.

    Attributes:
        micro_batches: [num_micro_batches].
        admitted, masks: for its own sequences.
    """

    micro_batches: tuple[RankBatch, ...]


@dataclass(frozen=True, eq=False)
class StepPlan(_Step):
    """One step of one replica: for every micro-batch, the batch of every data-parallel rank.

    All ranks of the replica take part, also those whose batches are empty.

    A step is committed when the scheduler has taken in its outcome. Until then it can be discarded
    and run again, after all steps before it, with the same outcome: keys and values are written at
    their tokens' own positions, and what else it changes on ranks can be undone.

    Attributes:
        micro_batches: [num_micro_batches][dp].
    """

    micro_batches: tuple[tuple[Batch, ...], ...]

    @property
    def batches(self) -> list[Batch]:
        """The batches of all micro-batches and data-parallel ranks."""
        return [batch for micro_batch in self.micro_batches for batch in micro_batch]

    def without(self, dp_ranks: Collection[int]) -> "StepPlan":
        """The step with empty batches for these data-parallel ranks; may be left without any."""
        gone = {
            seq
            for batches in self.micro_batches
            for rank in dp_ranks
            for seq in batches[rank].seq_ids.tolist()
        }
        if not gone:
            return self
        nobody = np.empty(0, dtype=np.intp)
        parts = (
            tuple(
                batch.only(nobody) if rank in dp_ranks else batch
                for rank, batch in enumerate(batches)
            )
            for batches in self.micro_batches
        )
        return replace(
            self,
            micro_batches=tuple(part for part in parts if any(batch.num_seqs for batch in part)),
            admitted={seq: each for seq, each in self.admitted.items() if seq not in gone},
            masks={seq: each for seq, each in self.masks.items() if seq not in gone},
        )

    def moved(self, replica: int, dp_ranks: Sequence[int | None]) -> "StepPlan":
        """The step in another layout; no data-parallel rank that goes has a sequence in it.

        Args:
            dp_ranks: [dp]; the former rank of each, None for one that has nothing to do yet.
        """
        if replica == self.replica and list(dp_ranks) == [*range(len(self.micro_batches[0]))]:
            return self
        nobody = np.empty(0, dtype=np.intp)
        parts = tuple(
            tuple(batches[0].only(nobody) if old is None else batches[old] for old in dp_ranks)
            for batches in self.micro_batches
        )
        return replace(self, replica=replica, micro_batches=parts)

    def of_dp_ranks(self) -> list[RankStep]:
        """[dp]; the step for each data-parallel rank."""
        parts = [RankBatch.of_dp_ranks(batches) for batches in self.micro_batches]
        steps = []
        for micro_batches in zip(*parts, strict=True):
            changed: dict[str, Any] = {"micro_batches": micro_batches}
            if self.admitted or self.masks:
                own = {seq for part in micro_batches for seq in part.own.seq_ids.tolist()}
                for name in ("admitted", "masks"):
                    of_all = getattr(self, name)
                    changed[name] = {seq: each for seq, each in of_all.items() if seq in own}
            steps.append(RankStep(**(vars(self) | changed)))
        return steps


def micro_batches(batches: Sequence[Batch], num_parts: int) -> tuple[tuple[Batch, ...], ...]:
    """Cut the batches of all data-parallel ranks into up to `num_parts` micro-batches."""
    if num_parts == 1:
        return (tuple(batches),)
    parts = zip(*(batch.split(num_parts) for batch in batches), strict=True)
    # One without any sequence would only cost time; the batches of some ranks may be empty.
    return tuple(part for part in parts if any(batch.num_seqs for batch in part))


def without_caches(
    plans: Sequence[StepPlan], caches: Collection[tuple[int, int]]
) -> tuple[list[StepPlan], dict[int, tuple[int, ...]]]:
    """Plans without the sequences of some data-parallel ranks, in their order.

    One that has no others is left out; what it was to release, the next one of its replica does.

    Args:
        caches: (replica, data-parallel rank) of each cache that is lost.

    Returns:
        Plans that are left, and by replica the sequences that none of them releases any more.
    """
    kept: list[StepPlan] = []
    to_release: dict[int, tuple[int, ...]] = {}
    for plan in plans:
        left = plan.without([dp_rank for replica, dp_rank in caches if replica == plan.replica])
        released = to_release.pop(plan.replica, ())
        if not left.micro_batches:
            to_release[plan.replica] = released + left.released
        elif released:
            kept.append(replace(left, released=released + left.released))
        else:
            kept.append(left)
    return kept, to_release


@dataclass(frozen=True, eq=False)
class StepOutcome:
    """Outcome of a finished step.

    Attributes:
        token_ids: by sequence id, the next token of every sequence of the plan that yields one.
        not_finite: sequences without a next token: their greatest logit is NaN or infinite.
        logits: by sequence id, [vocab_size]; empty unless the plan asked for them.
        logprobs: by sequence id, for those that asked for them.
        prompt_logprobs: by sequence id, for the part of its prompt that was computed.
        records: one a rank of the replica; empty unless the plan asked for them.
        submitted_s, finished_s: on the runner's clock.
    """

    token_ids: dict[int, int]
    logits: dict[int, npt.NDArray[np.float32]]
    records: tuple[RankRecord, ...]
    submitted_s: float
    finished_s: float
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    not_finite: tuple[int, ...] = ()
    prompt_logprobs: dict[int, PromptPart] = field(default_factory=dict)


class Runner(Protocol[HandleT]):
    """Executes step plans; up to `pp` steps over disjoint sequences may be in flight a replica.

    The steps of a replica end in the order in which they were submitted.
    """

    def submit(self, plan: StepPlan) -> HandleT:
        """Begin a step."""
        ...

    def first_done(self, handles: Sequence[HandleT]) -> HandleT:
        """Wait until one of the steps is finished, and say which."""
        ...

    def collect(self, handle: HandleT) -> StepOutcome:
        """Wait for a step and take its outcome; each handle is collected once."""
        ...
