"""Which files and functions of expertlane run on the way from a question to its answer.

    PYTHONPATH=src python tests/count_files.py token        from `LLM.generate` to a sampled token
    PYTHONPATH=src python tests/count_files.py decode       the same in the midst of two requests
    PYTHONPATH=src python tests/count_files.py experiment   from an experiment to results.json
    PYTHONPATH=src python tests/count_files.py plan         from plan's options to its printed rows

Everything is done twice and counted the second time, so that imports are not counted. Functions
of a local rank count too: every rank writes which of them it executed. What happens once a second
makes the number vary by one or two.
"""

import io
import os
import sys
import tempfile
import threading
from collections import Counter as Counts
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType

import expertlane
from expertlane.engine.ranks import fork_server
from expertlane.engine.ranks.local_ranks import LocalRanks

PACKAGE = Path(expertlane.__file__).parent
FOLDER = "COUNT_FILES_IN"  # a variable: where ranks write, and whether they are to count
EXPERIMENT = """name = "counted"
[model]
preset = "paper-tiny"
[workload]
num_sequences = 4
prompt_len = 6
output_len = 4
seed = 1
[[deployments]]
name = "TP"
layout = "tp=2"
[[deployments]]
name = "EP"
layout = "dp=2,ep=2"
"""
PLAN = "plan paper --cluster h100x8 --batch 64 --prompt-len 512 --output-len 32"
# What makes report.html.
PAGE = ("report/html", "report/plots", "report/load_plots", "report/charts")


class Counter:
    """Counts the functions that are called, in all threads.

    Attributes:
        functions: each as path in the package, and name.
    """

    def __init__(self) -> None:
        self.functions: set[str] = set()
        self._seen: set[object] = set()

    def start(self) -> None:
        """Count from now on."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def stop(self) -> None:
        """Count no more."""
        sys.setprofile(None)
        threading.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or code in self._seen:
            return
        self._seen.add(code)
        path = Path(code.co_filename)
        if code.co_name != "<module>" and path.is_relative_to(PACKAGE):
            self.functions.add(f"{path.relative_to(PACKAGE)} {code.co_qualname}")


def main_of_server() -> None:
    """The fork server of ranks that count what they execute for a command, and after it."""
    from expertlane.engine.stage.worker import HANDLERS

    counter, folder = Counter(), Path(os.environ[FOLDER])

    def counting(handler: Callable) -> Callable:
        def handle(context, command):
            if (folder / "count").exists():
                counter.start()
            result = handler(context, command)
            (folder / f"rank {context.settings.rank}").write_text("\n".join(counter.functions))
            return result

        return handle

    fork_server.main({command: counting(handler) for command, handler in HANDLERS.items()})


main = main_of_server  # the name by which `LocalRanks` calls it


def count(do: Callable[[], object]) -> set[str]:
    """The functions of the package that a second call executes, in this process and in ranks."""
    folder = Path(os.environ[FOLDER])
    counter = Counter()
    do()
    (folder / "count").touch()
    counter.start()
    try:
        do()
    finally:
        counter.stop()
    of_ranks = [path.read_text().split("\n") for path in folder.glob("rank *")]
    return counter.functions.union(*of_ranks) - {""}


def count_token() -> set[str]:
    """One token of a prompt, on two ranks that share the experts."""
    from expertlane import LLM, SamplingParams

    with LLM("paper-tiny", layout="dp=2,ep=2", seed=1) as llm:
        params = SamplingParams(max_tokens=1, temperature=0.5)
        return count(lambda: llm.generate([[1, 2, 3]], params))


def count_decode() -> set[str]:
    """Two tokens of each of two requests that are decoded, on two ranks that share the experts."""
    from expertlane import LLM, SamplingParams

    with LLM("paper-tiny", layout="dp=2,ep=2", seed=1) as llm:
        chunks = llm.stream([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=9, temperature=0.5))
        return count(lambda: [next(chunks) for _ in range(4)])


def run(arguments: str) -> None:
    """Run a command of the command line in this process, without its output."""
    from expertlane.cli.app import app

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        app(arguments.split(), standalone_mode=False)


def count_experiment(folder: Path) -> set[str]:
    """`compare` of two deployments on two ranks; without what makes its reports."""
    file = folder / "experiment.toml"
    file.write_text(EXPERIMENT)
    found = count(lambda: run(f"compare {file} --dtype float32 --out {folder / 'out'}"))
    return {each for each in found if not each.startswith("report/")}


def count_plan(folder: Path) -> set[str]:
    """A small search; without what makes its page, but with its table."""
    found = count(lambda: run(f"{PLAN} --out {folder / 'out'}"))
    return {each for each in found if not each.startswith(PAGE)}


def command_line() -> None:
    what = sys.argv[1] if len(sys.argv) == 2 else ""
    of_model = {"token": count_token, "decode": count_decode}
    of_command = {"experiment": count_experiment, "plan": count_plan}
    if what not in of_model | of_command:
        sys.exit(__doc__)
    LocalRanks.__init__.__defaults__ = ("count_files",)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        found = of_model[what]() if what in of_model else of_command[what](Path(folder))
    files = Counts(each.split()[0] for each in found)
    for file in sorted(files):
        print(f"{file}: {files[file]}")
    print(f"{what}: {len(files)} files, {files.total()} functions")


if __name__ == "__main__":
    command_line()
