"""Groups of options: dataclasses whose fields are options.

A function that takes groups becomes a command of the command line (`takes_groups`, `publishes`), or
a function of the package with the options as parameters (`PythonOptions`).
"""

import inspect
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from copy import copy
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import wraps
from numbers import Real
from pathlib import Path
from types import GeneratorType, NoneType, UnionType
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin

import typer
from typer.models import ArgumentInfo, OptionInfo

from expertlane.cli.output import Call, Found, OutputOptions, publish
from expertlane.errors import UserError, did_you_mean
from expertlane.spec.files import as_path
from expertlane.spec.layout import Layout
from expertlane.spec.ranges import ANY_NUMBER, ANY_WHOLE, RANGES, shown, take, take_word

T = TypeVar("T")
P = ParamSpec("P")
PythonFunction = Callable[..., T]
Fill = Callable[[Mapping[str, Any]], dict[str, Any]]
_CONTEXT = "context"  # a parameter that typer fills in, and no option
_GIVEN = ("COMMANDLINE", "ENVIRONMENT")  # where typer has a value from that somebody gave

_MOST_VALUES = 10_000  # values of a list that are written out
_LARGEST = 1e30  # largest number that is written out as text
# A number alone, of a field's range: several would be several results.
_ONE = {"experts_per_token": "num_experts_per_tok"}
_WIDTH = 92  # columns of a docstring
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


def publishes(
    run: Callable[..., Found | Iterable[Found]], fill: Fill | None = None
) -> Callable[..., None]:
    """The command that prints and writes what a function finds; it ends with its exit code.

    Args:
        run: has a parameter `call: Call`, in whose place the command has the options of output.
        fill: as `takes_groups` has it.
    """

    @wraps(run)
    def command(output_options: OutputOptions, **values: Any) -> None:
        found = run(call=Call.typed(output_options), **values)
        several = [found] if isinstance(found, Found) else found
        # Where it is a comparison, its ranks end, whatever printing comes to.
        with closing(several) if isinstance(several, GeneratorType) else nullcontext():
            for each in several:
                publish(each, output_options)
                if each.exit_code:
                    raise typer.Exit(each.exit_code)

    signature = inspect.signature(run)
    declared = [
        each.replace(name="output_options", annotation=OutputOptions)
        if each.annotation is Call
        else each
        for each in signature.parameters.values()
    ]
    vars(command)["__signature__"] = signature.replace(parameters=declared)
    return takes_groups(command, fill)


