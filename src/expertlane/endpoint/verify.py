"""Verification of a server: log-probabilities under several conditions, and of a reference.

Each condition is one in which engines differ: given tokens scored alone and under load, the same
ones again, tokens generated alone and under load, with the prefix cache cold and warm, and each
data-parallel rank where requests can be sent to one.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import uvloop

from expertlane.client.connection import Connections
from expertlane.client.run import Target, allow_connections, headers_of
from expertlane.client.server import Vocabulary, alike, find_server, flush_caches
from expertlane.endpoint.prompts import (
    NUM_CANDIDATES,
    TIMES,
    ChosenPrompts,
    DrawnPrompts,
    choose_prompts,
    count_choices,
    draw_prompts,
)
from expertlane.endpoint.scored import Prompt, PromptScores, Reference
from expertlane.endpoint.server_scores import (
    AnswerFailure,
    Continuation,
    Endpoint,
    PromptForm,
    find_endpoint,
    settle,
)
from expertlane.endpoint.statistics import FALSE_ALARMS, Floats
from expertlane.endpoint.verdict import (
    AGAIN,
    ALONE,
    ConditionScores,
    Rounding,
    judge,
    measured_rounding,
    rounds_as_float32,
    rounds_less,
    usual_rounding,
)
from expertlane.errors import UserError
from expertlane.progress import Progress
from expertlane.results.verified_record import (
    CoverageRecord,
    DtypeSource,
    LayerExperts,
    VerifiedRecord,
)

T = TypeVar("T")

_NUM_CONTINUED, _NUM_SHARING = 24, 8
_CONTINUATION = 16  # tokens
_PREFIX_LEN, _TAIL_LEN = 64, 16  # whole blocks of the usual sizes
_LOADS = 4, 16, 32  # requests at once
_LEAST_LEN = 8
# Number types of weights alone: against itself a server rounds as its activations do.
_OF_WEIGHTS = ("int8",)
_OF_SERVER = 0.6  # of the budget; the rest is the reference's


@dataclass(frozen=True)
class VerifyOptions:
    """Settings of a verification.

    Attributes:
        dtype: number type that the server computes in; None for the checkpoint's.
        num_prompts: short prompts at least.
        budget_s: seconds after which no further condition is begun.
        seed: of prompts that are drawn.
        timeout_s: seconds that a request may take.
    """

    dtype: str | None = None
    num_prompts: int = 48
    budget_s: float = 240.0
    seed: int = 0
    timeout_s: float = 120.0


def verify(
    target: Target,
    reference: Reference | Target,
    reference_name: str,
    asked: VerifyOptions,
    tokenizer: Vocabulary | None,
    progress: Progress,
) -> VerifiedRecord:
    """Whether a server computes the model that it claims.

    Args:
        tokenizer: the model's, for servers that take text alone; None where there is none.

    Raises:
        UserError: a server refuses, is not there, or tells no log-probabilities.
        ExpertlaneError: it failed meanwhile.
    """
    started_s = time.perf_counter()
    allow_connections()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seen, other = runner.run(_ask_all(target, reference, asked, tokenizer, progress))
    if isinstance(reference, Target):
        assert other is not None, "a second server was asked"
        rounded, dtype, source = _of_second(other, seen, asked)
        coverage = None
    else:
        rounded, dtype, source = _of_checkpoint(reference, seen, asked, progress)
        coverage = _coverage(rounded.exact, reference)
    judged = judge(seen.observed, rounded, dtype)
    endpoint = seen.endpoint
    return VerifiedRecord(
        url=str(endpoint.server.connections.url),
        software=endpoint.server.software,
        model=endpoint.server.model,
        reference=reference_name,
        dtype=dtype,
        dtype_source=source,
        is_measured=rounded.is_measured,
        method=endpoint.method,
        false_alarms=FALSE_ALARMS,
        coverage=coverage,
        skipped=tuple(seen.skipped),
        wall_s=time.perf_counter() - started_s,
        **vars(judged),
    )


def _of_checkpoint(
    reference: Reference, seen: "_ServerScores", asked: VerifyOptions, progress: Progress
) -> tuple[Rounding, str, DtypeSource]:
    """The checkpoint's log-probabilities, rounded as the server rounds."""
    prompts = [each.token_ids for each in seen.sequences]
    dtype: str = asked.dtype or reference.dtype
    source: DtypeSource = "checkpoint" if asked.dtype is None else "told"
    scored = _scored(reference, prompts, seen.chosen, ("float32", dtype), progress)
    exact = scored["float32"]
    if dtype == "float32":
        return usual_rounding(exact, dtype), dtype, source
    rounded = measured_rounding(exact, scored[dtype], dtype)
    if rounds_less(seen.observed[0], rounded):
        return usual_rounding(exact, "float32"), "float32", "seen"
    has_float32 = dtype in _OF_WEIGHTS and reference.dtype == "float32"
    if has_float32 and rounds_as_float32(seen.observed):
        rounded = replace(rounded, own=usual_rounding(scored[dtype], "float32"))
    return rounded, dtype, source


