"""A comparison that takes no time: keeps what the command line hands over, gives a fixed answer."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import expertlane.experiment
import expertlane.report
import expertlane.results
from expertlane.cli.main import main
from expertlane.results import write_text


class FakeComparison:
    """Stands for `run_comparison` and for the writers of its results."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.answer: Any = "results"
        self.error: BaseException | None = None

    def run_comparison(self, experiment: Any, **options: Any) -> Any:
        progress = options.pop("progress")
        self.calls.append({"experiment": experiment} | options)
        progress.task("EP 16", 2)
        progress.advance()
        if self.error is not None:
            raise self.error
        progress.advance()
        progress.done()
        return self.answer


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeComparison:
    """The fake in place, in an empty working folder, outside `torchrun`."""
    fake = FakeComparison()

    def write(results: Any, folder: Path) -> Path:
        return write_text(
            folder / "results.json", f'{{"answer": "{results}", "name": "TP 8 × PP 2"}}\n'
        )

    def install(package: ModuleType, name: str, **functions: Callable[..., Any]) -> None:
        module = ModuleType(f"{package.__name__}.{name}")
        for function_name, function in functions.items():
            setattr(module, function_name, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(package, name, module, raising=False)

    install(expertlane.experiment, "compare", run_comparison=fake.run_comparison)
    monkeypatch.setattr(expertlane.results, "write", write)
    install(expertlane.report, "markdown", render=lambda results: f"# {results} ×\n")
    install(
        expertlane.report, "terminal", show=lambda results, console: console.print(f"{results}!")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return fake


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line; gives exit code, stdout and stderr."""

    def run_with(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertlane", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run_with
