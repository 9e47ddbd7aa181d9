"""The options of a command as a function of Python takes them: names, types, defaults, help."""

import inspect
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from typer.models import ArgumentInfo, OptionInfo

from expertlane.cli.option_groups import parameters_of
from expertlane.errors import UserError
from expertlane.spec.ranges import RANGES, shown, take

T = TypeVar("T")
PythonFunction = Callable[..., T]

_ONE = {"experts_per_token"}  # a number alone: several would be several results
_WIDTH = 92  # of a docstring
_OUT_HELP = (
    "Folder for results.json, the reports and all else that the command writes. None: nothing is "
    "written."
)
_ENDS = """\
Returns:
    What was found: `.answer` is text, `.page` the report, `.to_pandas()` a table.

Raises:
    UserError: what is asked for is wrong or cannot be done; options are named as on the command
        line.
    RankError: a rank died, hung or failed."""


class Annotation(str):
    """A type as it is written."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class PythonOption:
    """One option.

    Attributes:
        kind: its type without None; of what is read as text, `str`.
        is_list: whether it may be given several times on the command line.
        takes_none: whether None is a valid value.
        default: `inspect.Parameter.empty` where one has to be given.
        is_argument: whether it may be given by position.
    """

    name: str
    kind: Any
    is_list: bool
    takes_none: bool
    default: Any
    help: str
    is_argument: bool

    @classmethod
    def of(cls, declared: inspect.Parameter) -> "PythonOption":
        """The option that a group or a command declares."""
        info, default, annotation = _info_of(declared)
        parts = _parts(annotation)
        kinds = [each for each in parts if each is not NoneType]
        kind = kinds[0]
        is_list = get_origin(kind) is list
        if is_list:
            (kind,) = get_args(kind)
        if declared.name in _ONE:
            kind = int
        if isinstance(default, Enum):
            default = default.value
        help_text = getattr(info, "help", None) or ""
        is_argument = isinstance(info, ArgumentInfo)
        return cls(declared.name, kind, is_list, NoneType in parts, default, help_text, is_argument)

    @property
    def words(self) -> tuple[str, ...]:
        """The valid words, of an option that is one of several."""
        if isinstance(self.kind, type) and issubclass(self.kind, Enum):
            return tuple(each.value for each in self.kind)
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def annotation(self) -> "Annotation":
        """Its type in Python; `Text` is what the command reads as text."""
        if self.words:
            kind = f"Literal[{', '.join(map(repr, self.words))}]"
        else:
            kind = {str: "Text", Path: "str | Path"}.get(self.kind) or self.kind.__name__
        if self.is_list:
            kind = f"{kind} | Sequence[{kind}]"
        return Annotation(f"{kind} | None" if self.takes_none else kind)

    def take(self, value: Any) -> Any:
        """A value as the command gets it.

        Raises:
            UserError: it is of another type, or none of the valid words.
        """
        if value is None and self.takes_none:
            return None
        if self.is_list:
            several = [value] if isinstance(value, str) or not _is_list(value) else list(value)
            return [self._one(each) for each in several]
        return self._one(value)

    def _one(self, value: Any) -> Any:
        if self.words:
            if value not in self.words:
                raise UserError(
                    f"{self.name} is {shown(value)}; valid: {', '.join(map(str, self.words))}"
                )
            return self.kind(value) if isinstance(self.kind, type) else value
        if self.name in RANGES and self.kind in (int, float):
            return take(self.name, value)
        if self.kind is bool and isinstance(value, bool):
            return value
        if self.kind is int and isinstance(value, int) and not isinstance(value, bool):
            return str(value) if self.name in _ONE else value
        if self.kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if self.kind is Path and isinstance(value, str | os.PathLike):
            return Path(value)
        if self.kind is str and not isinstance(value, bool | NoneType | Mapping):
            return _as_text(value)
        wanted = {bool: "True or False", int: "a whole number", float: "a number", Path: "a path"}
        raise UserError(
            f"{self.name} is {shown(value)}; it must be {wanted.get(self.kind, 'text')}"
        )


@dataclass(frozen=True)
class PythonOptions:
    """All options of a command, and how its function is called.

    Attributes:
        hidden: what the command refuses with a better message than "no such option"; its default
            is what the command gets.
    """

    name: str
    intro: str
    options: tuple[PythonOption, ...]
    hidden: tuple[PythonOption, ...]

    @classmethod
    def of(cls, command: Callable[..., None], run: Callable[..., Any]) -> "PythonOptions":
        """Of a command, those that its `run` takes, and `out`."""
        declared = inspect.signature(command).parameters
        shown_options, hidden = list[PythonOption](), list[PythonOption]()
        for each in parameters_of(run):
            info, *_ = _info_of(declared[each.name])
            kept = hidden if getattr(info, "hidden", False) else shown_options
            kept.append(PythonOption.of(declared[each.name]))
        ordered = sorted(shown_options, key=lambda option: not option.is_argument)
        out = PythonOption("out", Path, False, True, None, _OUT_HELP, False)
        intro = inspect.cleandoc(command.__doc__ or "").partition("\b")[0].strip()
        return cls(command.__name__, intro, (*ordered, out), tuple(hidden))

    @property
    def signature(self) -> inspect.Signature:
        """Arguments by position or keyword, options by keyword."""
        kinds = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature(
            [
                inspect.Parameter(
                    each.name,
                    kinds[each.is_argument],
                    default=each.default,
                    annotation=each.annotation,
                )
                for each in self.options
            ]
        )

    def take(self, *arguments: Any, **given: Any) -> dict[str, Any]:
        """All values as the command gets them, defaults among them.

        Raises:
            TypeError: an option that it lacks, or none where it needs one.
            UserError: a value is not valid.
        """
        bound = self.signature.bind(*arguments, **given)
        bound.apply_defaults()
        taken = {each.name: each.take(bound.arguments[each.name]) for each in self.options}
        return taken | {each.name: each.default for each in self.hidden}

    def command(self, values: Mapping[str, Any]) -> str:
        """The call as a user repeats it: what is not the default."""
        shown_values = [
            f"{each.name}={_plain(values[each.name])!r}"
            for each in self.options
            if each.name in values and _plain(values[each.name]) != each.default
        ]
        return f"expertlane.{self.name}({', '.join(shown_values)})"

    def documentation(self) -> str:
        """The docstring of the function."""
        lines = (
            textwrap.fill(
                f"{each.name}: {each.help}",
                _WIDTH,
                initial_indent=" " * 4,
                subsequent_indent=" " * 8,
                break_on_hyphens=False,
            )
            for each in self.options
        )
        return "\n".join([self.intro, "", "Args:", *lines, "", _ENDS])

    def describe(
        self, function: Callable[..., T], name: str, module: str, result: type
    ) -> PythonFunction[T]:
        """The function, with the options' names, types, defaults and help on it."""
        function.__name__ = function.__qualname__ = name
        function.__module__ = module
        function.__doc__ = self.documentation()
        function.__signature__ = self.signature.replace(return_annotation=result)  # type: ignore[attr-defined]
        return function


def _info_of(declared: inspect.Parameter) -> tuple[Any, Any, Any]:
    """What typer knows of an option, its default, and its type."""
    annotation, default = declared.annotation, declared.default
    if get_origin(annotation) is Annotated:
        annotation, info, *_ = get_args(annotation)
        return info, default, annotation
    if isinstance(default, OptionInfo | ArgumentInfo):
        value = inspect.Parameter.empty if default.default is ... else default.default
        return default, value, annotation
    return None, default, annotation


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _as_text(value: Any) -> str:
    """As the command line has it: several with commas between."""
    return ",".join(map(_as_text, value)) if _is_list(value) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
