"""Write or check the golden files: what every command said of the same work before a change.

PYTHONPATH=tests python -m golden.golden check              all cases
PYTHONPATH=tests python -m golden.golden check plan balance those whose name has such a word
PYTHONPATH=tests python -m golden.golden write              anew, all or some
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import expertlane
from golden.cases import CASES, HERE, Case, prepare
from golden.reduce import Columns, Json, differences, measured, projected, published

MOST_SHOWN = 20
_SHOWN_LENGTH = 200  # of a value
_TIMEOUT_S = 1200
_REDUCED = {"measured": measured, "projected": projected, "published": published}
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def golden_file(source: str) -> Path:
    """Where the columns of cases are kept: `measured`, `projected` or `published`."""
    return HERE / f"{source}.json"


def read_golden(source: str) -> dict[str, Columns]:
    """The columns of each case, by its name."""
    found: dict[str, Columns] = json.loads(golden_file(source).read_text(encoding="utf-8"))
    return found


@contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder with the files that cases name; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        prepare(Path(folder))
        yield Path(folder)


def run_case(case: Case, folder: Path) -> Columns:
    """Run a case's command in `folder`, and reduce its results.

    Raises:
        RuntimeError: the command failed, or measured what was to be projected alone.
    """
    if case.name == "compare checkpoint":
        _draw_checkpoint(folder / "drawn")
    out = Path("results", case.name.replace(" ", "-"))
    target = ["--json"] if case.command == "balance" else ["--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "expertlane", *case.arguments.split(), *target],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-5:])
        raise RuntimeError(f"{case.name}: exit code {done.returncode}\n{last}")
    if case.command == "balance":
        return projected(_without_place(json.loads(done.stdout), str(folder)))
    files = sorted((folder / out).rglob("results.json"))  # one for each --experts-per-token
    all_columns: Columns = {}
    for file in files:
        results = _without_place(json.loads(file.read_text(encoding="utf-8")), str(folder))
        is_measured = any(each["source"] == "measured" for each in results["deployments"])
        if is_measured != (case.source == "measured"):
            raise RuntimeError(f"{case.name}: not what was to be {case.source}")
        found = _REDUCED[case.source](results)
        prefix = f"{file.parent.name}: " if len(files) > 1 else ""
        all_columns |= {f"{prefix}{path}": column for path, column in found.items()}
    return all_columns


def _environment() -> dict[str, str]:
    """This one, with the package that this process imports, and no ranks of torchrun's."""
    kept = {key: value for key, value in os.environ.items() if key not in _OF_TORCHRUN}
    return kept | {"PYTHONPATH": str(Path(expertlane.__file__).parents[1])}


def _without_place(value: Json, folder: str) -> Json:
    return json.loads(json.dumps(value).replace(folder, "FOLDER"))


def _draw_checkpoint(folder: Path) -> None:
    from engine.model.families import save_checkpoint

    if not folder.exists():
        save_checkpoint("deepseek_v3", folder)


def difference_lines(case: Case, found: Columns, golden: Columns) -> list[str]:
    """The first places that differ, each with the golden and the found value; empty if none do."""
    all_of_them = list(differences(golden, found))
    lines = [
        f"  {path}: {_shown(was)} became {_shown(now)}"
        for path, was, now in all_of_them[:MOST_SHOWN]
    ]
    return lines and [f"{case.name}: {len(all_of_them):,} differences, the first:", *lines]


def _shown(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}…"


def write_golden(found: dict[str, dict[str, Columns]]) -> None:
    """Put the columns of cases, by source and name, in place of those of the same names."""
    for source, of_source in found.items():
        path = golden_file(source)
        kept = read_golden(source) if path.exists() else {}
        names = [case.name for case in CASES if case.source == source]
        merged = {name: cols for name, cols in (kept | of_source).items() if name in names}
        path.write_text(_text(merged), encoding="utf-8")


def _text(of_cases: dict[str, Columns]) -> str:
    """One line a path, sorted, below the name of its case."""
    parts = []
    for name in sorted(of_cases):
        lines = ",\n".join(
            f" {json.dumps(path, ensure_ascii=False)}: "
            + json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            for path, value in sorted(of_cases[name].items())
        )
        parts.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def run_cases(
    cases: Sequence[Case], folder: Path
) -> Iterator[tuple[Case, Columns | RuntimeError, float]]:
    """Projections two at a time, then what is measured by itself; with the seconds of each."""

    def timed(case: Case) -> tuple[Case, Columns | RuntimeError, float]:
        began_s, found = time.monotonic(), None
        try:
            found = run_case(case, folder)
        except RuntimeError as error:
            found = error
        return case, found, time.monotonic() - began_s

    with ThreadPoolExecutor(max_workers=2) as pool:
        yield from pool.map(timed, [case for case in cases if case.source != "measured"])
    yield from map(timed, [case for case in cases if case.source == "measured"])


def main(arguments: Sequence[str]) -> int:
    """Give 1 where something differs or fails, 2 where nothing was asked for."""
    task, *words = arguments or [""]
    cases = [case for case in CASES if not words or any(word in case.name for word in words)]
    if task not in ("write", "check") or not cases:
        print(f"{__doc__}\nCases:", *(f"  {case.name}" for case in CASES), sep="\n")
        return 2
    found: dict[str, dict[str, Columns]] = {}
    is_wrong = False
    with workplace() as folder:
        for case, outcome, seconds in run_cases(cases, folder):
            print(f"{case.name}: {seconds:.1f} s", flush=True)
            if isinstance(outcome, RuntimeError):
                lines = [str(outcome)]
            elif task == "check":
                golden = read_golden(case.source).get(case.name, {})
                lines = difference_lines(case, outcome, golden)
            else:
                found.setdefault(case.source, {})[case.name] = outcome
                lines = []
            print("".join(f"{line}\n" for line in lines), end="", flush=True)
            is_wrong |= bool(lines)
    write_golden(found)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
