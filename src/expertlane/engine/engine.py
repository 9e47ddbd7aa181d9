"""The engine: a scheduler and a runner of ranks, driven one step at a time.

It makes prompts requests of the scheduler, and the tokens of live requests text.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cached_property, partial
from random import SystemRandom
from typing import Generic, TypeVar

from expertlane.balance.transition import Arrangement
from expertlane.engine.elastic.recovery import Recovery
from expertlane.engine.elastic.recovery_record import State
from expertlane.errors import RanksLostError, UserError
from expertlane.schedule.plan import HandleT, Runner, StepOutcome
from expertlane.schedule.request import Chunk, FinishReason, Request, RequestOutput
from expertlane.schedule.scheduler import ContinuousScheduler, DriveLoop, FinishedStep
from expertlane.spec.names import Phase
from expertlane.spec.sampling import PromptLogprobs, SamplingParams
from expertlane.text.grammars import Constraint, Grammars
from expertlane.text.tokenizer import IncrementalDetokenizer, Tokenizer

Prompt = str | Sequence[int]


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request that is not finished.

    Attributes:
        params: as it was asked for.
        detokenizer: None where there is no tokenizer.
        is_plain: its chunks have neither text nor log-probabilities.
        add_time: takes each token's seconds since the arrival.
        constraint: the grammar state that masks its tokens; None without structured output.
    """

    request: Request
    output: RequestOutput
    params: SamplingParams
    detokenizer: IncrementalDetokenizer | None
    is_plain: bool
    add_time: Callable[[float], None]
    constraint: Constraint | None = None

    def end(self, token_id: int | None, reason: FinishReason, text: str = "") -> Chunk:
        """Finish the output, and return its last chunk.

        Args:
            token_id: the last token; None if the request ends without one.
            text: the text of this token.
        """
        output = self.output
        output.finish_reason = reason
        output.error = self.request.error
        output.num_preemptions = self.request.num_preemptions
        if self.detokenizer is not None:
            rest = self.detokenizer.finish()
            output.text += rest
            text += rest
        return Chunk(output.request_id, token_id, text, reason, output.error)


_MASKS_S = 0.005  # longest wait for masks before a step; the step before it runs meanwhile
ResultT = TypeVar("ResultT")


def _nothing() -> None:
    pass


