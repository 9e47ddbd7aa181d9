"""Drawn cases: a server with a planted error, or none, and what `verify` says of it.

`PYTHONPATH=tests python tests/endpoint/drawn_cases.py --wrong 200 --right 200 --out cases.jsonl`
prints a line a case, then detection above the noise and false alarms, with 95 % intervals (Clopper
and Pearson 1934). A case is one start of our own server. `--until` ends a run early; the same
command goes on with it.

With `--engine vllm` it is vLLM's, by the interpreter that `EXPERTLANE_TEST_VLLM_PYTHON` names: a
right one of every family that it computes as published, then a wrong one of every kind that a
checkpoint can have, as a table in Markdown. Stale cache blocks, and errors of large batches or far
positions alone, are not in its checkpoints, so they cannot be planted there.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from client import vllm_server
from endpoint import faulty_server
from endpoint.faulty_ranks import FAR, FAULT, LARGE_BATCH
from endpoint.faulty_server import STALE
from endpoint.planted import KINDS, effect, plant
from engine.model.families import save_checkpoint
from expertlane.client.connection import Url
from expertlane.client.run import Target
from expertlane.endpoint.reference import CheckpointReference
from expertlane.endpoint.verify import VerifyOptions, verify
from expertlane.errors import ExpertlaneError
from expertlane.progress import Progress
from server.front import Front

_DTYPES = "float32", "bfloat16", "int8"
_OF_SERVERS = STALE, LARGE_BATCH, FAR
_ABOVE = 2.0  # times the noise: what is tolerated of another implementation
_FAMILIES = tuple(sorted({family for families, _ in KINDS.values() for family in families}))
# Families that vLLM's build for CPUs (0.32) computes as published, in sizes that its kernels take.
# It drops ernie4_5_moe's routing bias, knows no windows in qwen2_moe, and turns other positions of
# deepseek_v2 than the first into something else; the rest does not start, or ends at a request.
_VLLM_SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 256, "head_dim": 32}
_VLLM_FIELDS: dict[str, dict[str, Any]] = {
    "glm4_moe": {},
    "mixtral": {},
    "qwen2_moe": {
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * 4,
    },
}
_NOT_STARTED, _FAILED, _VLLM_START_S = "not started", "failed", 1200.0


@dataclass(frozen=True)
class Case:
    """What is drawn: `kind` is empty for a right server."""

    number: int
    kind: str
    family: str
    dtype: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """A case and its verdict; `change` and `noise` as in `planted.Effect`, on one seed's prompts.

    Attributes:
        change: root mean square of what the error moves log-probabilities by; None of errors that
            only some conditions have.
        noise: that of the number type.
    """

    number: int
    kind: str
    family: str
    dtype: str
    verdict: str
    why: str
    change: float | None
    noise: float
    took_s: float

    @property
    def is_above(self) -> bool:
        """Whether the error is larger than what rounding is granted."""
        return self.change is None or self.change > _ABOVE * self.noise


Serve = Callable[[Case, Path, Path], AbstractContextManager[str]]  # of a case, a checkpoint, a log


def draw_cases(num_wrong: int, num_right: int, seed: int) -> Iterator[Case]:
    """Wrong ones of every kind in turn, right ones between them."""
    draw = np.random.default_rng(seed)
    kinds = [*KINDS, *_OF_SERVERS]
    for number in range(max(num_wrong, num_right)):
        if number < num_wrong:
            kind = kinds[number % len(kinds)]
            families = KINDS[kind][0] if kind in KINDS else ("mixtral",)
            yield _case(2 * number, kind, families, draw)
        if number < num_right:
            yield _case(2 * number + 1, "", _FAMILIES, draw)


def _case(number: int, kind: str, families: Sequence[str], draw: np.random.Generator) -> Case:
    family, dtype = str(draw.choice(families)), str(draw.choice(_DTYPES))
    return Case(number, kind, family, dtype, int(draw.integers(2**31)))


def vllm_cases(seed: int, dtype: str) -> Iterator[Case]:
    """A right server of every family that vLLM has, then a wrong one of every kind."""
    draw = np.random.default_rng(seed)
    for number, family in enumerate(_VLLM_FIELDS):
        yield Case(number, "", family, dtype, int(draw.integers(2**31)))
    for number, (kind, (families, _)) in enumerate(KINDS.items(), len(_VLLM_FIELDS)):
        family = str(draw.choice([each for each in _VLLM_FIELDS if each in families]))
        yield Case(number, kind, family, dtype, int(draw.integers(2**31)))


def run_case(case: Case, folder: Path, serve: Serve, **fields: Any) -> Outcome:
    """Make the checkpoint, serve it, verify it.

    Args:
        fields: of the checkpoint's configuration.
    """
    started_s = time.perf_counter()
    if case.kind in _OF_SERVERS:
        fields = {"max_position_embeddings": 4096, "sliding_window": None, "num_hidden_layers": 2}
    if case.kind in KINDS:
        pair = plant(case.kind, case.family, folder, case.seed, **fields)
        original, served = pair.original, pair.changed
    else:
        original = served = save_checkpoint(case.family, folder / "original", case.seed, **fields)
    draw, size = np.random.default_rng(case.seed), CheckpointReference(original).vocab_size
    prompts = [draw.integers(2, size, 48).tolist() for _ in range(16)]
    found = effect(original, served, prompts, case.dtype)
    change, noise = found.change, max(found.noise, 5e-5)
    asked = VerifyOptions(
        None if case.dtype == "float32" else case.dtype, 24, 600.0, seed=case.seed
    )
    try:
        with serve(case, served, folder / "log") as url:
            target, reference = Target(Url.parse(url)), CheckpointReference(original)
            answer = verify(target, reference, str(original), asked, None, Progress())
        verdict, why = answer.verdict, " ".join(answer.why)
    except vllm_server.NotStarted as error:
        verdict, why = _NOT_STARTED, _error_in(str(error))
    except ExpertlaneError as error:
        verdict, why = _FAILED, str(error)
    return Outcome(
        case.number,
        case.kind,
        case.family,
        case.dtype,
        verdict,
        why,
        None if case.kind in _OF_SERVERS else change,
        noise,
        time.perf_counter() - started_s,
    )


@contextmanager
def _own(case: Case, served: Path, log: Path) -> Iterator[str]:
    """Our own server."""
    os.environ[FAULT] = case.kind if case.kind in _OF_SERVERS else ""
    dtype = "bfloat16" if case.dtype == "bfloat16" else "float32"
    more = ["--dtype", dtype, *(["--weights", "int8"] if case.dtype == "int8" else [])]
    program = [str(Path(faulty_server.__file__))]
    server = Front(served, log, *more, layout="tp=1", program=program)
    server.start()
    try:
        yield server.url
    finally:
        server.end()


@contextmanager
def _vllm(case: Case, served: Path, _: Path) -> Iterator[str]:
    """vLLM's server."""
    flags = ("--dtype", case.dtype, "--max-num-seqs", "32")
    folder = vllm_server.add_tokenizer(served)
    with vllm_server.vllm(folder, *flags, start_s=_VLLM_START_S) as url:
        yield url


