"""Templates of scripts that start servers, one file for each launcher; Jinja renders them."""

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment


def rendered(
    name: str, filters: Mapping[str, Callable[[Any], Any]], values: Mapping[str, Any]
) -> str:
    """The text of a template of `launchers/`; a value that it lacks is an error.

    Args:
        filters: by name: what quotes a value for the script.
    """
    environment = SandboxedEnvironment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # `${#words[@]}` is a number of words in Bash
        comment_end_string="##}",
    )
    environment.filters.update(filters)
    text = files("expertlane.planner").joinpath("launchers", name).read_text("utf-8")
    return environment.from_string(text).render(values)