def _scored(
    reference: Reference,
    prompts: Sequence[Prompt],
    chosen: ChosenPrompts | None,
    number_types: Sequence[str],
    progress: Progress,
) -> dict[str, list[PromptScores]]:
    """Scores of prompts in number types; those of `chosen` are there, and not computed again."""
    known: dict[tuple[int, ...], dict[str, PromptScores]] = {}
    if chosen is not None:
        for place, prompt in enumerate(chosen.prompts):
            known[tuple(prompt)] = {name: of[place] for name, of in chosen.scored.items()}
    missing = [each for each in prompts if tuple(each) not in known]
    if missing:
        found = reference.score_in(missing, number_types, progress)
        for place, each in enumerate(missing):
            known[tuple(each)] = {name: of[place] for name, of in found.items()}
    return {name: [known[tuple(each)][name] for each in prompts] for name in number_types}


def _coverage(scored: Sequence[PromptScores], reference: Reference) -> CoverageRecord:
    """Which experts the prompts chose, and which they did not."""
    num_experts = reference.num_experts
    counts = [
        row[:num] for row, num in zip(count_choices(scored, num_experts), num_experts, strict=True)
    ]
    never = [np.flatnonzero(row == 0).tolist() for row in counts]
    return CoverageRecord(
        len(num_experts),
        sum(num_experts),
        TIMES,
        sum(int(((row > 0) & (row < TIMES)).sum()) for row in counts),
        tuple(LayerExperts(layer, tuple(ids)) for layer, ids in enumerate(never) if ids),
        tuple(reference.moe_layers),
    )


def _of_second(
    other: "_ServerScores", seen: "_ServerScores", asked: VerifyOptions
) -> tuple[Rounding, str, DtypeSource]:
    """The second server's log-probabilities; both servers' own noise tells what rounding does.

    Where a token is not the same under another load, its largest change there counts as rounding,
    and never less than a number type usually makes.
    """
    logprobs: dict[int, Floats] = other.observed[0].logprobs
    exact = [
        PromptScores(
            np.asarray(each.token_ids, dtype=np.int64),
            logprobs.get(place, np.full(len(each.token_ids) - 1, np.nan)),
        )
        for place, each in enumerate(seen.sequences)
    ]
    dtype: str = asked.dtype or "bfloat16"
    source: DtypeSource = "checkpoint" if asked.dtype is None else "told"
    usual = usual_rounding(exact, dtype)
    if dtype != "float32" and rounds_less(seen.observed[0], usual):
        dtype, source = "float32", "seen"
        usual = usual_rounding(exact, dtype)
    rounding = [
        _larger(drawn, _own_noise(place, len(drawn), other))
        for place, drawn in enumerate(usual.rounding)
    ]
    return replace(usual, rounding=rounding), dtype, source


def _own_noise(place: int, num: int, seen: "_ServerScores") -> Floats:
    """[num]: the largest change of tokens of a sequence under any other condition; 0 unknown."""
    alone = seen.observed[0].logprobs.get(place)
    found = np.zeros(num)
    for each in seen.observed[1:]:
        own = each.logprobs.get(place)
        if own is not None and alone is not None:
            found = np.fmax(found, np.nan_to_num(np.abs(own - alone)))
    return found


def _larger(one: Floats, other: Floats) -> Floats:
    return np.where(np.abs(one) >= np.abs(other), one, other)


