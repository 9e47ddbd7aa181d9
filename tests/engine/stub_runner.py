"""A runner without ranks or a model: its paged cache holds token ids, as a real one keys."""

import string
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from expertlane.engine.engine import Engine
from expertlane.schedule.plan import UNKNOWN, Batch, StepOutcome, StepPlan
from expertlane.schedule.request import Chunk, Limits
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.sampling import SamplingState, TokenLogprobs
from expertlane.text.tokenizer import Tokenizer
from schedule.paged import UNWRITTEN, check_empty, continuation, model, sequences

VOCAB_SIZE = 26


class StubRunner:
    """Chooses `schedule.paged.model` of all tokens that it finds in the cache.

    A step runs when it is collected; what it says of sampling is taken in at once, and must fit
    together: a sequence is released before it is admitted again, and only if it was admitted.

    Args:
        lookahead: a replica's steps end in their order, and a token that is not in the plan is the
            one that the step before chose; without, steps over disjoint sequences end in any order.
        choose: which of the steps that may end does so first.

    Attributes:
        states: by replica and sequence id, what is known of sampled sequences.
        num_steps: collected so far.
        poison: sequences that hold this token get no next one.
        before: called before a step is collected; it may raise, as ranks do.
    """

    def __init__(
        self,
        limits: Limits,
        layout: Layout,
        *,
        lookahead: bool,
        choose: Callable[[Sequence[StepPlan]], StepPlan] = lambda handles: handles[0],
    ) -> None:
        self.states: dict[tuple[int, int], SamplingState] = {}
        self.num_steps = 0
        self.poison: int | None = None
        self.before: Callable[[], None] = lambda: None
        self._lookahead = lookahead
        self._chosen: list[dict[int, int]] = [{} for _ in range(layout.replicas)]
        self._choose = choose
        self.limits, self._vocab_size = limits, limits.vocab_size
        shape = (layout.replicas, layout.dp, limits.num_blocks, limits.block_size)
        self._caches = np.full(shape, UNWRITTEN)

    def submit(self, plan: StepPlan) -> StepPlan:
        for seq in plan.released:
            del self.states[plan.replica, seq]
        for seq, state in plan.admitted.items():
            assert (plan.replica, seq) not in self.states
            self.states[plan.replica, seq] = state
        return plan

    def first_done(self, handles: Sequence[StepPlan]) -> StepPlan:
        if self._lookahead:
            first_of_replica = {plan.replica: plan for plan in reversed(handles)}
            handles = list(first_of_replica.values())
        return self._choose(handles)

    def collect(self, handle: StepPlan) -> StepOutcome:
        self.before()
        self.num_steps += 1
        replica = handle.replica
        token_ids: dict[int, int] = {}
        not_finite: list[int] = []
        for micro_batch in handle.micro_batches:
            for batch, cache in zip(micro_batch, self._caches[replica], strict=True):
                self._run(batch, cache, self._chosen[replica], token_ids, not_finite)
        self._chosen[replica] = token_ids | dict.fromkeys(not_finite, 0)
        logprobs = {
            seq: TokenLogprobs(token, -float(token), ((0, 0.0),) * state.params.logprobs)
            for seq, token in token_ids.items()
            if (state := self.states.get((replica, seq))) and state.params.logprobs is not None
        }
        now_s = float(self.num_steps)
        return StepOutcome(token_ids, {}, (), now_s, now_s, logprobs, tuple(not_finite))

    def _run(
        self,
        batch: Batch,
        cache: np.ndarray,
        chosen: dict[int, int],
        token_ids: dict[int, int],
        not_finite: list[int],
    ) -> None:
        for seq, start, planned, table, yields in sequences(batch):
            fed = [chosen[seq]] if self._lookahead and planned == [UNKNOWN] else planned
            positions = np.arange(start + len(fed))
            size = cache.shape[1]
            places = (table[positions // size], positions % size)
            cache[places[0][start:], places[1][start:]] = fed
            known = cache[places].tolist()
            assert UNWRITTEN not in known, "it reads what was never written"
            if yields and self.poison in known:
                not_finite.append(seq)
            elif yields:
                token_ids[seq] = model(known, self._vocab_size)


class StubEngine(Engine[StepPlan]):
    """An engine on a `StubRunner`.

    Args:
        lookahead: None to do as `LLM` does.
        limits: those of `Limits` that are not the default.
    """

    def __init__(
        self,
        layout: str = "tp=1",
        options: Options | None = None,
        *,
        eos_token_ids: Sequence[int] = (),
        tokenizer: Tokenizer | None = None,
        lookahead: bool | None = None,
        choose: Callable[[Sequence[StepPlan]], StepPlan] = lambda handles: handles[0],
        **limits: int | bool,
    ) -> None:
        sizes = {"max_model_len": 64, "num_blocks": 64, "block_size": 4, "max_num_seqs": 8}
        self.limits = Limits(VOCAB_SIZE, **sizes | limits)
        parsed = Layout.parse(layout)
        if lookahead is None:
            lookahead = parsed.pp == 1
        self.scheduler = ContinuousScheduler(
            parsed, options or Options(), self.limits, lookahead=lookahead, record=False
        )
        self.runner = StubRunner(self.limits, parsed, lookahead=lookahead, choose=choose)
        super().__init__(
            self.scheduler,
            self.runner,
            eos_token_ids=frozenset(eos_token_ids),
            tokenizer=tokenizer,
        )

    def num_blocks_used(self) -> int:
        """Of all data-parallel ranks."""
        return sum(table.blocks.num_used for table in chain.from_iterable(self.scheduler.tables))


def letters() -> Tokenizer:
    """A token a letter: token i is letter i of the alphabet."""
    vocab = {letter: i for i, letter in enumerate(string.ascii_lowercase)}
    core = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return Tokenizer(core)


def spell(token_ids: Sequence[int]) -> str:
    """What `letters` makes of tokens."""
    return "".join(string.ascii_lowercase[token_id] for token_id in token_ids)


def expected(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The output of an undisturbed request."""
    return continuation(prompt, num_tokens, VOCAB_SIZE)


def run(engine: StubEngine, most: int = 10_000) -> list[Chunk]:
    """All chunks until nothing is left; in the end no block is held and no state kept."""
    chunks: list[Chunk] = []
    while engine.has_unfinished:
        assert engine.runner.num_steps <= most, "it never ends"
        chunks += engine.step()
    while engine.scheduler.has_unfinished:  # a step that a cancelled request was in
        assert engine.step() == []
    check_empty(engine.scheduler)
    return chunks


def of_request(chunks: list[Chunk], request_id: str) -> list[Chunk]:
    return [chunk for chunk in chunks if chunk.request_id == request_id]