def _error_in(log: str) -> str:
    """The first error of those at the end of a log; what follows is what it led to."""
    lines = [line for line in log.splitlines() if "Error: " in line]
    return lines[0][-200:] if lines else log[-200:]


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A row a case, in Markdown."""
    lines = ["| planted | family | type | effect | noise | verdict | seconds |"]
    lines.append("| --- | --- | --- | ---: | ---: | --- | ---: |")
    lines += [
        f"| {each.kind or 'nothing'} | {each.family} | {each.dtype} | {each.change or 0:.3g} | "
        f"{each.noise:.2g} | {each.verdict} | {each.took_s:.0f} |"
        for each in outcomes
    ]
    return lines


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """Detection and false alarms, in lines."""
    wrong = [each for each in outcomes if each.kind]
    above = [each for each in wrong if each.is_above]
    right = [each for each in outcomes if not each.kind]
    lines = [
        _share("found, of errors above the noise", _count(above, "differs"), len(above)),
        _share(
            "below the noise: found",
            _count(wrong, "differs") - _count(above, "differs"),
            len(wrong) - len(above),
        ),
        _share("false alarms, of right servers", _count(right, "differs"), len(right)),
        _share("right servers of which nothing is told", _count(right, "can't tell"), len(right)),
    ]
    if outcomes:
        times = [each.took_s for each in outcomes]
        lines.append(f"a case: median {np.median(times):.0f} s, longest {max(times):.0f} s")
    missed = [each for each in above if each.verdict != "differs"]
    lines += [f"missed: {each}" for each in missed]
    return lines


def _count(outcomes: Sequence[Outcome], verdict: str) -> int:
    return sum(each.verdict == verdict for each in outcomes)


def _share(what: str, hits: int, num: int) -> str:
    if not num:
        return f"{what}: none"
    low, high = binomtest(hits, num).proportion_ci()
    return f"{what}: {hits} of {num} ({low:.1%} to {high:.1%})"


def main() -> None:
    """Run cases and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--wrong", type=int, default=200)
    parser.add_argument("--right", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument("--part", default="0/1", help="I/N: only every Nth case, from I on")
    parser.add_argument("--engine", choices=("expertlane", "vllm"), default="expertlane")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", default="", help="numbers of cases, between commas")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    started_s = time.perf_counter()
    known = given.out.read_text().splitlines() if given.out.exists() else []
    outcomes = [Outcome(**json.loads(line)) for line in known]
    done = {each.number for each in outcomes}
    first, step = map(int, given.part.split("/"))
    only = {int(each) for each in given.only.split(",") if each}
    is_own = given.engine == "expertlane"
    drawn = draw_cases(given.wrong, given.right, given.seed)
    for place, case in enumerate(drawn if is_own else vllm_cases(given.seed, given.dtype)):
        if case.number in done or place % step != first or (only and case.number not in only):
            continue
        if time.perf_counter() - started_s > given.until:
            break
        with tempfile.TemporaryDirectory() as folder:
            if is_own:
                outcome = run_case(case, Path(folder), _own)
            else:
                outcome = run_case(
                    case, Path(folder), _vllm, **(_VLLM_SIZES | _VLLM_FIELDS[case.family])
                )
        outcomes.append(outcome)
        line = json.dumps(asdict(outcome))
        with given.out.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
    print("\n".join(summary(outcomes) if is_own else table(outcomes)))


if __name__ == "__main__":
    main()
