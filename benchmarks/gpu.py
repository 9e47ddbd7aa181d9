"""All that is to be known of a GPU met by chance, in ten minutes: `make gpu`.

Needs no network and installs nothing: the torch that is there (2.9 or newer) and a bare checkout.
Six parts, each a process with a limit of its own; one that fails or is too slow stops no other:

- operations: torch's operations on the GPU against float64 (tests/ops)
- kernels: our Triton kernels, and layers of whole models with them, against torch (tests/ops/cuda)
- limits: each kernel's time beside what the card allows (bench_cuda.py)
- layer: decode steps and prompts of a small and of a Mixtral-like layer (bench_layer.py)
- calibrate: `expertlane calibrate`, a profile of the GPU
- parity: whole models on the GPU against the reference (tests/gpu, tests/parity)

Output, results and a summary go into one folder: $OUT where that is set, else
results/gpu-CARD-DATE. Exit code 0 if all parts passed, 1 if one did not, 2 without a GPU.

    PYTHONPATH=src python3 benchmarks/gpu.py [--rehearse] [PART …]
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = ("msgspec", "numpy", "psutil", "pydantic", "pytest", "rich", "tomli_w", "typer")
PYTEST = ("-m", "pytest", "-o", "filterwarnings=default", "-p", "no:cacheprovider")


KERNEL_TESTS = ("backend", "attention", "experts", "rows")


@dataclass(frozen=True)
class Part:
    """A command of Python's, `{folder}` in it standing for the folder of results."""

    name: str
    limit_s: int
    arguments: tuple[str, ...]
    rehearsal: tuple[str, ...] = ()


PARTS = (
    Part(
        "operations",
        60,
        # Without tests/conftest.py, which needs more than torch.
        (*PYTEST, "--noconftest", "tests/ops/test_torch_backend.py", "tests/ops/test_products.py"),
        ("-k", "sums"),
    ),
    Part(
        "kernels",
        100,
        (
            *PYTEST,
            "--noconftest",
            *(f"tests/ops/cuda/test_{name}.py" for name in KERNEL_TESTS),
        ),
        ("-k", "no_tokens"),
    ),
    Part(
        "limits",
        50,
        ("benchmarks/bench_cuda.py", "--json", "{folder}/limits.json"),
        ("--tiny",),
    ),
    Part(
        "layer",
        60,
        ("benchmarks/bench_layer.py", "--json", "{folder}/layer.json"),
        ("--quick", "--device", "cpu"),
    ),
    Part(
        "calibrate",
        200,
        ("-m", "expertlane", "calibrate", "gpu", "--out", "{folder}/profile.toml"),
        ("--help",),
    ),
    Part(
        "parity",
        110,
        (
            *PYTEST,
            "tests/gpu",
            "tests/parity/test_equivalence.py::test_every_way_to_run[tp=1-plain-1 drained]",
            "tests/parity/test_equivalence.py::test_every_way_to_run[tp=1-overlap-2 rotating]",
        ),
        ("-k", "drained"),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """How a part ended; `status` is passed, failed or "too slow"."""

    part: str
    status: str
    seconds: float
    last_line: str


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


def results_folder(card: str) -> Path:
    """A folder that is there."""
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    out = os.environ.get("OUT")
    folder = Path(out) if out else ROOT / "results" / f"gpu-{name}-{datetime.now(UTC).date()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def run_part(part: Part, folder: Path, *, rehearse: bool) -> Outcome:
    """Run it with its output in `NAME.txt`; its whole process group ends with it."""
    given = (*part.arguments, *(part.rehearsal if rehearse else ()))
    command = [sys.executable, *(each.format(folder=folder) for each in given)]
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    log, began = folder / f"{part.name}.txt", time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "failed" if process.wait(part.limit_s) else "passed"
        except subprocess.TimeoutExpired:
            status = "too slow"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    return Outcome(part.name, status, time.monotonic() - began, lines[-1] if lines else "")


def write_summary(folder: Path, card: str, outcomes: list[Outcome]) -> str:
    """Into summary.json and summary.txt, whose text it gives; rewritten after each part."""
    import torch

    from expertlane import __version__

    missing = [name for name in NEEDED if find_spec(name) is None]
    head = {
        "card": card,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "num_gpus": torch.cuda.device_count(),
        "version": __version__,
        "python": sys.version.split()[0],
        "missing_packages": missing,
    }
    parts = [asdict(outcome) for outcome in outcomes]
    (folder / "summary.json").write_text(json.dumps(head | {"parts": parts}, indent=1) + "\n")
    lines = [f"{name}: {value}" for name, value in head.items() if name != "missing_packages"]
    if missing:
        lines.append(f"not installed, so parts that need them fail: {', '.join(missing)}")
    lines += [
        f"{each.part}: {each.status} after {each.seconds:.0f} s: {each.last_line}"
        for each in outcomes
    ]
    text = "\n".join(lines) + "\n"
    (folder / "summary.txt").write_text(text)
    return text


def main() -> int:
    names = [part.name for part in PARTS]
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("parts", nargs="*", metavar="PART", help=f"some of: {', '.join(names)}")
    options.add_argument("--rehearse", action="store_true", help="a little of each, on the CPU")
    given = options.parse_args()
    unknown = [name for name in given.parts if name not in names]
    if unknown:
        options.error(f"no part is called {unknown[0]!r}; valid: {', '.join(names)}")
    card = "CPU" if given.rehearse else card_name()
    folder, outcomes = results_folder(card), []
    for part in PARTS:
        if given.parts and part.name not in given.parts:
            continue
        print(f"gpu: {part.name}, at most {part.limit_s} s", flush=True)
        outcomes.append(run_part(part, folder, rehearse=given.rehearse))
        text = write_summary(folder, card, outcomes)
    print(f"{text}results: {folder}")
    return int(any(outcome.status != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
