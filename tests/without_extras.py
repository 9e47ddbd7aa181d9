"""Runs commands in a process that finds only what `pip install expertlane` brings.

Reads a list of cases from standard input as JSON, and writes the list of their results: exit code,
standard output and error. A case has the arguments of a command or the code of a program, and
variables of its environment. All run in the working directory, one after the other.
"""

import contextlib
import io
import json
import os
import sys
import sysconfig
import tomllib
import traceback
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def requirements(extra: str | None = None) -> list[Requirement]:
    """Requirements in pyproject.toml: those of the package, or those of an extra."""
    with PROJECT.open("rb") as file:
        project = tomllib.load(file)["project"]
    listed = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return [Requirement(each) for each in listed]


def distributions_of(wanted: list[Requirement]) -> set[str]:
    """The names of the distributions wanted, and of all that they need in turn."""
    found: set[str] = set()
    left = list(wanted)
    while left:
        asked = left.pop()
        if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
            continue
        name = str(canonicalize_name(asked.name))
        for extra in ("", *asked.extras):
            key = f"{name}[{extra}]"
            if key in found:
                continue
            found.add(key)
            needed = map(Requirement, distribution(name).requires or ())
            left += [
                Requirement(f"{each.name}[{','.join(each.extras)}]" if each.extras else each.name)
                for each in needed
                if each.marker is None or each.marker.evaluate({"extra": extra})
            ]
    return {key.partition("[")[0] for key in found}


class WithoutExtras:
    """Finds modules as `PathFinder` does, but among installed ones only some distributions'."""

    def __init__(self, distributions: set[str]) -> None:
        self._distributions = distributions
        self._folders = tuple(sysconfig.get_path(each) for each in ("purelib", "platlib"))
        self._names = {
            name
            for name, owners in packages_distributions().items()
            if distributions.intersection(map(canonicalize_name, owners))
        }

    def find_distributions(self, *context: Any) -> Iterator[Distribution]:
        found = PathFinder.find_distributions(*context)
        return (each for each in found if canonicalize_name(each.name) in self._distributions)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or path is not None or name in self._names:
            return spec
        places = [spec.origin or "", *(spec.submodule_search_locations or ())]
        return None if any(each.startswith(self._folders) for each in places) else spec


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Run a command or a program."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = dict(os.environ)
    os.environ.update(case.get("environment", {}))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if "program" in case:
                exec(case["program"], {"__name__": "__main__"})
            else:
                from expertlane.cli.main import main

                sys.argv = ["expertlane", *case["arguments"]]
                main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        code = 1
        err.write(traceback.format_exc())
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def main() -> None:
    """Run the cases on standard input, print their results."""
    bare = WithoutExtras({"expertlane"} | distributions_of(requirements()))
    sys.meta_path[:] = [bare if each is PathFinder else each for each in sys.meta_path]
    print(json.dumps([answer(case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
