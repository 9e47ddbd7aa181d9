"""Replays a benchmark: all its requests, on steps whose times were priced before.

A benchmark of ten waves is no steady state: all requests come at once and wait for each other's
prompts, and end about together. Here every request of all waves is followed, but no step is priced:
times of other sizes are interpolated. Tokens are taken to be spread evenly over ranks.

Each configuration is priced for all its loads at once; what it takes stays in a file until the
model changes.
"""

import hashlib
import heapq
import json
import multiprocessing
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import count, takewhile
from math import ceil, inf
from pathlib import Path
from typing import Any

import numpy as np
from serving_rows import Row, model_of

import expertlane
from expertlane.cost.laws.frameworks import find_framework
from expertlane.cost.laws.profile import Execution, ModelledCluster, Profile, read_profile
from expertlane.cost.memory import FREE_SHARE
from expertlane.cost.routing import LoadedRouting, choose_routing
from expertlane.cost.step.operation import Floats, NumberTypes
from expertlane.cost.throughput import MultiToken
from expertlane.errors import CapacityError, UserError
from expertlane.simulator.simulator import ServingSetup, Simulator
from expertlane.simulator.steady import StepTimes, step_times

_PRICED = Path("build/judge_steps.jsonl")
_MODELLED = ("cost", "simulator", "schedule", "balance", "spec")
_NOT_PRICED = ("frameworks", "records")  # files that prices do not depend on
_ACCEPTED = 0.7  # of drafts; what a step takes hardly depends on it
_SEED = 0
_LARGEST_SHARE = 0.98  # of a device's memory
_COUNTS_APART = 4


@dataclass(frozen=True)
class Priced:
    """What steps of a configuration take.

    Attributes:
        steps: None where it is refused.
        seconds: of CPU that pricing took.
        refused: why there is none.
    """

    steps: StepTimes | None = None
    seconds: float = 0.0
    refused: str = ""


@dataclass(frozen=True)
class Question:
    """A configuration, and the numbers of decoding sequences to price (`loads`)."""

    row: Row
    loads: tuple[int, ...]

    @property
    def key(self) -> str:
        """Key of the stored answer; changes with the model's code."""
        asked = [
            str(self.row.configuration),
            self.row.is_exact,
            self.row.kv,
            self.row.num_drafts,
            self.row.step_tokens,
            self.loads,
            asdict(find_framework(self.row.framework)),
            _model_digest(),
        ]
        return hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()


