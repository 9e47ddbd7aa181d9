"""Run, compare and plan expert-parallel inference of Mixture-of-Experts models.

`compare`, `plan`, `simulate`, `bench`, `drill` and `verify` are the commands of these names for
Python; `LLM` runs a model; `load_results` and `diff` read results and compare two;
`fit_corrections` corrects projections by measurements. All are imported when first asked for; their
signatures are in `__init__.pyi`.
"""

from expertlane.version import __version__

__all__ = [
    "LLM",
    "Corrections",
    "Difference",
    "EngineConfig",
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
    "drill",
    "fit_corrections",
    "load_results",
    "plan",
    "simulate",
    "verify",
]

_HOMES = {
    "LLM": "expertlane.engine.llm",
    "Corrections": "expertlane.cost.laws.corrections",
    "Difference": "expertlane.api",
    "EngineConfig": "expertlane.spec.engine_config",
    "ExpertlaneError": "expertlane.errors",
    "Options": "expertlane.spec.deployment",
    "RankError": "expertlane.errors",
    "Results": "expertlane.api",
    "SamplingParams": "expertlane.spec.sampling",
    "Structured": "expertlane.spec.sampling",
    "UserError": "expertlane.errors",
    "bench": "expertlane.api",
    "compare": "expertlane.api",
    "diff": "expertlane.api",
    "drill": "expertlane.api",
    "fit_corrections": "expertlane.api",
    "load_results": "expertlane.api",
    "plan": "expertlane.api",
    "simulate": "expertlane.api",
    "verify": "expertlane.api",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

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