async def _ask_all(
    target: Target,
    reference: Reference | Target,
    asked: VerifyOptions,
    tokenizer: Vocabulary | None,
    progress: Progress,
) -> "tuple[_ServerScores, _ServerScores | None]":
    """Ask the server, and the second one for the same sequences."""
    targets = [target] + ([reference] if isinstance(reference, Target) else [])
    several = [Connections(each.url, headers_of(each)) for each in targets]
    opened = list(several)
    vocabulary = tokenizer
    if not isinstance(reference, Target):
        token_ids = range(reference.vocab_size) if tokenizer is None else tokenizer.token_ids
        vocabulary = Vocabulary(
            [each for each in token_ids if each < reference.vocab_size],
            None if tokenizer is None else tokenizer.tokenizer,
        )
    try:
        servers = alike(
            [
                await find_server(each, of.model, vocabulary, is_chat=False)
                for each, of in zip(several, targets, strict=True)
            ]
        )
        most = min(each.max_model_len or 2**30 for each in servers) - _CONTINUATION - 1
        if not isinstance(reference, Target):
            most = min(most, reference.max_len - _CONTINUATION)
        probe = [int(each) for each in servers[0].vocabulary.token_ids[:_LEAST_LEN]]
        endpoints = [await find_endpoint(each, probe, asked.timeout_s) for each in servers]
        if len(endpoints) > 1 and not endpoints[1].is_forced:
            raise UserError(
                f"{endpoints[1].server.connections.url} scores no given tokens (prompt_logprobs, "
                "echo or /generate), so it can be no reference; give the other one as such"
            )
        own = None if isinstance(reference, Target) else reference
        drawn = _draw(servers[0].vocabulary, own is not None, most, asked)
        first = _ServerScores(endpoints[0], headers_of(target), progress, opened)
        candidates = await first.begin(drawn, None if own is None else own.vocab_size)
        rest: list[Prompt] = [*candidates.short, *candidates.long]
        if own is not None and endpoints[0].is_forced:
            rest = first.choose(own, candidates, asked)
        until_s = time.perf_counter() + _OF_SERVER * asked.budget_s / len(servers)
        seen = await first.all_of(rest, until_s)
        other = None
        if len(endpoints) > 1:
            until_s = time.perf_counter() + _OF_SERVER * asked.budget_s / 2
            second = _ServerScores(endpoints[1], headers_of(targets[1]), progress, opened)
            other = await second.same(seen.sequences, until_s)
        return seen, other
    finally:
        for connections in opened:
            connections.close()


@dataclass(frozen=True, eq=False)
class _PromptSet:
    """Prompts that may be asked.

    Attributes:
        continued: prompts that are asked in any case, and continued by the server.
        sharing: such prompts that begin alike.
        candidates: others, to be scored.
    """

    continued: list[list[int]]
    sharing: list[list[int]]
    candidates: DrawnPrompts


def _draw(vocabulary: Vocabulary, is_chosen: bool, most: int, asked: VerifyOptions) -> _PromptSet:
    """Draw prompts.

    Args:
        is_chosen: whether there will be a choice among them.
        most: tokens of the longest.

    Raises:
        UserError: the model takes too short ones.
    """
    if most < _LEAST_LEN:
        raise UserError(
            f"the server takes {most + _CONTINUATION + 1} tokens; at least "
            f"{_LEAST_LEN + _CONTINUATION + 1} are needed to verify it"
        )
    ids = np.asarray(vocabulary.token_ids)
    num_short = max(NUM_CANDIDATES, asked.num_prompts) if is_chosen else asked.num_prompts
    drawn = draw_prompts(vocabulary, max_len=most, seed=asked.seed, num_short=num_short)
    draw = np.random.default_rng(asked.seed + 1)

    def some(length: int) -> list[int]:
        return [int(each) for each in draw.choice(ids, length)]

    prefix = some(_PREFIX_LEN)
    sharing = [[*prefix, *some(_TAIL_LEN)][-most:] for _ in range(_NUM_SHARING)]
    candidates = DrawnPrompts(drawn.short[_NUM_CONTINUED:], drawn.long)
    return _PromptSet(drawn.short[:_NUM_CONTINUED], sharing, candidates)


