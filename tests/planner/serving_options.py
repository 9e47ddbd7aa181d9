"""The options of engines' and routers' argument parsers, as recorded in serving_options.json.

Each is read off its parser, which is run; no GPU is needed. The packages are unpacked (`pip
download vllm --no-deps`, a zip archive) into folders on PYTHONPATH, with what they import
installed. To record them anew, and to let the same parsers take the commands of plans:

    python -P tests/planner/serving_options.py record vllm sglang vllm-router sglang-router
    python -P tests/planner/serving_options.py take vllm results/*/results.json
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("serving_options.json")
BEGINNINGS = {
    "vllm": ["vllm", "serve"],
    "sglang": ["python", "-m", "sglang.launch_server"],
    "vllm-router": ["vllm-router"],
    "sglang-router": ["python", "-m", "sglang_router.launch_router"],
}


def recorded(package: str) -> dict[str, Any]:
    """Version, flags, options that take values with how many, of which type, and their choices."""
    return json.loads(RECORD.read_text())[package]


def words_of(line: str) -> tuple[str, list[str]]:
    """The package that a command starts, and the words that its parser gets.

    Raises:
        ValueError: it starts none of them.
    """
    words = shlex.split(line)
    while words and "=" in words[0] and not words[0].startswith("-"):  # variables
        words = words[1:]
    for package, begin in BEGINNINGS.items():
        if words[: len(begin)] == begin:
            return package, words[len(begin) :]
    raise ValueError(line)


class Parser(argparse.ArgumentParser):
    """Takes what a recorded parser takes: its names, its flags, its types and choices."""

    def __init__(self, package: str) -> None:
        super().__init__(allow_abbrev=False, add_help=False)
        options, types = recorded(package), {"int": int, "float": float}
        if package == "vllm":
            self.add_argument("model_tag")
        for name in options["flags"]:
            self.add_argument(name, action="store_true")
        for name, how in options["values"].items():
            self.add_argument(
                name,
                nargs=how.get("nargs"),
                type=types.get(how.get("type"), str),
                choices=options["choices"].get(name),
                action="append" if how.get("is_repeated") else "store",
            )

    def error(self, message: str) -> None:
        """Raise."""
        raise ValueError(message)


def _vllm() -> argparse.ArgumentParser:
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()  # this machine need have no GPU
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        module = import_module("vllm.entrypoints.common.cli_args")
    except ModuleNotFoundError:  # up to 0.32
        module = import_module("vllm.entrypoints.launchers.cli_args")
    parser: argparse.ArgumentParser = module.make_arg_parser(FlexibleArgumentParser())
    return parser


def _of_class(module: str, name: str, **more: bool) -> argparse.ArgumentParser:
    """The parser that a class of arguments fills."""
    parser = argparse.ArgumentParser()
    getattr(import_module(module), name).add_cli_args(parser, **more)
    return parser


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "vllm": _vllm,
    "sglang": partial(_of_class, "sglang.srt.server_args", "ServerArgs"),
    **{
        name: partial(
            _of_class,
            f"{name.replace('-', '_')}.router_args",
            "RouterArgs",
            use_router_prefix=False,
        )
        for name in ("vllm-router", "sglang-router")
    },
}
_CHOICES_OF = (  # that commands name
    *("--all2all-backend", "--moe-a2a-backend", "--deepep-mode", "--kv-cache-dtype", "--dtype"),
    *("--quantization", "--disaggregation-mode"),
)


def version_of(package: str) -> str:
    """Of the installed package; vLLM's build for CPUs has another name."""
    try:
        return version(package)
    except PackageNotFoundError:
        return version(f"{package}-cpu")


def of_installed(package: str) -> dict[str, Any]:
    """What its parser takes, as `recorded` has it."""
    flags: list[str] = []
    values: dict[str, dict[str, Any]] = {}
    choices: dict[str, list[Any]] = {}
    # Names that help does not show are taken too.
    for name, action in PARSERS[package]()._option_string_actions.items():
        if not name.startswith("--") or name == "--help":
            continue
        if action.nargs == 0:
            flags.append(name)
            continue
        how = {
            "nargs": action.nargs,
            "type": {int: "int", float: "float"}.get(action.type),
            "is_repeated": isinstance(action, argparse._AppendAction),
        }
        values[name] = {key: value for key, value in how.items() if value}
        if action.choices and name in _CHOICES_OF:
            choices[name] = list(action.choices)
    return {
        "version": version_of(package),
        "flags": sorted(flags),
        "values": dict(sorted(values.items())),
        "choices": choices,
    }


def commands_in(files: list[str], package: str) -> Iterator[list[str]]:
    """The words of every command of a package in results of plans."""
    for file in files:
        for plan in json.loads(Path(file).read_text())["plans"]:
            for engine in plan["engines"]:
                for command in engine["commands"]:
                    for line in command["lines"]:
                        if engine["engine"] in ("vllm", "sglang"):
                            found, words = words_of(line)
                            if found == package:
                                yield words


if __name__ == "__main__":
    verb, package, *rest = sys.argv[1:]
    if verb == "record":
        made = {each: of_installed(each) for each in (package, *rest)}
        known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        RECORD.write_text(json.dumps(known | made, indent=1) + "\n")
    else:
        parser, num = PARSERS[package](), 0
        if package == "vllm":
            parser.add_argument("model_tag", nargs="?")
        for words in commands_in(rest, package):
            parser.parse_args(words)
            num += 1
        print(f"{package} {version_of(package)} takes {num} commands of {len(rest)} plans")
