"""Rows of the file simulated: what the model says of each, kept in a file by what it was asked."""

import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import serving_rows
from serving_rows import Row, model_of

import expertlane
from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.frameworks import Framework, served_by
from expertlane.cost.laws.profile_file import ModelledCluster, read_profile
from expertlane.cost.multi_token import MultiToken
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import choose_routing
from expertlane.errors import UserError
from expertlane.simulate.setup import ServingSetup
from expertlane.simulate.simulator import Simulator
from expertlane.simulate.steady import ROUGH, steady_state, step_times

_CACHE = Path("build/judge_serving.jsonl")
_MODELLED = ("cost", "simulate", "schedule", "balance", "spec", "memory.py")
_SEED = 0

Bounds = tuple[float, float, float]


@dataclass(frozen=True)
class Projected:
    """What the model says of a row: low, likely and high.

    Attributes:
        output_tps: of a GPU that decodes.
        steps_per_token, num_waiting, prefill_rate, prompt_s: as `SteadyState` has them; in one pool
            the last two as `StepTimes`.
        num_places: requests that the pool which decodes has room for.
        decode_s: by sequences of a replica, seconds of a step that decodes; of one pool.
        seconds: that the simulation took.
        refused: why there is none; all else is 0 then.
    """

    tpot_s: Bounds = (0.0, 0.0, 0.0)
    ttft_s: Bounds = (0.0, 0.0, 0.0)
    output_tps: Bounds = (0.0, 0.0, 0.0)
    steps_per_token: float = 0.0
    num_waiting: float = 0.0
    prefill_rate: float = 0.0
    prompt_s: float = 0.0
    num_places: int = 0
    decode_s: Sequence[tuple[int, float]] = ()
    num_steps: int = 0
    num_priced: int = 0
    seconds: float = 0.0
    refused: str = ""


@dataclass(frozen=True)
class Question:
    """A row as the simulator takes it: equal ones have equal answers."""

    row: Row
    framework: Framework
    acceptance: float

    @property
    def key(self) -> str:
        """Of the answer, as long as the model stays as it is."""
        asked = [
            str(self.row.point),
            self.row.is_exact,
            self.row.num_drafts,
            self.acceptance,
            asdict(self.framework),
            _model_digest(),
        ]
        return hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()


@cache
def _model_digest() -> str:
    """Of all code and data that the answer rests on."""
    root, digest = Path(expertlane.__file__).parent, hashlib.sha256()
    for name in _MODELLED:
        paths = sorted((root / name).rglob("*")) if (root / name).is_dir() else [root / name]
        for path in paths:
            if path.suffix in (".py", ".toml", ".json") and path.name != "frameworks.toml":
                digest.update(path.read_bytes())
    for path in (serving_rows.__file__, __file__):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def project(questions: Sequence[Question], jobs: int) -> list[Projected]:
    """The answers, from the file where they are in it; what is new is added to it at once."""
    known = _read()
    wanted = {each.key: each for each in questions if each.key not in known}
    with multiprocessing.Pool(jobs) as pool, _appended() as file:
        done = pool.imap_unordered(_answer, wanted.items())
        for key, answer in _with_progress(done, len(wanted)):
            known[key] = answer
            file.write(json.dumps({"key": key, **asdict(answer)}) + "\n")
            file.flush()
    return [known[each.key] for each in questions]


def _read() -> dict[str, Projected]:
    if not _CACHE.exists():
        return {}
    found = {}
    for line in _CACHE.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        key = fields.pop("key")
        found[key] = Projected(**fields)
    return found


def _appended() -> Any:
    _CACHE.parent.mkdir(exist_ok=True)
    return _CACHE.open("a", encoding="utf-8")


def _with_progress(
    done: Iterable[tuple[str, Projected]], number: int
) -> Iterator[tuple[str, Projected]]:
    begin = time.monotonic()
    for place, each in enumerate(done, 1):
        yield each
        left = (time.monotonic() - begin) / place * (number - place)
        print(f"\r{place} of {number} simulated, {left:.0f} s left ", end="", file=sys.stderr)
    if number:
        print(file=sys.stderr)


def _answer(asked: tuple[str, Question]) -> tuple[str, Projected]:
    key, question = asked
    begin = time.process_time()
    try:
        answer = simulate(question)
    except UserError as error:
        answer = Projected(refused=str(error))
    return key, replace(answer, seconds=time.process_time() - begin)


def simulate(question: Question) -> Projected:
    """One row.

    Raises:
        UserError: the deployment does not fit.
    """
    row, framework = question.row, question.framework
    model = model_of(row.model)
    profile = served_by(read_profile(row.hardware), framework, model)
    decode = row.decode.layout
    of_rank = -(-row.conc // (decode.replicas * decode.dp))
    setup = ServingSetup(
        layout=decode,
        prefill_layout=None if row.prefill is None else row.prefill.layout,
        options=row.options(profile),
        types=NumberTypes.asked(row.weights, row.kv),
        execution=Execution.GRAPH,
        routing=choose_routing(model, None, None, _SEED, num_sampled_layers=1).source,
        multi_token=MultiToken(row.num_drafts, question.acceptance),
        max_num_seqs=row.decode_seqs or 2 * of_rank + 8,
        max_num_batched_tokens=framework.max_num_batched_tokens,
        prompt_wait_steps=framework.prompt_wait_steps,
    )
    simulator = Simulator(model, ModelledCluster(profile, row.num_devices), setup, row.load)
    state = steady_state(simulator, _SEED, ROUGH)
    rates = state.rates
    assert rates.ttft_s is not None, "a closed load"
    found = Projected(
        tpot_s=_bounds(rates.tpot_s),
        ttft_s=_bounds(rates.ttft_s),
        output_tps=_bounds(rates.output_tps / decode.world_size),
        steps_per_token=state.steps_per_token,
        num_waiting=rates.num_waiting,
        prefill_rate=state.prefill_rate,
        prompt_s=state.prompt_s,
        num_steps=state.num_steps,
        num_priced=state.num_priced,
    )
    if row.prefill is not None:
        return found
    of_replica = ceil(row.conc / decode.replicas)
    times = step_times(simulator, _SEED, [1, max(of_replica // 4, 1), of_replica])
    return replace(
        found,
        prefill_rate=times.prompts_per_s,
        prompt_s=times.prompt_s,
        num_places=times.num_places,
        decode_s=tuple(times.decode_s.items()),
    )


def _bounds(values: Any) -> Bounds:
    return float(min(values)), float(values[1]), float(max(values))
