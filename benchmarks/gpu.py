"""All that is to be known of a GPU met by chance, in nine minutes: `make gpu`.

Needs no network and installs nothing: the torch that is there (2.9 or newer) and a bare checkout.
Parts run in the order of what matters most, each a process with a limit of its own; one that fails
or is too slow stops no other:

- parity: whole models on the GPU against the reference (tests/gpu, tests/parity)
- kernels: our Triton kernels, and layers of models with them, against torch (tests/engine/ops/cuda)
- limits: each kernel's time beside what the card allows (bench_cuda.py)
- calibrate: `expertlane calibrate`, a profile of the GPU
- one_rank: one rank of the paper's steps, and batch 1, beside projections (bench_one_rank.py)
- steps: the engine's steps beside what that profile projects (bench_projection.py)
- operations: torch's operations on the GPU against float64 (tests/engine/ops)
- vllm: beside vLLM, where it is installed, in the time that is left (bench_engine.py)

Four files go into benchmarks/results/DATE-gpu-CARD, or --folder: summary.txt (each goal, what was
measured, met or not), results.json (all numbers), profile.toml and log.txt (what parts printed).
They are rewritten after each part, and copied to $OUT where that is set. Parts that passed with the
same code on the same card are not run again in the same folder; --again runs them. Exit code 0 if
all parts passed, 1 if one did not, 2 without a GPU.

    PYTHONPATH=src python3 benchmarks/gpu.py [--rehearse] [--again] [--folder DIR] [PART …]
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_answers import answers

ROOT = Path(__file__).parents[1]
TOTAL_S = 540.0
NEEDED = ("hypothesis", "msgspec", "numpy", "psutil", "pydantic", "pytest", "rich", "safetensors",
          "tokenizers", "tomli_w", "typer")  # fmt: skip
PYTEST = ("-m", "pytest", "-o", "filterwarnings=default", "-p", "no:cacheprovider",
          "--junitxml={junit}", "-o", "junit_family=xunit1")  # fmt: skip
SPREAD = ("-n", "8") if find_spec("xdist") and (os.cpu_count() or 1) >= 8 else ()
REHEARSAL_S = 300.0  # of a part; a CPU may be busy
END_S = 5.0  # that a part has to end in, when it is told to


@dataclass(frozen=True)
class Part:
    """A command of Python's.

    Attributes:
        arguments: `{data}` in them stands for a file of JSON, `{junit}` for pytest's, `{folder}`
            for the results.
        rehearsal: what they become, or what is added to them, without a GPU.
        needs: a package without which it is not run.
    """

    name: str
    limit_s: int
    arguments: tuple[str, ...]
    rehearsal: tuple[str, ...] = ()
    needs: str = ""


LAST = ("families", "links")  # of tests/gpu: those whose ranks take long to start


def gpu_tests() -> list[str]:
    """Files of tests/gpu, without that of this script."""
    names = [path.stem.removeprefix("test_") for path in (ROOT / "tests/gpu").glob("test_*.py")]
    names = sorted(set(names) - {"script"}, key=lambda name: (name in LAST, name))
    return [f"tests/gpu/test_{name}.py" for name in names]


STEPS = ("--ranks", "1", "--hidden", "1536", "--rounds", "2", "--json", "{data}")
CALIBRATE = ("profile", "--dtype", "bfloat16", "--within", "60", "--out", "{folder}")
PEER = ("--checkpoint", "mixtral", "--rounds", "1", "--contenders", "ours:tp=1", "vllm:1")
PARTS = (
    Part(
        "parity",
        170,
        (
            *PYTEST,
            *gpu_tests(),
            "tests/parity/test_equivalence.py::test_every_way_to_run[tp=1-plain-1 drained]",
            "tests/parity/test_equivalence.py::test_every_way_to_run[tp=1-overlap-2 rotating]",
        ),
        ("-k", "in_float32 or full_norm or fills"),
    ),
    # Without tests/conftest.py, which needs more than torch.
    Part(
        "kernels",
        55,
        (*PYTEST, *SPREAD, "--noconftest", "tests/engine/ops/cuda"),
        ("-k", "no_tokens"),
    ),
    Part("limits", 45, ("benchmarks/bench_cuda.py", "--json", "{data}"), ("--tiny",)),
    Part(
        "calibrate",
        110,
        ("-m", "expertlane", "calibrate", *CALIBRATE),
        ("--ranks", "1", "--within", "5"),
    ),
    Part(
        "one_rank",
        80,
        ("benchmarks/bench_one_rank.py", "--profile", "{folder}/profile.toml", "--json", "{data}"),
        ("--rehearse",),
    ),
    Part(
        "steps",
        50,
        ("benchmarks/bench_projection.py", "--profile", "{folder}/profile.toml", *STEPS),
        ("--hidden", "256", "--rounds", "1"),
    ),
    Part(
        "operations",
        15,
        (
            *PYTEST,
            "--noconftest",
            "tests/engine/ops/test_torch_backend.py",
            "tests/engine/ops/test_products.py",
        ),
        ("-k", "sums"),
    ),
    Part(
        "vllm",
        240,
        ("benchmarks/bench_engine.py", *PEER, "--vllm-python", sys.executable),
        ("--help",),
        needs="vllm",
    ),
)


@dataclass
class Outcome:
    """How a part ended.

    Attributes:
        status: passed, failed, too slow, or why it was not run.
        code: of the checkout it ran in.
        data: what a benchmark wrote.
        tests: of pytest: name, outcome, and what a test noted (`error`).
    """

    part: str
    status: str
    seconds: float = 0.0
    last_line: str = ""
    card: str = ""
    code: str = ""
    data: Any = None
    tests: list[dict[str, str]] = field(default_factory=list)


def card_name() -> str:
    """What torch calls the first GPU.

    Raises:
        SystemExit: there is none that torch can use; code 2.
    """
    if find_spec("torch") is None:
        sys.exit(_refuse(f"no torch in {sys.executable}"))
    import torch

    if not torch.cuda.is_available():
        sys.exit(_refuse(f"torch {torch.__version__} sees no GPU here"))
    return torch.cuda.get_device_name(0)


def _refuse(why: str) -> int:
    print(f"gpu: {why}; nothing was run", file=sys.stderr)
    return 2


def code_of(root: Path) -> str:
    """A hash of what parts run, also of what is not committed; a copy without git has the same."""
    found = hashlib.sha256()
    files = [path for name in ("src", "tests", "benchmarks") for path in (root / name).rglob("*")]
    for path in sorted(files):
        is_made = {"__pycache__", "results"} & set(path.relative_to(root).parts)
        if path.is_file() and not is_made:
            found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def run_part(part: Part, folder: Path, limit_s: float, *, rehearse: bool) -> Outcome:
    """Run it, its output at the end of log.txt; its whole process group ends with it."""
    if part.needs and find_spec(part.needs) is None:
        return Outcome(part.name, f"not run: {part.needs} is not installed")
    with tempfile.TemporaryDirectory() as made:
        files = {"folder": folder, "data": f"{made}/data.json", "junit": f"{made}/junit.xml"}
        given = (*part.arguments, *(part.rehearsal if rehearse else ()))
        command = [sys.executable, *(each.format(**files) for each in given)]
        output, began = Path(made) / "output.txt", time.monotonic()
        more = {"EXPERTLANE_REHEARSE": "1"} if rehearse else {}
        status = _wait(command, output, limit_s, more)
        text = output.read_text(errors="replace").strip()
        with (folder / "log.txt").open("a") as log:
            log.write(f"== {part.name}: {status}\n{text}\n\n")
        outcome = Outcome(part.name, status, time.monotonic() - began)
        outcome.last_line = text.splitlines()[-1] if text else ""
        with contextlib.suppress(OSError, ValueError):
            outcome.data = json.loads(Path(files["data"]).read_text())
        with contextlib.suppress(OSError, ElementTree.ParseError):
            outcome.tests = list(map(_test_of, ElementTree.parse(files["junit"]).iter("testcase")))
    return outcome


def _wait(command: Sequence[str], output: Path, limit_s: float, more: dict[str, str]) -> str:
    """How it ended; in an environment with more."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    with output.open("wb") as written:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | more,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return "failed" if process.wait(limit_s) else "passed"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest writes what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            return "too slow"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _test_of(case: ElementTree.Element) -> dict[str, str]:
    ended = {each.tag for each in case}
    failed = ended & {"failure", "error"}
    outcome = "failed" if failed else "skipped" if "skipped" in ended else "passed"
    noted = {each.attrib["name"]: each.attrib["value"] for each in case.iter("property")}
    name = f"{case.get('classname', '')}::{case.get('name', '')}"
    return {"name": name, "outcome": outcome, **noted}


