"""Most commands run without any extra; the others name the one that they need."""

import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grimp
import pytest
from packaging.utils import canonicalize_name

from client.fake_server import Fake, answer, whole
from engine.stub_runner import letters
from expertlane.cli.app import app
from test_wheel import PIP, ROOT, make_wheel, run
from without_extras import distributions_of, requirements

SMALL = ("--batch", "2", "--prompt-len", "8", "--output-len", "4")
EXPERIMENT = """
name = "mine"
[model]
preset = "paper-tiny"
[workload]
num_sequences = 8
prompt_len = 8
output_len = 4
[[deployments]]
name = "one"
layout = "tp=1"
[[deployments]]
name = "the same"
layout = "tp=1"
"""
OF_EXTRAS = [
    each
    for extra in ("engine", "serve")
    for each in requirements(extra)
    if each.name != "expertlane"
]
SIMULATED = "simulate paper-tiny --layout dp=2,ep=2 --cluster h100x2 --trace --out simulated"
CHAT = ("--endpoint", "chat", "--tokenizer", "tokenizer")
LOAD = ("--num-requests", "3", *SMALL)


@dataclass(frozen=True)
class Case:
    """A command line or a program, with the output and files expected of it.

    Attributes:
        says: pattern of its standard output.
        writes: files that are there afterwards.
        extra: the extra that it needs, which its error names.
    """

    arguments: tuple[str, ...] = ()
    says: str = ""
    writes: tuple[str, ...] = ()
    extra: str | None = None
    program: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def as_json(self) -> dict[str, Any]:
        own = {"program": self.program} if self.program else {"arguments": self.arguments}
        return own | {"environment": dict(self.environment)}


OUT = ("planned", "simulated", "balanced", "projected", "measured", "chats")
PAGES = ("results.json", "report.md", "report.html")


