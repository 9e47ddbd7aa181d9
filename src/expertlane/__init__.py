"""Run, compare and plan expert-parallel inference of Mixture-of-Experts models.

`compare`, `plan`, `simulate` and `bench` are the commands of these names for Python; `LLM` runs a
model, `load_results` and `diff` read and compare results. All are imported when first asked for;
their signatures are in `__init__.pyi`.
"""

from types import ModuleType

from expertlane.version import __version__

__all__ = [
    "LLM",
    "Difference",
    "ExpertlaneError",
    "Options",
    "RankError",
    "Results",
    "SamplingParams",
    "Structured",
    "UserError",
    "__version__",
    "bench",
    "compare",
    "diff",
    "load_results",
    "plan",
    "simulate",
]

_HOMES = {
    "LLM": "expertlane.engine.llm",
    "Difference": "expertlane.api",
    "ExpertlaneError": "expertlane.errors",
    "Options": "expertlane.spec.deployment",
    "RankError": "expertlane.errors",
    "Results": "expertlane.api",
    "SamplingParams": "expertlane.spec.sampling",
    "Structured": "expertlane.spec.structured",
    "UserError": "expertlane.errors",
    "bench": "expertlane.api",
    "diff": "expertlane.api",
    "load_results": "expertlane.api",
}
_ROOMS = {"compare", "plan", "simulate"}  # packages too: each is called as its command


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    from expertlane.errors import MissingExtraError, require_extra

    names = {*globals(), *__all__}
    try:
        require_extra("engine", "LLM")
    except MissingExtraError:  # else `help(expertlane)`, which gets all names, would raise it
        names.remove("LLM")
    return sorted(names)


def _function(room: ModuleType) -> object:
    from importlib import import_module

    return getattr(import_module("expertlane.api"), room.__name__.rpartition(".")[2])


class _CallableRoom(ModuleType):
    """A package that is called as the function of the same name in `api`."""

    def __call__(self, *arguments, **options):  # type: ignore[no-untyped-def]
        return _function(self)(*arguments, **options)  # type: ignore[operator]

    __signature__ = property(lambda self: _function(self).__signature__)  # type: ignore[attr-defined]
    __doc__ = property(lambda self: _function(self).__doc__)  # type: ignore[assignment]


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        if name in _ROOMS and isinstance(value, ModuleType):  # when it is imported
            value.__class__ = _CallableRoom
        super().__setattr__(name, value)


def _make_rooms_callable() -> None:
    from sys import modules

    modules[__name__].__class__ = _Package


_make_rooms_callable()
