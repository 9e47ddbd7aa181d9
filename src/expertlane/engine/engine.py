"""Requests in, tokens out: the scheduler and the ranks as one, a step at a time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import SystemRandom
from typing import Generic

from expertlane.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from expertlane.errors import UserError
from expertlane.schedule.drive import DriveLoop, FinishedStep
from expertlane.schedule.plan import HandleT, Runner, StepOutcome
from expertlane.schedule.request import Chunk, FinishReason, Request, RequestOutput
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.names import Phase
from expertlane.spec.sampling import SamplingParams

Prompt = str | Sequence[int]


@dataclass(slots=True, eq=False)
class _Live:
    """A request that is not finished; no detokenizer where there is no tokenizer.

    Attributes:
        is_plain: tokens are all that it is given.
        add_time: takes the time of a token.
    """

    request: Request
    output: RequestOutput
    detokenizer: IncrementalDetokenizer | None
    wants_logprobs: bool
    is_plain: bool
    add_time: Callable[[float], None]


class Engine(Generic[HandleT]):
    """Continuous batching; knows requests by id and keeps them until they are finished.

    Args:
        eos_token_ids: tokens that end an output unless `ignore_eos`.
        tokenizer: None where prompts are tokens only.
        on_commit: called with every step.

    Attributes:
        scheduler: its counts may be read from any thread.
        on_commit: as given; may be set between steps.
    """

    def __init__(
        self,
        scheduler: ContinuousScheduler,
        runner: Runner[HandleT],
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        tokenizer: Tokenizer | None = None,
        on_commit: Callable[[FinishedStep], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._loop = DriveLoop(scheduler, runner)
        self._eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self.on_commit = on_commit
        self._live: dict[str, _Live] = {}
        self._unscheduled: dict[int, _Live] = {}  # by sequence id: in no step so far
        self._ended: list[Chunk] = []  # by a cancellation, not yet told
        self._seeds = SystemRandom()

    @property
    def num_cached_tokens(self) -> int:
        """As the scheduler has it."""
        return self.scheduler.num_cached_tokens

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has more to give."""
        return bool(self._live or self._ended)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do: no request, and no step that an ended one was in."""
        return not (self._ended or self.scheduler.has_unfinished)

    def add(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        name: str | None = None,
    ) -> RequestOutput:
        """Queue a request; its output fills as steps finish.

        Args:
            priority: lower goes first.
            name: what messages call it; by default `request` and its id.

        Raises:
            UserError: it can never be served, or the id is taken; nothing is queued.
        """
        name = f"request {request_id!r}" if name is None else name
        token_ids = self._encode(name, prompt, params)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        request = Request(
            request_id,
            token_ids,
            max_tokens=params.max_tokens,
            stop_token_ids=params.stop_token_ids,
            eos_token_ids=self._eos_token_ids,
            ignore_eos=params.ignore_eos,
            priority=priority,
            sampling=params if params.needs_logits else None,
            sampling_seed=seed,
            name=name,
        )
        self.scheduler.add(request)
        prompt_ids: list[int] = request.prompt_token_ids.tolist()
        output = RequestOutput(
            request_id,
            prompt if isinstance(prompt, str) else None,
            prompt_ids,
            time.perf_counter(),
            request.output_token_ids,  # one list for both
        )
        detokenizer = None
        if self._tokenizer is not None:
            detokenizer = IncrementalDetokenizer(
                self._tokenizer, prompt_ids, stop=params.stop, min_tokens=params.min_tokens
            )
        wants_logprobs = params.logprobs is not None
        self._live[request_id] = self._unscheduled[request.seq_id] = _Live(
            request,
            output,
            detokenizer,
            wants_logprobs,
            is_plain=detokenizer is None and not wants_logprobs,
            add_time=output.token_times_s.append,
        )
        return output

    def _encode(self, name: str, prompt: Prompt, params: SamplingParams) -> Sequence[int]:
        if self._tokenizer is None and params.stop:
            raise UserError(f"{name}: stop strings need a tokenizer; use stop_token_ids instead")
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise UserError(f"{name}: a text needs a tokenizer; give the prompt as token ids")
        return self._tokenizer.encode(prompt)

    def cancel(self, request_id: str) -> bool:
        """End a request now, wherever it stands.

        Returns:
            False if no unfinished request has this id.
        """
        live = self._live.pop(request_id, None)
        if live is None:
            return False
        self.scheduler.cancel(request_id)
        self._unscheduled.pop(live.request.seq_id, None)
        self._ended.append(self._end(live, None, FinishReason.CANCELLED))
        return True

    def step(self, before_plan: Callable[[], None] = lambda: None) -> list[Chunk]:
        """Wait for one step of the ranks, and give what it brought.

        The next step is under way before this one's tokens are turned into text.

        Args:
            before_plan: called between the two; it may add requests and cancel some.

        Raises:
            RankError: a rank died, hung or failed.
        """
        self._loop.submit()
        chunks, self._ended = self._ended, []
        finished = self._loop.commit_next()
        if finished is None:
            return chunks
        if self.on_commit is not None:
            self.on_commit(finished)
        if self._unscheduled and finished.plan.phase is Phase.PREFILL:
            self._note_scheduled(finished)
        stepped, failed = self.scheduler.stepped, self.scheduler.failed
        before_plan()
        self._loop.submit()
        for request in failed:
            if (live := self._live.pop(request.request_id, None)) is not None:
                chunks.append(self._end(live, None, FinishReason.ERROR))
        return chunks + self._take(stepped, finished.outcome)

    def _note_scheduled(self, finished: FinishedStep) -> None:
        for batch in finished.plan.batches:
            for seq_id in batch.seq_ids.tolist():
                if (live := self._unscheduled.pop(seq_id, None)) is not None:
                    live.output.scheduled_s = finished.outcome.submitted_s

    def _take(self, stepped: list[Request], outcome: StepOutcome) -> list[Chunk]:
        """What a step brought the requests that got a token; a hot loop."""
        chunks, finished_s, lives = [], outcome.finished_s, self._live
        for request in stepped:
            request_id, reason, text = request.request_id, request.finish_reason, ""
            live = lives.get(request_id)
            if live is None:  # cancelled since
                continue
            token_id = request.output_token_ids[-1]
            live.add_time(finished_s)
            if live.is_plain and reason is None:
                chunks.append(Chunk(request_id, token_id, "", None))
                continue
            if live.wants_logprobs:
                live.output.logprobs.append(outcome.logprobs[request.seq_id])
            if live.detokenizer is not None and reason is not FinishReason.STOP:
                text = live.detokenizer.append(token_id)
                live.output.text += text
                if live.detokenizer.stopped:
                    reason = FinishReason.STOP
                    self.scheduler.cancel(request_id, reason)
            if reason is None:
                chunks.append(Chunk(request_id, token_id, text, None))
            else:
                del self._live[request_id]
                chunks.append(self._end(live, token_id, reason, text))
        return chunks

    def _end(
        self, live: _Live, token_id: int | None, reason: FinishReason, text: str = ""
    ) -> Chunk:
        output = live.output
        output.finish_reason = reason
        output.error = live.request.error
        output.num_preemptions = live.request.num_preemptions
        if live.detokenizer is not None:
            rest = live.detokenizer.finish()
            output.text += rest
            text += rest
        return Chunk(output.request_id, token_id, text, reason, output.error)