class _ServerScores:
    """Scores of one server, asked under one condition after the other.

    Args:
        opened: gets connections that are to be closed.

    Attributes:
        sequences: all prompts, of some with what the server generated first.
        chosen: what the reference scored in choosing them; None without a checkpoint.
        skipped: what was not asked, and why.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        headers: dict[str, str],
        progress: Progress,
        opened: list[Connections],
    ) -> None:
        self.endpoint, self._headers = endpoint, headers
        self._progress, self._opened = progress, opened
        self._until_s = float("inf")  # of `time.perf_counter`: then no condition is begun any more
        self.sequences: list[PromptForm] = []
        self.chosen: ChosenPrompts | None = None
        self.observed: list[ConditionScores] = []
        self.skipped: list[str] = []
        self._sent: list[PromptForm] = []
        self._cold: list[Continuation] = []

    async def begin(self, drawn: _PromptSet, vocab_size: int | None) -> DrawnPrompts:
        """Let the server continue prompts; what it generates is a part of what is scored.

        Args:
            vocab_size: of the reference; None where that is a server.

        Returns:
            the candidates that may be scored beside.

        Raises:
            UserError: the reference has not all the tokens.
        """
        endpoint = self.endpoint
        self._sent = await settle(endpoint, [*drawn.continued, *drawn.sharing])
        if endpoint.can_generate:
            await flush_caches(endpoint.server.connections)
            self._cold = await self._generate("generated, cold cache", self._sent)
            most = max((each for more in self._cold for each in more.token_ids), default=0)
            if vocab_size is not None and most >= vocab_size:
                raise UserError(
                    f"{endpoint.server.connections.url} generated token {most:,}, and the "
                    f"reference has {vocab_size:,} tokens: is it of this model?"
                )
        else:
            self.skipped.append("generated tokens: the server tells no log-probabilities of them")
        self.sequences = self._sent
        if self._cold and not (endpoint.is_forced and self._as_text):
            self.sequences = [
                PromptForm([*each.token_ids, *more.token_ids])
                for each, more in zip(self._sent, self._cold, strict=True)
            ]
        return drawn.candidates

    @property
    def _as_text(self) -> bool:
        return not self.endpoint.server.form.as_tokens

    def choose(
        self, reference: Reference, candidates: DrawnPrompts, asked: VerifyOptions
    ) -> list[Prompt]:
        """Candidates that, with the prompts asked already, reach every expert.

        The reference reads the checkpoint once, for candidates and all else.
        """
        given = [list(each.token_ids) for each in self.sequences]
        self.chosen = chosen = choose_prompts(
            reference,
            candidates,
            self._progress,
            given=given,
            num_least=asked.num_prompts + _NUM_SHARING,
            number_types=(asked.dtype or reference.dtype,),
        )
        return list(chosen.prompts[len(given) :])

    async def all_of(self, rest: Sequence[Prompt], until_s: float) -> "_ServerScores":
        """Ask for all.

        Args:
            rest: prompts to be scored beside those that the server has continued.
            until_s: time of `time.perf_counter` after which no further condition is begun.
        """
        endpoint = self.endpoint
        self._until_s = until_s
        if endpoint.is_forced:
            self.sequences = [*self.sequences, *await settle(endpoint, rest)]
            await self._forced()
            if self._cold and self._as_text:
                self.skipped.append("decoding and cache: the server takes no token ids")
                return self
        else:
            self.skipped.append(
                "scores of given tokens, and of long prompts, since the server tells none "
                f"({'; '.join(endpoint.refusals)})"
            )
        if self._cold:
            await self._generated(self._sent, self._cold)
        return self

    async def same(self, sequences: Sequence[PromptForm], until_s: float) -> "_ServerScores":
        """Ask for sequences of another server: alone and under one load."""
        self._until_s = until_s
        self.sequences = [PromptForm(each.token_ids, each.text) for each in sequences]
        await self._score(ALONE, 1)
        await self._score("16 at once", 16)
        return self

    async def _forced(self) -> None:
        """Conditions of given tokens."""
        await self._score(ALONE, 1)
        await self._score(AGAIN, 1)
        for load in _LOADS:
            await self._score(f"{load} at once", load)
        for rank in self.endpoint.ranks:
            own = self.endpoint.of_rank(rank, self._headers)
            self._opened.append(own.server.connections)
            await self._score(f"rank {rank}", 1, own, rank)

    async def _score(
        self, name: str, load: int, endpoint: Endpoint | None = None, rank: int | None = None
    ) -> None:
        if self._is_late(name):
            return
        own = endpoint or self.endpoint
        # Alone in order; under load long and short ones mixed, in an order of its own.
        order = list(range(len(self.sequences)))
        if load > 1:
            np.random.default_rng(load).shuffle(order)
        found = await self._with_progress(
            name,
            lambda on_done: own.score([self.sequences[i] for i in order], load, on_done),
            order,
        )
        logprobs = dict(zip(order, found, strict=True))
        self.observed.append(ConditionScores(name, logprobs, rank, load))

    async def _generated(self, sent: Sequence[PromptForm], cold: Sequence[Continuation]) -> None:
        """Conditions of generated tokens: against those of the cold cache, or as scored."""
        if not self.observed:  # nothing was scored: the reference scores what was generated
            self.observed.append(self._as_observed(ALONE, sent, cold, cold))
        else:
            # The second prompt of those that begin alike is the first to find blocks in the cache.
            num = len(cold) - _NUM_SHARING + 1
            alone, shared = [*cold[:num], *[None] * (len(cold) - num)], [*[None] * num, *cold[num:]]
            self.observed.append(self._as_observed("generated, cold cache", sent, cold, alone))
            found = self._as_observed("generated, shared prefix", sent, cold, shared)
            self.observed.append(replace(found, is_warm=True))
        for name, load in (
            ("generated, warm cache", 1),
            ("generated, 16 at once", 16),
            ("generated, 32 at once", 32),
        ):
            if self._is_late(name):
                continue
            observed = self._as_observed(name, sent, cold, await self._generate(name, sent, load))
            self.observed.append(replace(observed, num_at_once=load, is_warm=True))

    async def _generate(
        self, name: str, sent: Sequence[PromptForm], load: int = 1
    ) -> list[Continuation]:
        return await self._with_progress(
            name,
            lambda on_done: self.endpoint.generate(sent, _CONTINUATION, load, on_done),
            sent,
        )

    def _as_observed(
        self,
        name: str,
        sent: Sequence[PromptForm],
        cold: Sequence[Continuation],
        found: Sequence[Continuation | None],
    ) -> ConditionScores:
        """Generated tokens' log-probabilities at their places in the sequences."""
        logprobs = {}
        for place, (prompt, first, own) in enumerate(zip(sent, cold, found, strict=True)):
            if own is not None:
                num = len(prompt.token_ids)
                values = np.full(num + len(first.token_ids) - 1, np.nan)
                said = _said_of(first.token_ids, own)
                values[num - 1 : num - 1 + len(said)] = said
                logprobs[place] = values
        return ConditionScores(name, logprobs, is_generated=True)

    async def _with_progress(
        self,
        name: str,
        ask: Callable[[Callable[[], None]], Awaitable[list[T]]],
        items: Sequence[object],
    ) -> list[T]:
        self._progress.task(f"{self.endpoint.server.connections.url}: {name}", len(items))
        try:
            found = await ask(self._progress.advance)
        except AnswerFailure as error:
            raise type(error)(f"{error} (asked: {name})", error.reason) from None
        self._progress.done()
        return found

    def _is_late(self, name: str) -> bool:
        """Whether there is no time for a condition; the first one is asked in any case."""
        is_late = bool(self.observed) and time.perf_counter() > self._until_s
        if is_late:
            self.skipped.append(f"{name}: no time within --budget-s")
        return is_late


def _said_of(token_ids: Sequence[int], own: Continuation) -> list[float]:
    """A continuation's log-probabilities of another's tokens, up to the first that differs.

    There the likeliest tokens beside its own are looked at; one that is not among them has at most
    the probability of the least of those.
    """
    found = []
    for place, token in enumerate(token_ids[: len(own.token_ids)]):
        if own.token_ids[place] == token:
            found.append(float(own.logprobs[place]))
            continue
        top = own.top[place] if place < len(own.top) else {}
        if top:
            found.append(top.get(token, min(top.values())))
        break
    return found