class Engine(Generic[HandleT]):
    """Continuous batching; knows requests by id and keeps them until they are finished.

    Args:
        eos_token_ids: tokens that end an output unless `ignore_eos`.
        tokenizer: None where prompts are tokens only.
        on_commit: called with every committed step; may be set between steps.
        recovery: replaces lost ranks; None where their loss ends the engine.

    Attributes:
        scheduler: its counts may be read from any thread.
        recovery: its state and records may be read from any thread.
    """

    def __init__(
        self,
        scheduler: ContinuousScheduler,
        runner: Runner[HandleT],
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        tokenizer: Tokenizer | None = None,
        on_commit: Callable[[FinishedStep], None] | None = None,
        recovery: Recovery | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._loop = DriveLoop(scheduler, runner)
        self._eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self.on_commit = on_commit
        self.recovery = recovery
        self._live: dict[str, LiveRequest] = {}
        self._unscheduled: dict[int, LiveRequest] = {}  # by sequence id: in no step so far
        self._scoring: dict[int, RequestOutput] = {}  # by sequence id: with `prompt_logprobs`
        self._ended: list[Chunk] = []  # last chunks that the next `step` returns
        self._seeds = SystemRandom()
        self._masks: dict[Future[None], list[LiveRequest]] = {}  # masks being computed
        self._complete: dict[str, FinishReason] = {}  # by id: requests that a constraint has ended

    @cached_property
    def grammars(self) -> Grammars:
        """The compiled grammars of structured outputs; made on first use.

        Raises:
            UserError: there is no tokenizer.
        """
        if self._tokenizer is None:
            raise UserError("structured output needs a tokenizer")
        return Grammars(self._tokenizer, self.scheduler.vocab_size, self._eos_token_ids)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache, over all requests so far."""
        return self.scheduler.num_cached_tokens

    @property
    def has_unfinished(self) -> bool:
        """True if `step` has chunks to return, now or later."""
        return bool(self._live or self._ended)

    @property
    def is_idle(self) -> bool:
        """True if no request is unfinished, no step is under way, and no chunk waits."""
        return not (self._ended or self.scheduler.has_unfinished)

    def add(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        name: str | None = None,
        earlier: RequestOutput | None = None,
    ) -> RequestOutput:
        """Queue a request; its output fills as steps finish.

        Args:
            priority: lower goes first.
            name: what messages call it; by default `request` and its id.
            earlier: an unfinished output to continue, of one token or more, drawn with the seed of
                `params`; it is the output returned.

        Raises:
            UserError: it can never be served, or the id is taken; nothing is queued.
        """
        name = f"request {request_id!r}" if name is None else name
        token_ids = self._encode(name, prompt, params)
        constraint = None
        if params.structured is not None:
            constraint = self.grammars.begin(params, params.stop_token_ids)
        request = self._request(request_id, token_ids, params, constraint, priority, name)
        if earlier is not None:  # both hold one list
            request.output_token_ids = earlier.token_ids
            request.num_cached_tokens = earlier.num_cached_tokens
            if constraint is not None:
                self.grammars.skip(constraint, earlier.token_ids)
                if constraint.error is not None:
                    raise UserError(f"{name}: {constraint.error}")
                request.mask = None if constraint.is_ended else constraint.mask
        self.scheduler.add(request)
        prompt_ids: list[int] = request.prompt_token_ids.tolist()
        output = earlier or RequestOutput(
            request_id,
            prompt if isinstance(prompt, str) else None,
            prompt_ids,
            time.perf_counter(),
            request.output_token_ids,  # one list for both
        )
        if params.prompt_logprobs is not None and earlier is None:
            output.prompt_logprobs = PromptLogprobs(prompt_ids, params.prompt_logprobs)
            self._scoring[request.seq_id] = output
        detokenizer = self._detokenizer(params, output)
        is_plain = detokenizer is None and params.logprobs is None
        live = LiveRequest(
            *(request, output, params, detokenizer, is_plain),
            output.token_times_s.append,
            constraint,
        )
        self._live[request_id] = self._unscheduled[request.seq_id] = live
        if constraint is not None and constraint.is_ended:
            self._complete[request_id] = FinishReason.STOP
        return output

    def _encode(self, name: str, prompt: Prompt, params: SamplingParams) -> Sequence[int]:
        """Token ids of a prompt, whose messages call it `name`."""
        if self._tokenizer is None and params.stop:
            raise UserError(f"{name}: stop strings need a tokenizer; use stop_token_ids instead")
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise UserError(f"{name}: a text needs a tokenizer; give the prompt as token ids")
        return self._tokenizer.encode(prompt)

    def _request(
        self,
        request_id: str,
        token_ids: Sequence[int],
        params: SamplingParams,
        constraint: Constraint | None,
        priority: int,
        name: str,
    ) -> Request:
        """A request for the scheduler; with a random seed if `params` has none."""
        sampling = params.with_valid(stop=())  # texts are not the ranks' matter
        if constraint is not None:  # its masks say what may end the output
            sampling = sampling.with_valid(structured=None, min_tokens=0)
        return Request(
            request_id,
            token_ids,
            max_tokens=params.max_tokens,
            stop_token_ids=params.stop_token_ids,
            eos_token_ids=self._eos_token_ids,
            ignore_eos=params.ignore_eos and constraint is None,
            priority=priority,
            sampling=sampling if params.needs_logits else None,
            sampling_seed=self._seeds.getrandbits(64) if params.seed is None else params.seed,
            mask=None if constraint is None else constraint.mask,
            name=name,
        )

    def _detokenizer(
        self, params: SamplingParams, output: RequestOutput
    ) -> IncrementalDetokenizer | None:
        """A detokenizer that has read the tokens which the output already has."""
        if self._tokenizer is None:
            return None
        detokenizer = IncrementalDetokenizer(
            self._tokenizer,
            output.prompt_token_ids,
            stop=params.stop,
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
            shown_token_ids=params.shown_token_ids,
            include_stop=params.include_stop_str_in_output,
        )
        for token_id in output.token_ids:
            detokenizer.append(token_id)
        return detokenizer

    def cancel(self, request_id: str) -> bool:
        """End a request now, whether it waits or runs.

        Returns:
            False if no unfinished request has this id.
        """
        live = self._live.get(request_id)
        if live is None:
            return False
        self._drop(live, FinishReason.CANCELLED)
        return True

    def _drop(self, live: LiveRequest, reason: FinishReason) -> None:
        """End a request between two steps; the next step returns its last chunk."""
        request = live.request
        del self._live[request.request_id]
        self.scheduler.cancel(request.request_id, reason)
        self._unscheduled.pop(request.seq_id, None)
        self._ended.append(self._end(live, None, reason))

    def scale(self, whole: Arrangement) -> None:
        """Change the layout, once the steps under way are finished; needs `recovery`.

        The next call of `step` returns the chunks of those steps.

        Raises:
            UserError: fewer ranks serve than should; nothing has changed.
            RankError: a rank died, hung or failed, and is not replaced.
        """
        assert self.recovery is not None, "the layout of such an engine stays"
        self.with_ranks(lambda: None)  # ends a recovery that was interrupted
        while not self._loop.is_idle:
            self._ended = self.step(plans=False)
        self.recovery.settle()
        self.recovery.check_whole()
        self.recovery.scale(whole, self._loop)
        if not self.scheduler.has_unfinished:
            self.recovery.settle()

    def step(
        self, before_plan: Callable[[], None] = lambda: None, *, plans: bool = True
    ) -> list[Chunk]:
        """Wait for one step of the ranks, and return its chunks.

        The next step is submitted before this one's tokens are turned into text.

        Args:
            before_plan: called before the next step is planned; it may add and cancel requests.
            plans: whether to submit steps after those under way.

        Raises:
            RankError: a rank died, hung or failed, and is not replaced.
        """
        submit = self._loop.submit if plans else _nothing
        if self._masks:
            self._take_masks(0)
        self.grow()
        self.with_ranks(submit)
        finished = self.with_ranks(self._loop.commit_next)
        chunks, self._ended = self._ended, []
        if self.recovery is not None and (finished or not self.scheduler.has_unfinished):
            self.recovery.settle(finished and finished.plan)
        if finished is None:
            if self._masks:  # every request left waits for its mask
                self._take_masks(None)
            return chunks + self._end_complete()
        if self.on_commit is not None:
            self.guarded(partial(self.on_commit, finished))
        if self._unscheduled and finished.plan.phase is Phase.PREFILL:
            self._note_scheduled(finished)
        for seq_id, part in finished.outcome.prompt_logprobs.items():
            output = self._scoring.get(seq_id)  # None of a request that was cancelled meanwhile
            if output is not None and output.prompt_logprobs is not None:
                output.prompt_logprobs.add(part)
        stepped, failed = self.scheduler.stepped, self.scheduler.failed
        self._begin_masks(stepped)
        before_plan()
        if self._masks:
            self._take_masks(_MASKS_S)
        self.with_ranks(submit)
        for request in failed:
            if (live := self._live.pop(request.request_id, None)) is not None:
                chunks.append(self._end(live, None, FinishReason.ERROR))
        chunks += self._take(stepped, finished.outcome)
        return chunks + self._end_complete()

    def grow(self) -> None:
        """Return from a smaller layout, if the lost ranks are ready.

        Raises:
            RankError: a rank died, hung or failed, and is not replaced.
        """
        recovery = self.recovery
        if recovery is not None and recovery.state is State.SHRUNK:
            self.guarded(partial(recovery.grow, self._loop))
            if not self.scheduler.has_unfinished:
                recovery.settle()

    def guarded(self, action: Callable[[], None]) -> None:
        """Run an action once; if it finds that ranks are lost, replace them (with `recovery`).

        Raises:
            RankError: a rank died, hung or failed, and is not replaced.
        """
        try:
            action()
        except RanksLostError as error:
            self._recover(error)

    def with_ranks(self, action: Callable[[], ResultT]) -> ResultT:
        """Run an action that needs ranks; after each recovery of lost ones, run it again."""
        if self.recovery is not None and self.recovery.is_interrupted:
            self._recover(RanksLostError("a recovery was interrupted", ()))
        while True:
            try:
                return action()
            except RanksLostError as error:
                self._recover(error)

    def _recover(self, error: RanksLostError) -> None:
        if self.recovery is None:
            raise error
        to_end = {*self.recovery.recover(error, self._loop)}
        for live in [each for each in self._live.values() if each.request.seq_id in to_end]:
            live.request.error = (
                f"{live.request.name}: ranks were lost again and again while they computed it; "
                f"the last time: {error}"
            )
            self._drop(live, FinishReason.ERROR)
        if not self.scheduler.has_unfinished:
            self.recovery.settle()

    def _begin_masks(self, stepped: list[Request]) -> None:
        """Start computing token masks for the next step, from the tokens that this one sampled."""
        lives = self._live
        going = [
            lives[request.request_id]
            for request in stepped
            if request.is_masked and request.finish_reason is None
        ]
        if going:
            tokens = [
                (live.constraint, live.request.output_token_ids[-1])
                for live in going
                if live.constraint is not None
            ]
            self._masks[self.grammars.advance(tokens)] = going

    def _take_masks(self, timeout_s: float | None) -> None:
        """Wait for masks, and give the scheduler those that are ready.

        Args:
            timeout_s: the longest wait; None to wait for all of them.
        """
        for future in wait(self._masks, timeout_s).done:
            future.result()
            for live in self._masks.pop(future):
                request, constraint = live.request, live.constraint
                if self._live.get(request.request_id) is not live or constraint is None:
                    continue  # it was cancelled
                if constraint.error is not None:
                    request.error = (
                        f"{request.name}, output token {len(request.output_token_ids) + 1}: its "
                        f"grammar is too costly: {constraint.error}"
                    )
                    self._complete[request.request_id] = FinishReason.GRAMMAR
                elif constraint.is_ended:
                    self._complete[request.request_id] = FinishReason.STOP
                else:
                    self.scheduler.allow(request, constraint.mask)

    def _end_complete(self) -> list[Chunk]:
        """Finish the requests that a constraint has ended, with a chunk without a token.

        It is never the last token's chunk: that would depend on whether masks are ready in time.
        """
        chunks = []
        for request_id, reason in self._complete.items():
            if (live := self._live.pop(request_id, None)) is not None:
                self.scheduler.cancel(request_id, reason)
                chunks.append(self._end(live, None, reason))
        self._complete.clear()
        return chunks

    def _note_scheduled(self, finished: FinishedStep) -> None:
        for batch in finished.plan.batches:
            for seq_id in batch.seq_ids.tolist():
                if (live := self._unscheduled.pop(seq_id, None)) is not None:
                    output, submitted_s = live.output, finished.outcome.submitted_s
                    output.scheduled_s = submitted_s - output.arrival_s
                    output.num_cached_tokens = live.request.num_cached_tokens or 0

    def _take(self, stepped: list[Request], outcome: StepOutcome) -> list[Chunk]:
        """The chunks of the requests that got a token in a step; a hot loop."""
        chunks, finished_s, lives = [], outcome.finished_s, self._live
        for request in stepped:
            request_id, reason, text = request.request_id, request.finish_reason, ""
            live = lives.get(request_id)
            if live is None:  # cancelled since
                continue
            token_id = request.output_token_ids[-1]
            live.add_time(finished_s - live.output.arrival_s)
            if live.is_plain and reason is None:
                chunks.append(Chunk(request_id, token_id, "", None))
                continue
            if live.params.logprobs is not None:
                live.output.logprobs.append(outcome.logprobs[request.seq_id])
            ends = reason is FinishReason.STOP and not live.params.include_stop_str_in_output
            if live.detokenizer is not None and not ends:
                text = live.detokenizer.append(token_id)
                live.output.text += text
                if live.detokenizer.stopped and reason is not FinishReason.STOP:
                    reason = FinishReason.STOP
                    self.scheduler.cancel(request_id, reason)
            if reason is None:
                chunks.append(Chunk(request_id, token_id, text, None))
            else:
                del self._live[request_id]
                chunks.append(self._end(live, token_id, reason, text))
        return chunks

    def _end(
        self, live: LiveRequest, token_id: int | None, reason: FinishReason, text: str = ""
    ) -> Chunk:
        self._scoring.pop(live.request.seq_id, None)
        return live.end(token_id, reason, text)