def in_folder(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


def cases(url: str) -> list[Case]:
    """Cases in an order in which each finds the files that earlier ones have written."""
    return [
        Case(("--version",), r"^expertlane \d"),
        *(Case((*name.split(), "--help"), rf"^Usage: expertlane {name}") for name in names()),
        Case(("list", "models"), "paper-tiny"),
        Case(("list", "profiles"), "h100"),
        Case(("list", "clusters"), "^h100xN"),
        Case(("list", "layouts", "paper-tiny", "--cluster", "h100x2"), r"tp=2"),
        Case(
            ("plan", "paper-tiny", "--cluster", "h100x1", *SMALL, "--out", "planned"),
            "^paper-tiny on h100x1",
            in_folder("planned", *PAGES, "experiment.toml"),
        ),
        Case((*SIMULATED.split(), *SMALL), "dp=2,ep=2", in_folder("simulated", *PAGES)),
        Case(("report", "simulated", "--full"), "dp=2,ep=2"),
        Case(("diff", "simulated", "simulated"), "simulated"),
        Case(("balance", "routing.npz", "--ep", "4", "--out", "balanced"), "EP 4 on 1 node"),
        Case(
            ("compare", "mine.toml", "--project", "--out", "projected"),
            "the same",
            in_folder("projected", *PAGES),
        ),
        Case(
            ("bench", "--url", url, *LOAD, "--out", "measured"), url, in_folder("measured", *PAGES)
        ),
        Case(
            ("bench", "--url", url, *CHAT, *LOAD, "--out", "chats"),
            " | chat | ",
            in_folder("chats", *PAGES),
        ),
        Case(("scale", url, "--layout", "tp=2", "--watch-s", "0"), "^tp=2 on 2 ranks: nothing has"),
        Case(
            environment=(
                ("_EXPERTLANE_COMPLETE", "complete_bash"),
                ("COMP_WORDS", "expertlane plan paper-t"),
                ("COMP_CWORD", "2"),
            ),
            says="^paper-tiny$",
        ),
        Case(program=NOT_THERE, says="^0 of [1-9]$"),
        Case(program=PROGRAM, says="^diff simulated 1 ran$"),
        Case(("generate", "paper-tiny", "--token-ids", "1"), extra="engine"),
        Case(("bench", "paper-tiny", *SMALL), extra="engine"),
        Case(("compare",), extra="engine"),
        Case(("compare", "mine.toml", "--model", "organisation/model"), extra="engine"),
        Case(("calibrate", "--out", "."), extra="engine"),
        Case(("verify", url, "--reference", "planned"), extra="verify"),
        Case(("serve", "paper-tiny"), extra="serve"),
        Case(program="from expertlane import LLM", extra="engine"),
        Case(program="import expertlane; expertlane.compare('mine.toml')", extra="engine"),
    ]


NOT_THERE = f"""
from importlib.util import find_spec

names = {[each.name.replace("-", "_") for each in OF_EXTRAS]}
print(sum(find_spec(name) is not None for name in names), "of", len(names))
"""
PROGRAM = """
import pydoc
import expertlane

results = expertlane.simulate(
    "paper-tiny", layout="tp=2", cluster="h100x2", batch=2, prompt_len=8, output_len=4
)
found = expertlane.diff("simulated", expertlane.load_results("simulated"))
assert "compare" in pydoc.render_doc(expertlane)
print("diff", "simulated" if found is not None else "", len(results.deployments), "ran")
"""


def names() -> list[str]:
    """All commands; those of a group under `group command`."""
    found = [each.callback.__name__ for each in app.registered_commands]
    for group in app.registered_groups:
        found += [
            f"{group.name} {each.callback.__name__}"
            for each in group.typer_instance.registered_commands
        ]
    return found


class Server(Fake):
    """Also answers chats, of prompts as long as their text, and has a layout to be changed."""

    def __init__(self) -> None:
        async def generate(asked: dict[str, Any], number: int) -> Any:
            prompt = asked.get("prompt") or asked["messages"][0]["content"]
            async for part in answer(asked | {"prompt": prompt}, number):
                yield part

        super().__init__(generate)

    def _about(self, route: str) -> bytes:
        if route != "/scale":
            return super()._about(route)
        return whole({"layout": "tp=2", "num_ranks": 2, "changes": [], "preparing": None})


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with what commands read."""
    found = tmp_path / "here"
    (found / "tokenizer").mkdir(parents=True)
    letters()._core.save(str(found / "tokenizer" / "tokenizer.json"))
    (found / "mine.toml").write_text(EXPERIMENT)
    (found / "routing.npz").write_bytes((ROOT / "tests/golden/routing.npz").read_bytes())
    return found


def environment() -> dict[str, str]:
    """Variables without those that change answers, such as the width of the terminal."""
    return {"PATH": os.environ["PATH"], "HOME": "/nowhere", "HF_HUB_OFFLINE": "1"}


def check(case: Case, found: dict[str, Any], folder: Path) -> None:
    shown = f"{case.arguments or case.program}: {found}"
    if case.extra is None:
        assert found["code"] == 0, shown
        assert re.search(case.says, found["out"], re.MULTILINE), shown
        assert all((folder / name).stat().st_size for name in case.writes), shown
        return
    cure = f": pip install 'expertlane[{case.extra}]'"
    if case.program:
        assert found["err"].splitlines()[-1].endswith(cure), shown
        return
    assert (found["code"], found["out"]) == (2, ""), shown
    assert re.fullmatch(rf"expertlane: error: [^\n]+{re.escape(cure)}\n", found["err"]), shown


def check_nothing_else_is_written(folder: Path) -> None:
    written = {each.name for each in folder.iterdir()}
    assert written == {"mine.toml", "routing.npz", "tokenizer", *OUT}
    reason = json.loads((folder / "projected/results.json").read_text())["not_measured"]
    assert reason.endswith("pip install 'expertlane[engine]'")


def test_commands_that_need_no_extra_run_without_any_and_others_say_which(server, folder):
    asked = cases(server.url)
    done = subprocess.run(
        [sys.executable, "-P", ROOT / "tests/without_extras.py"],
        input=json.dumps([each.as_json for each in asked]),
        env=environment() | {"PYTHONPATH": str(ROOT / "src")},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for case, found in zip(asked, json.loads(done.stdout), strict=True):
        check(case, found, folder)
    check_nothing_else_is_written(folder)


@pytest.mark.full
@pytest.mark.timeout(1800)  # some 150 MB are downloaded
def test_the_same_in_an_environment_with_what_pip_installs(server, folder, tmp_path):
    """It has just those packages that the process of the other test finds."""
    python = tmp_path / "env/bin/python"
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    install = [*PIP, "--python", python, "install", make_wheel(tmp_path / "dist")]
    subprocess.run([str(each) for each in install], check=True)
    for case in cases(server.url):
        command = [python, "-c", case.program]
        if not case.program:
            command = [python.with_name("expertlane"), *case.arguments]
        done = subprocess.run(
            command,
            env=environment() | dict(case.environment),
            cwd=folder,
            capture_output=True,
            text=True,
        )
        found = {"code": done.returncode, "out": done.stdout, "err": done.stderr}
        check(case, found, folder)
    check_nothing_else_is_written(folder)
    listing = "from importlib.metadata import distributions as all; print(*{d.name for d in all()})"
    listed = subprocess.run([python, "-c", listing], capture_output=True, text=True, check=True)
    installed = {str(canonicalize_name(each)) for each in listed.stdout.split()}
    assert installed == distributions_of(requirements()) | {"expertlane"}


# They import commands that need an extra inside functions, or (`cli.serve`) need one themselves.
COMMANDS = {
    f"expertlane.{name}" for name in ("api", "cli.app", "cli.main", "cli.serve", "cli.verify")
}
COMPUTING = {"expertlane.engine"}


def test_every_module_has_its_side_of_the_wall():
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    by_name = {each["name"]: each for each in contracts}
    layers = by_name["Packages import only from those above them"]["layers"]
    inside = by_name["What runs models is known to what measures, serves and calibrates"]
    outside = by_name["What comes without an extra imports nothing that an extra brings"]
    assert set(inside["protected_modules"]) == COMPUTING

    rooms = {f"expertlane.{name.strip()}" for layer in layers for name in layer.split("|")}
    # Only some of their modules need an extra.
    cut = {"expertlane.cli", "expertlane.comparison", "expertlane.endpoint"}
    modules = {
        f"{room}.{path.stem}"
        for room in cut
        for path in (ROOT / "src" / room.replace(".", "/")).iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()
    }
    tensors = by_name["Torch is imported where tensors are computed"]
    computing = {*inside["allowed_importers"], *tensors["allowed_importers"]}
    let_in = COMPUTING | COMMANDS | computing
    kept_out = {*outside["source_modules"]}
    assert let_in.isdisjoint(kept_out)
    assert let_in | kept_out == rooms - cut - {"expertlane.__main__"} | modules

    brought = {each.name.replace("-", "_") for each in OF_EXTRAS}
    assert brought <= {*outside["forbidden_modules"]}
    assert brought | {"triton"} <= {
        name for each in contracts for name in each.get("protected_modules", ())
    }


def test_no_modules_import_each_other_in_a_circle():
    """Not even for a type's sake, or inside functions."""
    graph = grimp.build_graph("expertlane", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 300
    ordered = [*graphlib.TopologicalSorter(imports).static_order()]  # or it names the circle
    assert ordered.index("expertlane.spec.model") < ordered.index("expertlane.engine.engine")


# Modules, two of them new, and a package that each must not import, even inside a function.
CLIMBERS = {
    "__main__": "torch",
    "cli.app": "fastapi",
    "cli.diff": "torch",
    "cli.main": "psutil",
    "cli.new": "safetensors",
    "comparison.run": "psutil",
    "engine.llm": "triton",
    "errors": "torch",
    "new": "torch",
}


def test_no_module_gets_over_the_wall(tmp_path: Path):
    shutil.copytree(ROOT / "src" / "expertlane", tmp_path / "expertlane")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for module, package in CLIMBERS.items():
        path = tmp_path / "expertlane" / f"{module.replace('.', '/')}.py"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\ndef climb():\n    import {package}\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    met = re.findall(r"^- expertlane\.([\w.]+) -> (\w+) \(l", done.stdout, re.MULTILINE)
    assert dict(met) == CLIMBERS, done.stdout
    assert "not listed as layers:\n\n- expertlane.new\n" in done.stdout