def head_of(card: str) -> dict[str, object]:
    """The machine and its software."""
    import torch

    from expertlane import __version__

    return {
        "card": card,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "num_gpus": torch.cuda.device_count(),
        "version": __version__,
        "python": sys.version.split()[0],
        "missing_packages": [name for name in NEEDED if find_spec(name) is None],
    }


def write(folder: Path, head: dict[str, Any], outcomes: dict[str, Outcome]) -> str:
    """results.json and summary.txt, whose text it gives; and a copy of all in $OUT."""
    outcomes = {part.name: outcomes[part.name] for part in PARTS if part.name in outcomes}
    parts = {name: asdict(outcome) for name, outcome in outcomes.items()}
    is_rehearsal = head["card"] == "CPU"
    rehearsal = "A rehearsal: " if is_rehearsal else ""
    made_by = f"torch {head['torch']}, expertlane {head['version']}"
    lines = [
        f"{rehearsal}{head['card']}, {made_by}, {head['date']}"[:80],
        *(
            f"{name}: {each.status}{'' if each.code == head['code'] else ', by other code'}, "
            f"{each.seconds:.0f} s: {each.last_line}"[:80]
            for name, each in outcomes.items()
        ),
        *map(str, answers(parts, head["card"], is_rehearsal=is_rehearsal)),
    ]
    if head["missing_packages"]:
        lines.append(f"not installed, parts may fail: {', '.join(head['missing_packages'])}"[:80])
    text = "\n".join(lines) + "\n"
    for name, content in (
        ("results.json", json.dumps(head | {"parts": parts}, indent=1) + "\n"),
        ("summary.txt", text),
    ):
        new = folder / f".{name}"
        new.write_text(content, encoding="utf-8")
        new.replace(folder / name)
    if out := os.environ.get("OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
        for path in folder.glob("[a-z]*.*"):
            shutil.copy(path, out)
    return text


def kept(folder: Path) -> dict[str, Outcome]:
    """Outcomes of an earlier run in the folder."""
    try:
        parts = json.loads((folder / "results.json").read_text(encoding="utf-8"))["parts"]
        return {name: Outcome(**each) for name, each in parts.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def main() -> int:
    names = [part.name for part in PARTS]
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("parts", nargs="*", metavar="PART", help=f"some of: {', '.join(names)}")
    options.add_argument("--rehearse", action="store_true", help="a little of each, on the CPU")
    options.add_argument("--again", action="store_true", help="also parts that passed before")
    options.add_argument("--folder", type=Path, metavar="DIR", help="for results")
    given = options.parse_args()
    if unknown := [name for name in given.parts if name not in names]:
        options.error(f"no part is called {unknown[0]!r}; valid: {', '.join(names)}")
    card = "CPU" if given.rehearse else card_name()
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    results = ROOT / "benchmarks" / "results"
    folder = given.folder or results / f"{datetime.now(UTC).date()}-gpu-{slug}"
    folder.mkdir(parents=True, exist_ok=True)
    folder, code, began_s = folder.resolve(), code_of(ROOT), time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):  # no part stays behind on the card
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    outcomes = kept(folder)
    for part in PARTS:
        found = outcomes.get(part.name)
        is_kept = found is not None and (found.status, found.code, found.card) == (
            "passed",
            code,
            card,
        )
        if is_kept and not given.again:
            print(f"gpu: {part.name} passed before")
        elif not given.parts or part.name in given.parts:
            left_s = TOTAL_S - (time.monotonic() - began_s) - END_S
            limit_s = REHEARSAL_S if given.rehearse else min(part.limit_s, left_s)
            print(f"gpu: {part.name}, at most {limit_s:.0f} s", flush=True)
            outcomes[part.name] = run_part(part, folder, max(1.0, limit_s), rehearse=given.rehearse)
            outcomes[part.name].card, outcomes[part.name].code = card, code
            write(folder, head_of(card) | {"code": code}, outcomes)
    text = write(folder, head_of(card) | {"code": code}, outcomes)
    print(f"{text}results: {folder}")
    asked = [outcomes[name] for name in outcomes if not given.parts or name in given.parts]
    bad = ("failed", "too slow")
    return int(any(outcome.status in bad for outcome in asked))


if __name__ == "__main__":
    sys.exit(main())
