"""A request: its prompt and parameters, its limits, its progress and its output."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from expertlane.errors import UserError
from expertlane.spec.ranges import RANGES, take, take_fields
from expertlane.spec.sampling import PromptLogprobs, SamplingParams, SamplingState, TokenLogprobs


class RequestState(StrEnum):
    """State of a request in the scheduler."""

    WAITING = "waiting"  # new, or has lost its blocks
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence or stop token, or a stop string
    LENGTH = "length"  # max_tokens, the model's positions or the cache
    CANCELLED = "cancelled"
    ERROR = "error"  # its logits are NaN or infinite
    GRAMMAR = "grammar"  # the next token of its grammar costs more than a step may


@dataclass(frozen=True)
class Limits:
    """Sizes that bound a scheduler; those of the cache and of a step hold a data-parallel rank.

    Attributes:
        max_model_len: positions a sequence may take. The last output token is never fed back, so
            a prompt of this length still gets one.
        num_blocks, block_size: the paged cache; `block_size` positions a block.
        max_num_batched_tokens: new tokens in a step.
        max_num_seqs: running requests.
        aging_steps: steps of waiting that make up for one level of priority.
        prefix_caching: requests with a common prefix share blocks.
        prompt_wait_steps: with data-parallel attention a prompt waits until there is one for every
            rank, at most so many steps: a step takes as long as its busiest rank.
        phases_apart: a step holds prompts or decodes, never both, and prompts go first; so that
            each can be measured by itself. A decode waits while any prompt can be computed.
        state_blocks: blocks of the cache whose room the state of a running request takes, beside
            those of its positions.

    Raises:
        SpecError: a size is out of its range.
    """

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    aging_steps: int = 1000
    prefix_caching: bool = True
    prompt_wait_steps: int = 0
    phases_apart: bool = False
    state_blocks: int = 0

    def __post_init__(self) -> None:
        take_fields(self, "scheduler: {}".format)

    @property
    def max_positions(self) -> int:
        """The most positions that any sequence can take."""
        num_blocks = max(self.num_blocks - self.state_blocks, 1)
        return min(self.max_model_len, num_blocks * self.block_size)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` positions take."""
        return -(-num_tokens // self.block_size)

    def max_num_tokens(self, request: "Request") -> int:
        """Prompt and output tokens at which a request has reached its length."""
        prompt_len = len(request.prompt_token_ids)
        return prompt_len + min(request.max_tokens, self.max_positions - prompt_len + 1)

    def check(self, request: "Request") -> None:
        """Check that a request can be served.

        Raises:
            UserError: the prompt is empty, too long for the model or the cache, or holds what is
                no token of the vocabulary, as does `logit_bias`; `max_tokens` is under 1;
                `priority` is no number.
        """
        name = request.name
        self._check_prompt(name, request.prompt_token_ids)
        take("max_tokens", request.max_tokens, f"{name}: max_tokens")
        take("priority", request.priority, f"{name}: priority")
        for token_id, _ in () if request.sampling is None else request.sampling.logit_bias:
            if token_id >= self.vocab_size:
                raise UserError(
                    f"{name}: token id {token_id} of logit_bias is not in the vocabulary; "
                    f"valid ids: 0 to {self.vocab_size - 1}"
                )

    def _check_prompt(self, name: str, prompt: np.ndarray) -> None:
        if prompt.size == 0:
            raise UserError(f"{name}: the prompt is empty; it must have 1 token or more")
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
            raise UserError(f"{name}: the prompt must be one list of whole numbers")
        wrong = prompt[(prompt < 0) | (prompt >= self.vocab_size)]
        if wrong.size:
            raise UserError(
                f"{name}: token id {wrong[0]} is not in the vocabulary; "
                f"valid ids: 0 to {self.vocab_size - 1}"
            )
        if len(prompt) > self.max_model_len:
            raise UserError(
                f"{name}: the prompt has {len(prompt)} tokens but the model takes "
                f"{self.max_model_len}; valid lengths: 1 to {self.max_positions}"
            )
        if len(prompt) > self.max_positions:
            raise UserError(
                f"{name}: the prompt of {len(prompt)} tokens needs "
                f"{self.blocks_for(len(prompt))} blocks of {self.block_size} but the cache "
                f"has {self.num_blocks}; valid lengths: 1 to {self.max_positions}"
            )


ROOT = b""  # stands for the parent of a sequence's first block


def block_digest(parent: bytes, tokens: bytes) -> bytes:
    """Name a full block by its content and by all that stands before it.

    Keys and values depend on every earlier token, so two blocks are interchangeable only if their
    whole prefixes are equal. 16 bytes of BLAKE2b: a clash would mean wrong output, so Python's
    64-bit `hash` is not enough.

    Args:
        parent: digest of the block before, or `ROOT`.
        tokens: its token ids, 8 bytes each.
    """
    return blake2b(parent + tokens, digest_size=16).digest()


class Request:
    """A prompt to be continued, and how far it has come.

    Attributes:
        prompt_token_ids: [prompt_len].
        stop_token_ids: tokens that end the output, end-of-sequence tokens included unless they
            are to be ignored. The token that ends an output is part of it.
        name: its name in messages; by default `request` and its id.
        priority: lower goes first.
        sampling: parameters of sampling; None where the likeliest token is taken.
        sampling_seed: seed of its random numbers.
        mask: which tokens may come next, as `plan.StepPlan.masks`; None where all may, or where it
            is not known yet.
        is_masked: whether each of its tokens waits for a mask.
        num_arrived_tokens: of the prompt, how many positions come with keys and values that were
            computed elsewhere; forgotten if it loses its blocks. The last token's never count.
        output_token_ids: tokens generated so far.
        error: why it failed, in a line; None where it did not.
        seq_id: the number under which plans carry the request; the order of arrival.
        order: who goes first where not all can; set on arrival and never changed.
        replica, dp_rank, row: place where it runs; chosen anew after a preemption.
        num_preemptions: times that its blocks were taken away.
        num_recovered: times that its keys and values were lost with a rank.
        num_cached_tokens: of its prompt, found in the prefix cache when it first began; None
            before.
        has_cached: whether it uses blocks that other requests computed.
        may_share: whether it may use such blocks when it is admitted again.

    Raises:
        UserError: the prompt is no list of numbers. All else is checked when it is added.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int] | npt.NDArray[np.int64],
        *,
        max_tokens: int,
        stop_token_ids: Iterable[int] = (),
        eos_token_ids: Iterable[int] = (),
        ignore_eos: bool = False,
        priority: int = 0,
        sampling: SamplingParams | None = None,
        sampling_seed: int = 0,
        num_arrived_tokens: int = 0,
        mask: npt.NDArray[np.uint8] | None = None,
        name: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.name = f"request {request_id!r}" if name is None else name
        most = RANGES["prompt_len"].high
        if isinstance(prompt_token_ids, Sequence) and len(prompt_token_ids) > most:
            raise UserError(
                f"{self.name}: the prompt has {len(prompt_token_ids):,} tokens; at most {most:,} "
                "are taken"
            )
        try:
            self.prompt_token_ids = np.array(prompt_token_ids)  # a copy: the caller keeps theirs
        except ValueError:
            raise UserError(f"{self.name}: the prompt must be one list of whole numbers") from None
        self.max_tokens = max_tokens
        self.stop_token_ids = frozenset(stop_token_ids).union(() if ignore_eos else eos_token_ids)
        self.priority = priority
        self.sampling = sampling
        self.sampling_seed = sampling_seed
        self.num_arrived_tokens = num_arrived_tokens
        self.mask = mask
        self.is_masked = mask is not None
        self.state = RequestState.WAITING
        self.finish_reason: FinishReason | None = None
        self.output_token_ids: list[int] = []
        self.seq_id = -1
        self.order = (0, -1)
        self.replica = self.dp_rank = self.row = -1
        self.num_preemptions = self.num_recovered = 0
        self.num_cached_tokens: int | None = None
        self.has_cached = False
        self.may_share = True
        self.error: str | None = None
        self._digests: list[bytes] = []

    @property
    def scores_prompt(self) -> bool:
        """True if its prompt must be computed whole for log-probabilities (`SamplingState`)."""
        params = self.sampling
        return (
            params is not None and params.prompt_logprobs is not None and not self.output_token_ids
        )

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def sampling_state(self) -> SamplingState | None:
        """The state that ranks need to sample its next tokens; None if the likeliest are taken."""
        if self.sampling is None:
            return None
        output = np.array(self.output_token_ids, dtype=np.int64)
        stops = tuple(sorted(self.stop_token_ids)) if self.sampling.holds_stops else ()
        return SamplingState(
            self.sampling, self.sampling_seed, self.prompt_token_ids, output, stops
        )

    def finish(self, reason: FinishReason) -> None:
        """End the request."""
        self.state = RequestState.FINISHED
        self.finish_reason = reason

    def fail(self, step: int) -> None:
        """End with an error: a step gave logits that are not finite."""
        self.finish(FinishReason.ERROR)
        self.error = (
            f"{self.name}, output token {len(self.output_token_ids) + 1}: {not_finite(step)}"
        )

    def is_prompt_block(self, index: int, block_size: int) -> bool:
        """True if one of its blocks holds tokens of the prompt alone."""
        return (index + 1) * block_size <= len(self.prompt_token_ids)

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Prompt and output as one sequence: [stop - start]."""
        prompt, output = self.prompt_token_ids, self.output_token_ids
        prompt_len = len(prompt)
        if stop <= prompt_len:
            return prompt[start:stop]
        if start >= prompt_len:
            return np.array(output[start - prompt_len : stop - prompt_len], dtype=np.int64)
        tail = np.array(output[: stop - prompt_len], dtype=np.int64)
        return np.concatenate((prompt[start:], tail))

    def digest(self, index: int, block_size: int) -> bytes:
        """The digest of one of its full blocks; each is computed once."""
        digests = self._digests
        while len(digests) <= index:
            start = len(digests) * block_size
            parent = digests[-1] if digests else ROOT
            digests.append(block_digest(parent, self._token_bytes(start, start + block_size)))
        return digests[index]

    def _token_bytes(self, start: int, stop: int) -> bytes:
        """`tokens` as bytes; for generated ones without numpy, which takes longer for so few."""
        prompt_len = len(self.prompt_token_ids)
        if start < prompt_len:
            return self.tokens(start, stop).tobytes()
        return array("q", self.output_token_ids[start - prompt_len : stop - prompt_len]).tobytes()


@dataclass(eq=False)
class RequestOutput:
    """A request's output so far, with its times.

    Attributes:
        prompt: None where the prompt was given as tokens.
        token_ids: the output, with the token that ended it.
        text: text of the output; without what stopped it, and empty without a tokenizer.
        logprobs: [len(token_ids)]; empty unless asked for.
        prompt_logprobs: [len(prompt_token_ids)]; None unless asked for. All are there before the
            first token is.
        num_cached_tokens: prompt tokens found in the prefix cache and not computed.
        finish_reason: None while it goes on.
        error: why it failed, in a line; None where it did not.
        num_preemptions: times that its keys and values were dropped and computed again.
        arrival_s: when it was added, on `time.perf_counter`; the times below are since then.
        scheduled_s: until the first step with tokens of it began; None before that step has ended.
        token_times_s: [len(token_ids)]; until each token came. Of an output that an earlier process
            began, those that came in this one.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    arrival_s: float
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    token_times_s: list[float] = field(default_factory=list)
    error: str | None = None
    scheduled_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token; None before there is one."""
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def e2e_s(self) -> float | None:
        """Time to the last token so far; None before there is one."""
        return self.token_times_s[-1] if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None before there are two."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


@dataclass(slots=True)  # not frozen: made once a token, that would take three times as long
class Chunk:
    """The part of a request's output that one step brought.

    Attributes:
        token_id: the new token; None where the request ended without one: it was cancelled or
            failed, or its grammar lets nothing follow.
        text: the new text that is certain; may be empty.
        finish_reason: set in a request's last chunk.
        error: as in `RequestOutput`.
    """

    request_id: str
    token_id: int | None
    text: str
    finish_reason: FinishReason | None
    error: str | None = None


def not_finite(step: int) -> str:
    """The error line of a step without a next token."""
    return (
        f"the logits are NaN or infinite (step {step}); "
        "the weights may be damaged, or too large for the dtype"
    )