@cache
def _model_digest() -> str:
    """Hash of all code and data that prices depend on."""
    root, digest = Path(expertlane.__file__).parent, hashlib.sha256()
    for name in _MODELLED:
        for path in sorted((root / name).rglob("*")):
            if path.suffix in (".py", ".toml", ".json") and path.stem not in _NOT_PRICED:
                digest.update(path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def price(rows: Sequence[Row], jobs: int) -> list[Priced]:
    """Step times of each row [rows]; known ones are read from `_PRICED`, new ones appended."""
    same: defaultdict[Any, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        same[row.configuration, row.num_drafts, row.step_tokens].append(place)
    questions = []
    for places in same.values():
        most = max((rows[place] for place in places), key=lambda row: row.conc)
        question = Question(most, _counts(most))
        questions.append((question.key, question, places))
    known = _read()
    wanted = {key: question for key, question, _ in questions if key not in known}
    with multiprocessing.Pool(jobs) as pool, _appended() as file:
        done = pool.imap_unordered(_answer, wanted.items())
        for key, answer in _with_progress(done, len(wanted)):
            known[key] = answer
            file.write(json.dumps({"key": key, **asdict(answer)}) + "\n")
            file.flush()
    found = [Priced()] * len(rows)
    for key, _, places in questions:
        for place in places:
            found[place] = known[key]
    return found


def _counts(row: Row) -> tuple[int, ...]:
    """Sequences of a replica: 1, 4, 16, 64 … up to all that may be open."""
    most = ceil(row.conc / row.decode.num)
    return (*takewhile(most.__gt__, (_COUNTS_APART**power for power in count())), most)


def _read() -> dict[str, Priced]:
    if not _PRICED.exists():
        return {}
    found = {}
    for line in _PRICED.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        key = fields.pop("key")
        if (steps := fields["steps"]) is not None:
            for name in ("decode_s", "beside_s"):
                steps[name] = {int(num): seconds for num, seconds in steps[name].items()}
            fields["steps"] = StepTimes(**steps)
        found[key] = Priced(**fields)
    return found


def _appended() -> Any:
    _PRICED.parent.mkdir(exist_ok=True)
    return _PRICED.open("a", encoding="utf-8")


def _with_progress(done: Iterable[tuple[str, Priced]], number: int) -> Iterator[tuple[str, Priced]]:
    begin = time.monotonic()
    for place, each in enumerate(done, 1):
        yield each
        left = (time.monotonic() - begin) / place * (number - place)
        print(f"\r{place} of {number} priced, {left:.0f} s left ", end="", file=sys.stderr)
    if number:
        print(file=sys.stderr)


def _answer(asked: tuple[str, Question]) -> tuple[str, Priced]:
    key, question = asked
    begin = time.process_time()
    try:
        answer = Priced(_price(question))
    except UserError as error:
        answer = Priced(refused=str(error))
    return key, replace(answer, seconds=time.process_time() - begin)


@cache
def _routing_of(model: str) -> LoadedRouting:
    """What it draws is kept for all configurations that a process prices."""
    return choose_routing(model_of(model), None, None, _SEED, num_sampled_layers=1).source


@cache
def _profile_of(hardware: str) -> Profile:
    """Read once in a process."""
    return read_profile(hardware)


def _price(question: Question) -> StepTimes:
    """Price the steps of a configuration.

    Raises:
        UserError: the deployment does not fit.
    """
    row, framework = question.row, find_framework(question.row.framework)
    model = model_of(row.model)
    profile = _profile_of(row.hardware)
    decode = row.decode.layout
    of_rank = -(-row.conc // (decode.replicas * decode.dp))
    setup = ServingSetup(
        layout=decode,
        prefill_layout=None if row.prefill is None else row.prefill.layout,
        options=row.options(profile),
        types=NumberTypes.asked(row.weights, row.kv),
        execution=Execution.GRAPH,
        routing=_routing_of(row.model),
        multi_token=MultiToken(row.num_drafts, _ACCEPTED if row.num_drafts else 0.0),
        max_num_seqs=2 * of_rank + 8,
        max_num_batched_tokens=row.step_tokens or framework.max_num_batched_tokens,
    )

    def simulator(profile: Profile) -> Simulator:
        return Simulator(model, ModelledCluster(profile, row.num_devices), setup, row.load)

    try:
        ready = simulator(profile)
    except CapacityError:  # it ran, so its server was allowed more
        memory = profile.device.memory_bytes * _LARGEST_SHARE / FREE_SHARE
        ready = simulator(replace(profile, device=replace(profile.device, memory_bytes=memory)))
    return step_times(ready, _SEED, question.loads)


NUM_WAVES = 10  # requests of a benchmark, over those it keeps open; assumed
_OTHER_STEP = 1000  # how much a step with prompts counts towards receiving new requests


@dataclass(frozen=True)
class Scheduling:
    """How a framework puts a step together.

    Attributes:
        step_tokens: of a rank's step.
        phases_apart: a step has prompts or tokens, prompts first.
        cuts_prompts: a prompt may be computed in several steps.
        wait_steps: that prompts wait until every data-parallel rank has one.
        receive_steps: after so many steps new requests are looked for.
    """

    step_tokens: int
    phases_apart: bool = False
    cuts_prompts: bool = True
    wait_steps: int = 0
    receive_steps: int = 1


def scheduling_of(row: Row) -> Scheduling:
    """From the public scripts that started the servers, or the defaults."""
    framework, is_trt = find_framework(row.framework), row.framework in ("trt", "dynamo-trt")
    # SGLang's server looked for requests after so many steps on Blackwell.
    polls = row.framework == "sglang" and row.hardware in ("b200", "b300") and not row.is_exact
    return Scheduling(
        row.step_tokens or framework.max_num_batched_tokens,
        phases_apart=framework.phases_apart,
        cuts_prompts=not is_trt,
        wait_steps=framework.prompt_wait_steps if row.decode.dp_attention else 0,
        receive_steps=(30 if row.conc >= 16 else 10) if polls else 1,
    )


@dataclass(frozen=True)
class Seen:
    """What clients saw of each request, in sending order.

    Attributes:
        ttft_s, tpot_s: [num_requests].
        total_s: until the last one ends.
        num_tokens: of all outputs.
    """

    ttft_s: Floats
    tpot_s: Floats
    total_s: float
    num_tokens: int


def play(
    row: Row,
    steps: StepTimes,
    scheduling: Scheduling,
    tokens_per_step: float = 1.0,
) -> Seen:
    """Replay the benchmark of a row."""
    kind = _OnePool if row.prefill is None else _TwoPools
    return kind(row, steps, scheduling, tokens_per_step).seen()


class _Waves:
    """Requests of a benchmark, each sent as another one ends; replicas have equal shares."""

    def __init__(
        self,
        row: Row,
        steps: StepTimes,
        scheduling: Scheduling,
        tokens_per_step: float,
    ) -> None:
        self._row, self._steps, self._scheduling = row, steps, scheduling
        layout = row.decode.layout
        is_one = row.prefill is None
        self._num_open = -(-row.conc // layout.replicas) if is_one else row.conc
        number = NUM_WAVES * self._num_open
        rng, load = np.random.default_rng(_SEED), row.load
        lengths = (load.prompt_len, load.output_len)
        prompts, outputs = (rng.integers(each.low, each.high + 1, number) for each in lengths)
        self._prompts: list[int] = prompts.tolist()
        self._outputs = outputs
        self._num_steps: list[int] = np.ceil((outputs - 1) / tokens_per_step).astype(int).tolist()
        self._mean_prompt = load.mean_lens[0]
        self._num_sent = 0
        self._sent_s, self._first_s, self._end_s = np.zeros((3, number))
        self._decode_s: list[float] = _between(steps.decode_s, self._num_open).tolist()
        ranks = layout if is_one else row.prefill.layout  # type: ignore[union-attr]
        self._room = ranks.dp * scheduling.step_tokens
        self._full_s = self._room / max(steps.prompts_per_s * self._mean_prompt, 1e-9)

    def seen(self) -> Seen:
        """Run to the last request."""
        self._run()
        further = np.maximum(self._outputs - 1, 1)
        return Seen(
            self._first_s - self._sent_s,
            (self._end_s - self._first_s) / further,
            float(self._end_s.max()),
            int(self._outputs.sum()),
        )

    def _run(self) -> None:
        raise NotImplementedError

    def _sends(self, now_s: float) -> int | None:
        """Number of the next request, sent now; None if all were sent."""
        if self._num_sent == len(self._prompts):
            return None
        request, self._num_sent = self._num_sent, self._num_sent + 1
        self._sent_s[request] = now_s
        return request

    def _prompts_s(self, num_tokens: int) -> float:
        """Prefill step time, piecewise linear in tokens: nothing, one prompt, a full step."""
        alone, alone_s = self._mean_prompt, self._steps.prompt_s
        if num_tokens <= alone or self._room <= alone:
            return alone_s * num_tokens / alone
        share = (num_tokens - alone) / (self._room - alone)
        return alone_s + share * max(self._full_s - alone_s, 0.0)


def _between(seconds: Mapping[int, float], most: int) -> Floats:
    """[most + 1]; by number of sequences, linear in its square root between those priced.

    A further sequence hits ever fewer experts that others have not. Straight lines over the number
    itself are 2.5 % too low in the median, over its root 0.4 % too high.
    """
    known, values = zip(*sorted(seconds.items()), strict=True)
    return np.interp(np.sqrt(np.arange(most + 1)), np.sqrt(known), values)


class _OnePool(_Waves):
    """A replica that computes prompts and tokens."""

    def _run(self) -> None:
        steps = self._steps
        beside = _between(steps.beside_s, self._num_open)
        self._beside: list[float] = np.clip(beside / steps.prompt_s, 0.0, 1.0).tolist()
        self._inbox: deque[tuple[float, int]] = deque()
        self._waiting: deque[int] = deque()
        self._running: list[tuple[int, int]] = []  # a heap: the step after which each ends
        self._step, self._now_s, self._left = 0, 0.0, 0
        self._since_received, self._waited = _OTHER_STEP, 0
        for _ in range(self._num_open):
            self._arrives(self._sends(0.0))
        while self._inbox or self._waiting or self._running:
            self._receive()
            tokens, done = self._take_prompts()
            if tokens:
                self._step_with_prompts(tokens, done)
            elif self._running:
                self._decode()
            else:
                self._now_s = max(self._now_s, self._inbox[0][0])
                self._since_received = _OTHER_STEP

    def _arrives(self, request: int | None) -> None:
        if request is not None:
            self._inbox.append((self._now_s, request))

    def _receive(self) -> None:
        if self._since_received < self._scheduling.receive_steps and self._running:
            return
        self._since_received = 0
        while self._inbox and self._inbox[0][0] <= self._now_s:
            self._waiting.append(self._inbox.popleft()[1])

    def _take_prompts(self) -> tuple[int, list[int]]:
        """Tokens of the next step, and the requests whose prompts end with it."""
        rules, num_running = self._scheduling, len(self._running)
        free = self._steps.num_places - num_running
        is_early = len(self._waiting) < self._row.decode.layout.dp and not self._left
        if is_early and num_running and self._waited < rules.wait_steps:
            return 0, []
        room = self._room - (0 if rules.phases_apart else num_running)
        tokens, done = 0, list[int]()
        while self._waiting and (free > len(done) or not num_running + len(done)):
            left = self._left or self._prompts[self._waiting[0]]
            if left > room and not rules.cuts_prompts and not done:
                room = left
            if left > room:
                if rules.cuts_prompts and room > 0:
                    tokens, self._left = tokens + room, left - room
                break
            tokens, room, self._left = tokens + left, room - left, 0
            done.append(self._waiting.popleft())
        return tokens, done

    def _step_with_prompts(self, tokens: int, done: Sequence[int]) -> None:
        num_running = len(self._running)
        seconds = self._prompts_s(tokens)
        if self._scheduling.phases_apart or not num_running:
            self._now_s += seconds
        else:
            self._now_s += self._decode_s[num_running] + self._beside[num_running] * seconds
            self._step += 1
            self._end_those_that_are_done()
        self._since_received += _OTHER_STEP
        self._waited = 0
        for request in done:
            self._first_s[request] = self._now_s
            heapq.heappush(self._running, (self._step + self._num_steps[request], request))
        self._end_those_that_are_done()

    def _decode(self) -> None:
        """Steps until something else can happen."""
        step_s, rules = self._decode_s[len(self._running)], self._scheduling
        num: float = self._running[0][0] - self._step
        if self._waiting and len(self._running) < self._steps.num_places:
            num = min(num, rules.wait_steps - self._waited)
            self._waited += 1
        if self._inbox:
            until = (self._inbox[0][0] - self._now_s) // step_s + 1
            num = min(num, max(until, rules.receive_steps - self._since_received))
        num = max(int(num), 1)
        self._waited += num - 1 if self._waiting else 0
        self._step, self._now_s = self._step + num, self._now_s + num * step_s
        self._since_received += num
        self._end_those_that_are_done()

    def _end_those_that_are_done(self) -> None:
        while self._running and self._running[0][0] <= self._step:
            _, request = heapq.heappop(self._running)
            self._end_s[request] = self._now_s
            self._arrives(self._sends(self._now_s))


class _TwoPools(_Waves):
    """Replicas for prompts, and replicas that decode; each takes requests in turn."""

    def _run(self) -> None:
        prefill, decode = self._row.prefill, self._row.decode
        assert prefill is not None
        places = min(self._steps.num_places, self._row.decode_seqs * decode.layout.dp)
        self._num_places = places
        # (moment, kind of event in that order, replica, requests): what is about to happen
        self._events: list[tuple[float, int, int, list[int]]] = []
        self._queued: list[deque[int]] = [deque() for _ in range(prefill.num)]
        self._left: dict[int, int] = {}  # tokens of a prompt that a step took a part of
        self._is_busy = [False] * prefill.num
        self._pools = [_Decoding(self._decode_s) for _ in range(decode.num)]
        self._num_prefilled = 0
        for _ in range(self._num_open):
            self._send(0.0)
        acts = (self._arrive, self._prefilled, self._ended)
        while self._events:
            now_s, kind, replica, requests = heapq.heappop(self._events)
            acts[kind](now_s, replica, requests)

    def _send(self, now_s: float) -> None:
        request = self._sends(now_s)
        if request is not None:
            replica = request % len(self._queued)
            heapq.heappush(self._events, (now_s, 0, replica, [request]))

    def _arrive(self, now_s: float, replica: int, requests: list[int]) -> None:
        self._queued[replica] += requests
        if not self._is_busy[replica]:
            # After all that comes at the same moment.
            self._is_busy[replica] = True
            heapq.heappush(self._events, (now_s, 1, replica, []))

    def _prefilled(self, now_s: float, replica: int, requests: list[int]) -> None:
        """A step of prompts ends, and the next begins."""
        for request in requests:
            place = self._num_prefilled % len(self._pools)
            self._num_prefilled += 1
            self._pools[place].waiting.append(request)
            self._decode(now_s, place)
        queue, room, done = self._queued[replica], self._room, []
        while queue and room:
            left = self._left.pop(queue[0], self._prompts[queue[0]])
            if left > room:
                self._left[queue[0]] = left - room
                room = 0
            else:
                room -= left
                done.append(queue.popleft())
        taken = self._room - room
        self._is_busy[replica] = taken > 0
        if taken:
            end_s = now_s + self._prompts_s(taken)
            heapq.heappush(self._events, (end_s, 1, replica, done))

    def _decode(self, now_s: float, replica: int) -> None:
        pool = self._pools[replica]
        pool.go_on_until(now_s)
        while pool.waiting and len(pool.running) < self._num_places:
            request = pool.waiting.popleft()
            self._first_s[request] = now_s
            pool.start(request, self._num_steps[request])
        if (at_s := pool.next_s()) < inf:
            heapq.heappush(self._events, (at_s, 2, replica, [pool.num_changes]))

    def _ended(self, now_s: float, replica: int, stamp: list[int]) -> None:
        pool = self._pools[replica]
        if stamp != [pool.num_changes]:  # others have begun or ended since
            return
        pool.go_on_until(now_s)
        for request in pool.end():
            self._end_s[request] = now_s
            self._send(now_s)
        self._decode(now_s, replica)


class _Decoding:
    """Requests that decode on one replica, in step.

    Attributes:
        running: a heap: the number of steps after which each ends.
        num_changes: how often a request was added or removed.
    """

    def __init__(self, decode_s: Sequence[float]) -> None:
        self.waiting: deque[int] = deque()
        self.running: list[tuple[float, int]] = []
        self.num_changes = 0
        self._decode_s = decode_s
        self._steps, self._now_s = 0.0, 0.0

    def go_on_until(self, now_s: float) -> None:
        """Advance all running requests to a moment."""
        if self.running:
            self._steps += (now_s - self._now_s) / self._decode_s[len(self.running)]
        self._now_s = now_s

    def start(self, request: int, num_steps: int) -> None:
        """Add a request."""
        heapq.heappush(self.running, (self._steps + num_steps, request))
        self.num_changes += 1

    def next_s(self) -> float:
        """When the first one ends."""
        if not self.running:
            return inf
        left = max(self.running[0][0] - self._steps, 0.0)
        return self._now_s + left * self._decode_s[len(self.running)]

    def end(self) -> list[int]:
        """Remove the finished requests and return them."""
        done = []
        while self.running and self.running[0][0] <= self._steps + 1e-6:
            done.append(heapq.heappop(self.running)[1])
        self.num_changes += len(done)
        return done