def parameters_of(taker: Any) -> list[inspect.Parameter]:
    """The options of a function that takes groups, all by keyword; neither calls nor contexts.

    A group may have a `panel`, where its options are in help unless they say otherwise, and
    `changes` to what options say in help, by their names: of those that it inherits.
    """
    found = []
    for each in inspect.signature(taker).parameters.values():
        if is_group(each.annotation):
            found += parameters_of(each.annotation)
        elif isinstance(each.default, OptionInfo):
            option = copy(each.default)
            vars(option).update(getattr(taker, "changes", {}).get(each.name, {}))
            option.rich_help_panel = option.rich_help_panel or getattr(taker, "panel", None)
            option.metavar = option.metavar or _metavar_of(each)
            option.case_sensitive = False
            if each.annotation is bool and not option.param_decls:
                option.param_decls = (_spelling(each),)  # without its `--no-`
            found.append(each.replace(default=option, kind=inspect.Parameter.KEYWORD_ONLY))
        elif each.annotation not in (Call, typer.Context):
            found.append(each.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    return found


def _metavar_of(option: inspect.Parameter) -> str:
    """The words to choose from; N for a whole number, FILE for a path, SECONDS for a time."""
    kinds = _kinds(option.annotation)
    if int in kinds:
        return "N"
    if Path in kinds:
        return "FILE"
    return "SECONDS" if option.name.endswith("_s") else "|".join(_choices(option.annotation))


def _kinds(annotation: Any) -> set[Any]:
    """A type's parts, those of a list too."""
    return {annotation}.union(*map(_kinds, get_args(annotation)))


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


class Annotation(str):
    """A type as it is written."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class PythonOption:
    """One option.

    Attributes:
        kind: its type without None; `str` for what the command reads as text.
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
    def words(self) -> list[str]:
        """The valid words, of an option that is one of several."""
        return _choices(self.kind)

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
            several = value if _is_list(value) else [value]
            if len(several) > _MOST_VALUES:
                raise UserError(
                    f"{self.name} has {len(several):,} values; at most {_MOST_VALUES:,} are taken"
                )
            return [self._one(each) for each in several]
        return self._one(value)

    def _one(self, value: Any) -> Any:
        if self.words:
            take_word(self.name, value, self.words)
            return self.kind(value) if isinstance(self.kind, type) else value
        if self.name in _ONE:
            return str(take(_ONE[self.name], value, self.name))
        if self.kind in (int, float):
            known = ANY_WHOLE if self.kind is int else ANY_NUMBER
            return RANGES.get(self.name, known).take(self.name, value)
        if self.kind is bool and isinstance(value, bool):
            return value
        if self.kind is Path:
            return as_path(self.name, value)
        if self.kind is str and (text := _as_text(value)) is not None:
            return text
        wanted = "True or False" if self.kind is bool else "text"
        raise UserError(f"{self.name} is {shown(value)}; it must be {wanted}")


@dataclass(frozen=True)
class PythonOptions:
    """All options of a command, and how its function is called.

    Attributes:
        hidden: options that the command refuses with a better message than "no such option"; it
            gets their defaults.
    """

    name: str
    intro: str
    options: tuple[PythonOption, ...]
    hidden: tuple[PythonOption, ...]

    @classmethod
    def of(cls, run: Callable[..., Any]) -> "PythonOptions":
        """The options of a command's function, and `out`."""
        shown_options, hidden = list[PythonOption](), list[PythonOption]()
        for each in parameters_of(run):
            info, *_ = _info_of(each)
            kept = hidden if getattr(info, "hidden", False) else shown_options
            kept.append(PythonOption.of(each))
        ordered = sorted(shown_options, key=lambda option: not option.is_argument)
        out = PythonOption("out", Path, False, True, None, _OUT_HELP, False)
        intro = inspect.cleandoc(run.__doc__ or "").partition("\b")[0].strip()
        return cls(run.__name__, intro, (*ordered, out), tuple(hidden))

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
        """The values that are given, as the command gets them.

        Raises:
            TypeError: an option that it lacks, or none where it needs one; the text names the
                function, and the options that may have been meant.
            UserError: a value is not valid.
        """
        bound = bind(self.name, self.signature, arguments, given)
        named = bound.arguments
        return {
            each.name: each.take(named[each.name]) for each in self.options if each.name in named
        }

    def defaults(self) -> dict[str, Any]:
        """Values of options that are not given; required ones have none."""
        options = (*self.options, *self.hidden)
        return {
            each.name: each.default
            for each in options
            if each.default is not inspect.Parameter.empty
        }

    def command(self, values: Mapping[str, Any]) -> str:
        """The call as Python text, with the values that are not defaults."""
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
        vars(function)["__signature__"] = self.signature.replace(return_annotation=result)
        return function


def bind(
    name: str, signature: inspect.Signature, arguments: Sequence[Any], given: Mapping[str, Any]
) -> inspect.BoundArguments:
    """The arguments of a call by their names.

    Raises:
        TypeError: they do not fit; the text names the function, and what may have been meant.
    """
    try:
        return signature.bind(*arguments, **given)
    except TypeError as error:
        known = signature.parameters
        unknown = next((each for each in given if each not in known), "")
        hint = did_you_mean(unknown, known) if unknown in str(error) else ""
        raise TypeError(f"{name}(): {error}{hint and f'; {hint}'}") from None


def names_itself(function: Callable[P, T]) -> Callable[P, T]:
    """The function, whose wrong arguments are told as `bind` does."""
    signature = inspect.signature(function)

    @wraps(function)
    def run(*arguments: P.args, **given: P.kwargs) -> T:
        bind(function.__name__, signature, arguments, given)
        return function(*arguments, **given)

    return run


def _info_of(declared: inspect.Parameter) -> tuple[Any, Any, Any]:
    """Typer's information on an option, its default, and its type."""
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


def _as_text(value: Any) -> str | None:
    """A value as the command line takes it, several with commas between; None without a text."""
    if _is_list(value):
        parts = [_one_as_text(each) for each in value[:_MOST_VALUES]]
        texts = [each for each in parts if each is not None]
        return ",".join(texts) if len(texts) == len(value) else None
    return _one_as_text(value)


def _one_as_text(value: Any) -> str | None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number:
        return str(value) if abs(value) < _LARGEST else None
    return str(value) if isinstance(value, str | Path | Layout) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
