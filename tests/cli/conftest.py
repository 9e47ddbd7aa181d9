"""A comparison that takes no time: keeps what the command line hands over, gives a fixed answer."""

import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import expertlane.comparison
import expertlane.comparison.run
import expertlane.engine.launch
import expertlane.engine.llm  # takes the real `start_pool`, before a fake is in place
import expertlane.report
import expertlane.results.file
from expertlane.cli.main import main
from expertlane.comparison.run import Repeats, why_not_here
from expertlane.errors import CapacityError
from expertlane.results.file import write_text
from expertlane.spec.engine_config import EngineConfig

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class FakeResults(str):
    """Says what was asked of it."""


class FakeComparison:
    """Stands for the ranks, `run_comparison`, and the writers of its results."""

    def __init__(self) -> None:
        self.pools: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []
        self.answer: Any = FakeResults("results")
        self.error: BaseException | None = None
        self.fails_at = 1
        self.too_large: CapacityError | None = None
        self.is_follower = False

    def start_pool(self, config: EngineConfig, num_ranks: int) -> Any:
        asked = "timeout_s", "dtype", "oversubscribe", "cpu_isa"
        self.pools.append(
            {"num_ranks": num_ranks} | {name: getattr(config, name) for name in asked}
        )
        return None if self.is_follower else contextlib.nullcontext()

    def check_memory(self, experiment: Any, pool: Any) -> None:
        if self.too_large is not None:
            raise self.too_large

    def run_comparison(
        self,
        experiment: Any,
        pool: Any,
        progress: Any,
        *,
        command: str,
        virtual: Any,
        repeats: Any,
        folder: Any,
        resume: bool,
        on_trace: Any,
    ) -> Any:
        self.calls.append({"experiment": experiment, "command": command})
        self.virtual, self.repeats, self.resume = virtual, repeats, (folder, resume)
        if on_trace is not None:
            for name in ("EP 16", "EP/16"):
                on_trace(name, [])
        progress.task("EP 16", 2)
        progress.advance()
        if self.error is not None and len(self.calls) == self.fails_at:
            raise self.error
        progress.advance()
        progress.done()
        return self.answer


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeComparison:
    """The fake in place, in an empty working folder, outside `torchrun`."""
    fake = FakeComparison()

    def as_json(results: Any) -> str:
        return f'{{"answer": "{results}", "name": "TP 8 × PP 2"}}\n'

    def write(results: Any, folder: Path) -> Path:
        return write_text(folder / "results.json", as_json(results))

    def show(report: str, console: Any, more: str = "") -> None:
        console.print(f"{report}!")

    def install(package: ModuleType, name: str, **functions: Callable[..., Any]) -> None:
        module = ModuleType(f"{package.__name__}.{name}")
        for function_name, function in functions.items():
            setattr(module, function_name, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(package, name, module, raising=False)

    monkeypatch.setattr(expertlane.engine.launch, "start_pool", fake.start_pool)
    install(
        expertlane.comparison,
        "run",
        run_comparison=fake.run_comparison,
        Repeats=Repeats,
        check_memory=fake.check_memory,
        why_not_here=why_not_here,
    )
    monkeypatch.setattr("expertlane.engine.ops.host.memory_bytes", lambda: (1 << 50, 1 << 50))
    monkeypatch.setattr(expertlane.results.file, "to_json", as_json)
    monkeypatch.setattr(expertlane.results.file, "write", write)

    def report_of(results: Any) -> str:
        if isinstance(results, str):
            return results
        return ", ".join(f"{name}={value!r}" for name, value in vars(results).items())

    install(expertlane.report, "sections", report_of=report_of)
    install(expertlane.report, "markdown", render=lambda report: f"# {report} ×\n")
    install(expertlane.report, "terminal", show=show, show_answer=show)
    install(expertlane.report, "html", render=lambda report: f"<title>{report} ×</title>\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return fake


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line; gives exit code, stdout and stderr."""

    def run_with(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertlane", *arguments])
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            with pytest.raises(SystemExit) as caught:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run_with
