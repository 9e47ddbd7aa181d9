"""Whatever is wrong with a file or an option: exit 0, or exit 2 and one line; soon, and small."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fuzz import seeds
from fuzz.mutations import changed_arguments, changed_bytes, changed_file

_HERE = Path(__file__).parent
_EXPERIMENTS, _PROFILES, _RESULTS = seeds.experiments(), seeds.profiles(), seeds.results()
_TRACE = seeds.trace()
_LOAD = "--batch 2 --prompt-len 8 --output-len 4 --out out"
_SIMULATE = f"simulate {{}} --num-requests 4 {_LOAD}"
_COMMANDS = (
    "compare mine.toml --project --cluster h100x2 --skew 1.0 --timeout-s 60 --out out",
    "compare mine.toml --experts-per-token 2,1 --dtype float32 --out out",
    "compare mine.toml --model model --out out",
    "plan paper-tiny --cluster h100x2 --batch 4 --prompt-len 8 --output-len 4 "
    "--slo tpot.mean=100ms,ttft.mean=1s --price 2 --skew 0.5 --out out",
    "simulate paper-tiny --layout dp=2,ep=2 --cluster h100x2 --num-requests 4 --batch 2 "
    "--prompt-len 4:8 --output-len 2:4 --seed 1 --num-redundant-experts 2 "
    "--num-micro-batches 1 --out out",
    "simulate paper-tiny --layout tp=2 --prefill-layout tp=1 --cluster machine.tomlx3 --rate 5 "
    "--num-requests 4 --prompt-len 8 --output-len 4 --mtp 1 --mtp-acceptance 0.5 "
    "--max-num-seqs 8 --max-num-batched-tokens 64 --block-size 16 --out out",
    "bench paper-tiny --rate 1,2 --num-requests 4 --prompt-len 4:8 --output-len 4 --seed 1 "
    "--layout tp=2 --max-model-len 32 --num-blocks 16 --block-size 4 --out out",
    "generate model --token-ids 1,2,3 --max-tokens 4 --temperature 0.5 --top-k 3 --top-p 0.9 "
    "--min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.1 --frequency-penalty 0.1 "
    "--seed 1 --stop-token-id 3 --logprobs 2 --json",
    "generate paper-tiny --token-ids 1 --layout dp=2,ep=2 --placement placement.json "
    "--rebalance-steps 4 --ranks-per-node 2 --num-micro-batches 1 --timeout-s 5",
    "generate paper-tiny --file prompts.txt --record-routing out/routing.npz --max-num-seqs 4",
    "balance trace.npz --ep 4 --ranks-per-node 2 --num-redundant-experts 4 --out out",
    "balance trace.npz --ep 2 --placement placement.json --json",
    "report results --out out --json",
)


@dataclass(frozen=True)
class Case:
    """Files beside those that are always there, and a command line."""

    files: dict[str, bytes]
    arguments: list[str]


def _experiment(draw: Any) -> Case:
    written, *shipped = _EXPERIMENTS
    document = draw(st.sampled_from((written, written, *shipped)))
    data = changed_file(draw, document, as_toml=True)
    projected = ["--project", "--cluster", draw(st.sampled_from(("h100x2", "h100x2", "h100x16")))]
    how = draw(st.sampled_from((projected, [], ["--json"])))
    return Case({"case.toml": data}, ["compare", "case.toml", *how, "--out", "out"])


# By the file that is changed: what it is made of, and commands that read it.
_OF_FILES: dict[str, tuple[Sequence[Any], tuple[str, ...]]] = {
    "case/config.json": (
        seeds.CONFIGS,
        (
            f"plan case --cluster h100x2 {_LOAD}",
            _SIMULATE.format("case --layout tp=1 --cluster h100x1"),
            "generate case --token-ids 1",
        ),
    ),
    "case.toml": (
        _PROFILES,
        (
            f"plan paper-tiny --cluster case.tomlx2 {_LOAD}",
            _SIMULATE.format("paper-tiny --layout dp=2,ep=2 --cluster case.tomlx2"),
        ),
    ),
    "results.json": (_RESULTS, ("report results.json --out out", "diff results.json results.json")),
    "case.json": (
        [seeds.PLACEMENT],
        (
            "balance trace.npz --ep 2 --placement case.json",
            "generate paper-tiny --token-ids 1 --layout dp=2,ep=2 --placement case.json",
        ),
    ),
}
_BESIDE = {"generation_config": seeds.GENERATION, "model.safetensors.index": seeds.INDEX}


def _file(draw: Any) -> Case:
    name = draw(st.sampled_from(("case/config.json", *_OF_FILES)))
    documents, commands = _OF_FILES[name]
    as_toml = name.endswith(".toml")
    files = {name: changed_file(draw, draw(st.sampled_from(documents)), as_toml=as_toml)}
    command = draw(st.sampled_from(commands))
    if command.startswith("generate case"):
        for beside, document in _BESIDE.items():
            files[f"case/{beside}.json"] = changed_file(draw, document, as_toml=False)
    return Case(files, command.split())


def _trace(draw: Any) -> Case:
    return Case({"case.npz": changed_bytes(draw, _TRACE)}, ["balance", "case.npz", "--ep", "4"])


def _command(draw: Any) -> Case:
    return Case({}, changed_arguments(draw, draw(st.sampled_from(_COMMANDS)).split()))


_KINDS = (*[_experiment] * 2, *[_file] * 5, _trace, *[_command] * 3)


@st.composite
def _cases(draw: Any) -> Case:
    return draw(st.sampled_from(_KINDS))(draw)


class Commands:
    """Runs cases, one at a time, in a process that has the command line imported."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._template = folder / "template"
        self._template.mkdir()
        seeds.write_all(self._template)
        environment = {
            name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")
        }
        self._worker = subprocess.Popen(
            [sys.executable, _HERE / "worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        assert self._worker.stdout is not None
        assert self._worker.stdout.readline() == "ready\n"

    def close(self) -> None:
        """End the process."""
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        self._worker.stdin.close()
        self._worker.wait()
        self._worker.stdout.close()

    def complaint(self, case: Case) -> str | None:
        """What is wrong with how a command ends; None where nothing is."""
        folder = self._folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._template, folder)
        os.mkfifo(folder / "fifo")
        for name, data in case.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        asked = {"folder": str(folder), "arguments": case.arguments}
        self._worker.stdin.write(json.dumps(asked) + "\n")
        self._worker.stdin.flush()
        answer = json.loads(self._worker.stdout.readline())
        told = (folder / ".stderr").read_text(errors="replace")
        return _complaint(answer["code"], told)


def _complaint(code: int | None, told: str) -> str | None:
    if code is None:
        return f"it takes too long\n{told[-2000:]}"
    errors = [
        line for line in told.splitlines() if not line.endswith(" s") or ": done in" not in line
    ]
    if "Traceback" in told or "Warning" in told or code not in (0, 2):
        return f"exit {code}\n{told[-2000:]}"
    is_one_line = len(errors) == 1 and errors[0].startswith("expertlane: error: ")
    return None if code == 0 or is_one_line else f"exit 2 without a line of its own\n{told[-2000:]}"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    found = Commands(tmp_path_factory.mktemp("fuzz"))
    yield found
    found.close()


SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(600)
@settings(SETTINGS, max_examples=15)
@given(case=_cases())
def test_whatever_is_wrong_ends_in_one_line(commands: Commands, case: Case):
    assert commands.complaint(case) is None


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(SETTINGS, max_examples=3000)
@given(case=_cases())
def test_many_more_end_in_one_line(commands: Commands, case: Case):
    assert commands.complaint(case) is None
