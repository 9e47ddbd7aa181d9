"""Groups of options: dataclasses whose fields are options; a command takes groups as parameters."""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import typer
from typer.models import OptionInfo

from expertlane.cli.output import Call
from expertlane.errors import UserError
from expertlane.spec.ranges import RANGES, take

Fill = Callable[[Mapping[str, Any]], dict[str, Any]]
_CONTEXT = "context"  # a parameter that typer fills in, and no option
_GIVEN = ("COMMANDLINE", "ENVIRONMENT")  # where typer has a value from that somebody gave


def takes_groups(command: Callable[..., None], fill: Fill | None = None) -> Callable[..., None]:
    """The command as typer takes it: in place of each group, its options, in the group's panel.

    Numbers of options are checked by the ranges of the fields that they are named like.

    Args:
        fill: from what is given, by name, gives values of other options in place of their defaults.
    """

    parameters = parameters_of(command)

    names = {_spelling(each) for each in parameters if isinstance(each.default, OptionInfo)}

    @wraps(command)
    def run(**values: Any) -> None:
        if fill is not None:
            context = values.pop(_CONTEXT)
            sources = {name: context.get_parameter_source(name) for name in values}
            given = {
                name: values[name] for name, source in sources.items() if source.name in _GIVEN
            }
            values |= fill(given)
        for each in parameters:
            _check(each, values[each.name])
            if isinstance(values[each.name], Path) and str(values[each.name]) in names:
                raise UserError(
                    f"{_spelling(each)} needs a path, and {values[each.name]} is an option; a "
                    f"file of that name is ./{values[each.name]}"
                )
        call_with(command, values)

    declared = list(parameters)
    if fill is not None:
        keyword = inspect.Parameter.KEYWORD_ONLY
        declared.append(inspect.Parameter(_CONTEXT, keyword, annotation=typer.Context))
    vars(run)["__signature__"] = inspect.Signature(declared)
    run.__annotations__ = {each.name: each.annotation for each in declared}
    return run


def parameters_of(taker: Any) -> list[inspect.Parameter]:
    """The options of a function that takes groups, all by keyword; neither calls nor contexts."""
    found = []
    for each in inspect.signature(taker).parameters.values():
        if is_group(each.annotation):
            found += parameters_of(each.annotation)
            continue
        if each.annotation in (Call, typer.Context):
            continue
        if isinstance(each.default, OptionInfo):
            panel = each.default.rich_help_panel or getattr(taker, "panel", None)
            each.default.rich_help_panel = panel
            each.default.metavar = each.default.metavar or _metavar_of(each.annotation)
            each.default.case_sensitive = False
            if each.annotation is bool and not each.default.param_decls:
                each.default.param_decls = (_spelling(each),)  # without its `--no-`
        found.append(each.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    return found


def _metavar_of(annotation: Any) -> str:
    """The words to choose from; N for a whole number."""
    is_whole = annotation is int or int in get_args(annotation)
    return "N" if is_whole else "|".join(_choices(annotation))


def _choices(annotation: Any) -> list[str]:
    """The values of a `Literal` or of an enumeration, also where they may be missing."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [each.value for each in annotation]
    return [
        value
        for each in get_args(annotation)
        for value in ([each] if isinstance(each, str) else _choices(each))
    ]


def is_group(kind: object) -> bool:
    """True if a parameter of this type stands for several options."""
    return is_dataclass(kind) and kind is not Call


def call_with(taker: Any, values: dict[str, Any]) -> Any:
    """Call a function that takes groups; a value for each option, by its name."""
    return taker(
        **{
            name: call_with(each.annotation, values) if is_group(each.annotation) else values[name]
            for name, each in inspect.signature(taker).parameters.items()
        }
    )


def given(group: Any) -> list[str]:
    """The options of a group that are not at their defaults, as a command line has them.

    Those that the environment sets are left out.
    """
    found = []
    for name, each in inspect.signature(type(group)).parameters.items():
        value = getattr(group, name)
        if is_group(each.annotation):
            found += given(value)
            continue
        info = each.default
        is_set_around = (getattr(info, "envvar", None) or "") in os.environ
        if value != getattr(info, "default", info) and not is_set_around:
            found.append(_spelling(each))
    return found


def _spelling(option: inspect.Parameter) -> str:
    declared = getattr(option.default, "param_decls", None)
    return declared[0] if declared else f"--{option.name.replace('_', '-')}"


def _check(option: inspect.Parameter, value: object) -> None:
    if option.name not in RANGES:
        return
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, int | float):
            take(option.name, each, _spelling(option))
