"""Every script that a document names, run at a small size: it succeeds and prints its result."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from documented.commands import ROOT, kept_results
from documented.smokes import LIMIT_S, SMOKES, Stage, run

pytestmark = [pytest.mark.full, pytest.mark.timeout(2 * LIMIT_S)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("documented"))


def module_of(name: str) -> str:
    """Name by which documents start a script of the tests."""
    return name.removeprefix("tests/").removesuffix(".py").replace("/", ".")


@pytest.fixture
def unchanged() -> Iterator[None]:
    before = kept_results()
    yield
    assert kept_results() == before


_CASES = [
    pytest.param(name, marks=[pytest.mark.starts_anew] if smoke.computes else [])
    for name, smoke in SMOKES.items()
]


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.usefixtures("unchanged")
def test_it_runs(name: str, stage: Stage, tmp_path: Path):
    smoke, script = SMOKES[name], ROOT / name
    if why := smoke.needs():
        pytest.skip(why)
    if smoke.beside:
        shutil.copytree(script.parent, tmp_path / "beside", ignore=shutil.ignore_patterns("*.md"))
        script = tmp_path / "beside" / script.name
    filled = map(stage.fill, shlex.split(smoke.arguments))
    program = ["-m", module_of(name)] if name.startswith("tests/") else [str(script)]
    done = run(tmp_path, sys.executable, *program, *filled)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert re.search(smoke.shows, done.stdout, re.MULTILINE), done.stdout[-4000:]
    if smoke.beside:
        made = [path for path in script.parent.iterdir() if path.suffix in (".svg", ".png")]
        assert any(path.stat().st_mtime > script.stat().st_mtime for path in made)
