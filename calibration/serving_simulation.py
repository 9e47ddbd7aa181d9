"""Steps of the deployments that rows were measured on, as the cost model prices them.

Each configuration is priced for all its loads at once; what it takes stays in a file until the
model changes.
"""

import hashlib
import json
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import count, takewhile
from math import ceil
from pathlib import Path
from typing import Any

from serving_rows import Row, model_of

import expertlane
from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.frameworks import find_framework
from expertlane.cost.laws.profile import ModelledCluster, Profile, read_profile
from expertlane.cost.memory import FREE_SHARE
from expertlane.cost.multi_token import MultiToken
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import Traffic, choose_routing
from expertlane.errors import CapacityError, UserError
from expertlane.simulator.simulator import ServingSetup, Simulator
from expertlane.simulator.steady import StepTimes, step_times

_PRICED = Path("build/judge_steps.jsonl")
_MODELLED = ("cost", "simulate", "schedule", "balance", "spec", "memory.py")
_NOT_PRICED = ("frameworks", "records")  # files that prices do not depend on
_ACCEPTED = 0.7  # of drafts; what a step takes hardly depends on it
_SEED = 0
_LARGEST_SHARE = 0.98  # of a device's memory
_COUNTS_APART = 4


@dataclass(frozen=True)
class Priced:
    """What steps of a configuration take.

    Attributes:
        seconds: of CPU that pricing took.
        refused: why there is none; all else is 0 then.
    """

    decode_s: Mapping[int, float] = field(default_factory=dict)
    beside_s: Mapping[int, float] = field(default_factory=dict)
    prompt_s: float = 0.0
    prompts_per_s: float = 0.0
    num_places: int = 0
    seconds: float = 0.0
    refused: str = ""

    @property
    def steps(self) -> StepTimes:
        """The step times that `serving_waves.play` takes."""
        return StepTimes(
            self.decode_s, self.beside_s, self.prompt_s, self.prompts_per_s, self.num_places
        )


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
        paths = sorted((root / name).rglob("*")) if (root / name).is_dir() else [root / name]
        for path in paths:
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
        for name in ("decode_s", "beside_s"):
            fields[name] = {int(num): seconds for num, seconds in fields[name].items()}
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
        answer = _price(question)
    except UserError as error:
        answer = Priced(refused=str(error))
    return key, replace(answer, seconds=time.process_time() - begin)


@cache
def _routing_of(model: str) -> Traffic:
    """What it draws is kept for all configurations that a process prices."""
    return choose_routing(model_of(model), None, None, _SEED, num_sampled_layers=1).source


@cache
def _profile_of(hardware: str) -> Profile:
    """Read once in a process."""
    return read_profile(hardware)


def _price(question: Question) -> Priced:
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
    return Priced(**vars(step_times(ready, _SEED, question.loads)))
