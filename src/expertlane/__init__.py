"""Run, compare and plan expert-parallel inference of Mixture-of-Experts models.

`LLM`, its `Options` and `SamplingParams` are the face to Python; they are imported when they are
first asked for.
"""

from expertlane.version import __version__

TYPE_CHECKING = False  # as typing's, which takes longer to import than all else here
if TYPE_CHECKING:
    from expertlane.engine.llm import LLM
    from expertlane.spec.deployment import Options
    from expertlane.spec.sampling import SamplingParams

__all__ = ["LLM", "Options", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "expertlane.engine.llm",
    "Options": "expertlane.spec.deployment",
    "SamplingParams": "expertlane.spec.sampling",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
