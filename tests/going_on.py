"""`pytest --go-on FILE`: tests that have passed with these very files are not run again.

So hours of tests can be interrupted. They go in the order of what may take longest, so that not one
of two processes is left with it at the end.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_FOLDERS = ("src", "tests", "experiments", "calibration", "benchmarks", "docs", "deploy")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "leave out tests that FILE says have passed, and note there which do"
    parser.addoption("--go-on", metavar="FILE", type=Path, help=text)


def files_of_tests() -> Iterator[Path]:
    """All that a test may depend on."""
    yield _ROOT / "pyproject.toml"
    for folder in _FOLDERS:
        for path in sorted((_ROOT / folder).rglob("*")):
            if path.is_file() and not {"__pycache__", "_build"} & {*path.parts}:
                yield path


def _state() -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in files_of_tests():
        digest.update(str(path).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _may_take_s(item: pytest.Item) -> float:
    """The bound that it has; of those that `make test` runs too, little of it is used."""
    if item.get_closest_marker("full") is None:
        return 0.0
    timeout = item.get_closest_marker("timeout")
    return float(timeout.args[0] if timeout else item.config.getini("timeout"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file: Path | None = config.getoption("go_on")
    if file is None:
        return
    passed = read_passed(file)
    config.hook.pytest_deselected(items=[each for each in items if each.nodeid in passed])
    items[:] = [each for each in items if each.nodeid not in passed]
    of_file: dict[Path, float] = {}
    for each in items:
        of_file[each.path] = max(of_file.get(each.path, 0.0), _may_take_s(each))
    items.sort(key=lambda each: -of_file[each.path])


def read_passed(file: Path) -> set[str]:
    """Names of tests; a file of another state of the tree is begun anew."""
    state = _state()
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if lines[:1] != [state]:
        file.write_text(f"{state}\n", encoding="utf-8")
    return {*lines[1:]} if lines[:1] == [state] else set()


class Notes:
    """Notes what passes, as soon as it does."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._num_before = len(read_passed(file))
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid not in self._failed:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._num_before:
            line = f"{self._num_before:,} tests were left out: {self._file} says that they passed"
            terminalreporter.write_line(line)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            self._file.unlink(missing_ok=True)  # all have passed: the next run is of all


def pytest_configure(config: pytest.Config) -> None:
    file: Path | None = config.getoption("go_on")
    if file is not None and not hasattr(config, "workerinput"):  # one process hears of all
        config.pluginmanager.register(Notes(file))
