"""Outcome of each request of a drill, and whether changed tokens are more than rounding explains.

The truth is the server's greedy answers to the same prompts before the fault. In engines
whose batches change the order of sums, two likely tokens that are nearly tied may change places
without a fault. So a change counts where the two were no tie; and, where undisturbed runs have such
changes too, or the server does not tell log-probabilities, if prompts with one are more than before
the fault: Fisher's exact test (Fisher 1922), one-sided, over prompts, since one prompt's answers
change together.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from expertlane.endpoint.steady import Request
from expertlane.endpoint.streams import Stream, StreamDifference, difference
from expertlane.endpoint.timeline import OK, SILENT
from expertlane.results.drill_record import (
    ALTERED,
    LOST,
    OUTCOMES,
    ChangesRecord,
    DrillRecord,
    OutcomeRecord,
)

TIE_NATS = 0.25  # two steps of bfloat16 between 16 and 32, where large logits are
_MOST_TIE_NATS = 1.0
_SURE = 0.01
_TAIL = 0.05  # outside of a 90 % interval, on each side
_MOST_SHOWN = 24  # letters of a text that changed


@dataclass(eq=False)
class Truth:
    """Answers of the server before the fault.

    Attributes:
        streams: the first answer to each prompt.
        others: further undisturbed answers to each prompt.
    """

    streams: Sequence[Stream]
    others: list[list[Stream]] = field(init=False)

    def __post_init__(self) -> None:
        self.others = [[] for _ in self.streams]

    def add(self, requests: Sequence[Request]) -> None:
        """Take answers that are undisturbed, too."""
        for each in requests:
            if each.end == "whole":
                self.others[each.prompt].append(each.stream)

    def known(self, prompt: int) -> list[Sequence[int] | str]:
        """All different undisturbed answers to a prompt."""
        found: list[Sequence[int] | str] = []
        for stream in (self.streams[prompt], *self.others[prompt]):
            if stream.tokens not in found:
                found.append(stream.tokens)
        return found

    def differs(self, prompt: int, stream: Stream) -> StreamDifference | None:
        """How an answer differs from the first one."""
        return difference(self.streams[prompt].tokens, stream.tokens, is_whole=True)

    def defects(self) -> Iterator[str]:
        """Errors of undisturbed answers that rounding cannot explain."""
        for prompt, stream in enumerate(self.streams):
            if wrong := _count_error(stream, stream):
                yield f"prompt {prompt}: {wrong}"
        for prompt, others in enumerate(self.others):
            for stream in others:
                differs = self.differs(prompt, stream)
                if differs is None and (wrong := _count_error(stream, self.streams[prompt])):
                    yield f"prompt {prompt}: {wrong}"
                elif differs is not None and differs.how != "changed":
                    words = _words(differs, self.streams[prompt].tokens, stream.tokens)
                    yield f"prompt {prompt}: {words}"

    def margin(self, prompt: int, differs: StreamDifference) -> float | None:
        """Log-probability of the true token less that of the next likeliest, in nats."""
        return self.streams[prompt].margin_at(differs.place)


@dataclass(frozen=True)
class RequestOutcome:
    """A request of a drill.

    Attributes:
        outcome: a key of `OUTCOMES`.
        words: what was wrong; may be empty.
        margin: of a change, by how much the true token was likelier; None without.
    """

    request: Request
    outcome: str
    words: str = ""
    margin: float | None = None


def tie_of(truth: Truth) -> float | None:
    """The margin up to which a change is a tie; None where the server tells none.

    As large as any at which an undisturbed answer changed, within bounds.
    """
    if not any(any(each.margins) for each in truth.streams):
        return None
    margins = (
        truth.margin(prompt, differs)
        for prompt, others in enumerate(truth.others)
        for stream in others
        if (differs := truth.differs(prompt, stream)) is not None
    )
    largest = max((each for each in margins if each is not None), default=0.0)
    return max(TIE_NATS, min(largest, _MOST_TIE_NATS))


def judged(request: Request, truth: Truth, tie: float | None) -> RequestOutcome:
    """The outcome of a request that ended."""
    stream, prompt = request.stream, request.prompt
    if request.is_lost:
        return RequestOutcome(request, request.end, request.words)
    differs = truth.differs(prompt, stream)
    if differs is None:
        wrong = _count_error(stream, truth.streams[prompt])
        return (
            RequestOutcome(request, "ill-formed", wrong)
            if wrong
            else RequestOutcome(request, "as before")
        )
    words = f"prompt {prompt}: {_words(differs, truth.streams[prompt].tokens, stream.tokens)}"
    if differs.how != "changed":
        return RequestOutcome(request, differs.how, words)
    margin = truth.margin(prompt, differs)
    if margin is not None:
        words += f", {margin:.2g} nats less likely or more"
    is_tie = tie is not None and margin is not None and margin <= tie
    if is_tie or stream.tokens in truth.known(prompt):
        return RequestOutcome(request, "tie", words, margin)
    return RequestOutcome(request, "changed", words, margin)


def _count_error(stream: Stream, true: Stream) -> str:
    """Error in the usage or finish reason of an answer whose tokens are right; empty if none."""
    num = sum(map(len, stream.ids))
    if stream.finish_reason is None and true.finish_reason is not None:
        return "no finish reason"
    counted = stream.num_counted
    if num and counted is not None and counted != num:
        return f"{num} tokens, of which usage counts {counted}"
    if true.num_counted is not None and counted != true.num_counted:
        return f"usage counts {counted} tokens, not {true.num_counted}"
    return ""


def _words(differs: StreamDifference, true: Sequence[int] | str, found: Sequence[int] | str) -> str:
    place, size = differs.place, differs.size
    unit = "letter" if isinstance(true, str) else "token"
    if differs.how == "repeated":
        return f"{unit}s {place - size} to {place - 1} came twice"
    if differs.how == "dropped":
        return f"{unit}s {place} to {place + size - 1} did not come"
    one, other = (each[place : place + 1] for each in (found, true))
    if isinstance(one, str):
        one, other = (each[place : place + _MOST_SHOWN] for each in (found, true))
        return f"from {unit} {place} on {one!r}, not {other!r}"
    new, old = (each[0] if each else "none" for each in (one, other))
    return f"{unit} {place} is {new}, not {old}"


def outcome_records(several: Sequence[RequestOutcome], fault_s: float) -> tuple[OutcomeRecord, ...]:
    """Outcomes that some request had, the worst first.

    Args:
        fault_s: when the fault was, on the clock of requests.
    """
    found = []
    for name in OUTCOMES:
        own = [each for each in several if each.outcome == name]
        if own:
            first = min(own, key=lambda each: each.request.ended_s)
            num = sum(each.request.sent_s < fault_s for each in own)
            since_s = round(first.request.ended_s - fault_s, 3)
            found.append(OutcomeRecord(name, num, len(own) - num, since_s, first.words))
    return tuple(found)


def changes_record(
    truth: Truth, several: Sequence[RequestOutcome], tie: float | None, fault_s: float
) -> ChangesRecord:
    """Changed tokens after the fault beside those of undisturbed runs."""
    before = [
        (prompt, differs, truth.margin(prompt, differs) if differs else None)
        for prompt, others in enumerate(truth.others)
        for stream in others
        for differs in [truth.differs(prompt, stream)]
    ]

    def is_tie(margin: float | None) -> bool:
        return tie is not None and margin is not None and margin <= tie

    changed = [(prompt, margin) for prompt, differs, margin in before if differs is not None]
    real = [(prompt, margin) for prompt, margin in changed if not is_tie(margin)]
    whole = [each for each in several if each.outcome not in LOST]
    new = [each for each in whole if each.outcome == "changed"]
    prompts_before, asked_before = {prompt for prompt, _ in real}, {prompt for prompt, *_ in before}
    p_values = [
        fisher(
            len(_prompts(each for each in own if each.outcome == "changed")),
            len(_prompts(own)),
            len(prompts_before),
            len(asked_before),
        )
        for is_later in (False, True)
        if (own := [each for each in whole if (each.request.sent_s >= fault_s) is is_later])
    ]
    p_value = min(1.0, len(p_values) * min(p_values)) if p_values and asked_before else None
    has_clear = not real and any(each.margin is not None for each in new)
    return ChangesRecord(
        compared="text" if isinstance(truth.streams[0].tokens, str) else "token ids",
        num_prompts=len(truth.streams),
        num_undisturbed=len(before),
        num_undisturbed_changed=len(real),
        num_undisturbed_ties=len(changed) - len(real),
        undisturbed_high=upper_end(len(real), len(before)),
        tie_nats=tie,
        num_prompts_before=len(prompts_before),
        num_prompts_after=len(_prompts(new)),
        num_prompts_asked_after=len(_prompts(whole)),
        p_value=p_value,
        is_beyond=bool(new) and (has_clear or (p_value is not None and p_value < _SURE)),
    )


def _prompts(several: Iterable[RequestOutcome]) -> set[int]:
    return {each.request.prompt for each in several}


def fisher(num: int, of: int, num_before: int, of_before: int) -> float:
    """Probability that a share is as large or larger by chance (Fisher's exact test, one-sided)."""
    successes, size = num + num_before, of + of_before
    ways = sum(
        math.comb(of, k) * math.comb(of_before, successes - k)
        for k in range(num, min(of, successes) + 1)
        if successes - k <= of_before
    )
    return ways / math.comb(size, successes)


def upper_end(num: int, of: int) -> float:
    """Upper end of the 90 % interval of a share (Clopper and Pearson 1934), by bisection."""
    if num >= of:
        return 1.0
    low, high = num / of, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        logs = [
            math.lgamma(of + 1)
            - math.lgamma(k + 1)
            - math.lgamma(of - k + 1)
            + k * math.log(middle)
            + (of - k) * math.log1p(-middle)
            for k in range(num + 1)
        ]
        low, high = (middle, high) if math.fsum(map(math.exp, logs)) > _TAIL else (low, middle)
    return high


def _shows_nothing(record: DrillRecord) -> bool:
    """True if rate, pauses and /health show no effect of the fault."""
    return (
        record.full_rate_s == 0.0
        and record.pause_s < SILENT * record.usual_pause_s
        and all(
            status == OK
            for at, status in zip(record.health.asked_s, record.health.statuses, strict=True)
            if at > 0 and record.health.is_known
        )
    )


def criteria(record: DrillRecord) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The criteria that a server fails, a sentence each, and cautions."""
    failed = [
        f"{each.num:,} request{'' if each.num == 1 else 's'} {OUTCOMES[each.name]}"
        for each in record.outcomes
        if each.name in (*LOST, *ALTERED)
    ]
    cautions = []
    changes, health = record.changes, record.health
    if num := record.num_of("changed"):
        words = f"{num:,} answer{'' if num == 1 else 's'} changed tokens"
        if changes.is_beyond:
            failed.append(f"{words}, more than undisturbed runs do")
        else:
            cautions.append(
                f"{words}, which can't be told from what undisturbed runs do (up to "
                f"{changes.undisturbed_high:.1%} of answers): more prompts would tell"
            )
    if health.well_but_silent_s > record.health_s:
        failed.append(
            f"/health said 200 for {health.well_but_silent_s:.1f} s while no request got a token"
        )
    if health.ill_but_well_s > record.health_s:
        failed.append(
            f"/health did not say 200 for {health.ill_but_well_s:.1f} s while all was well"
        )
    if not record.num_of(*OUTCOMES):
        failed.append("no request ended after the fault")
    if not health.is_known:
        cautions.append("The server has no /health, so that criterion was not checked.")
    if not failed and record.exit_code is not None and _shows_nothing(record):
        cautions.append(
            "Nothing shows that the fault struck: no request was lost, the rate never fell, and no "
            f"pause was {SILENT:g} times as long as those before. Check what the command did."
        )
    return tuple(failed), tuple(cautions)
