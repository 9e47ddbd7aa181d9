"""Completions that a shell offers for arguments and options; all must be quick."""

from collections.abc import Iterable

import typer


def models(incomplete: str) -> list[str]:
    """Presets; the shell completes folders itself."""
    from expertlane.spec.model import PRESETS

    return _beginning(incomplete, PRESETS)


def experiments(incomplete: str) -> list[str]:
    """The experiments that come with expertlane."""
    from expertlane.spec.experiment import shipped_experiments

    return _beginning(incomplete, shipped_experiments())


def profiles(incomplete: str) -> list[str]:
    """The profiles that come with expertlane."""
    from expertlane.cost.laws import shipped_profiles

    return _beginning(incomplete, shipped_profiles())


def clusters(incomplete: str) -> list[str]:
    """Profiles with usual numbers of devices."""
    from expertlane.cost.laws import shipped_profiles

    sizes = (8, 16, 32, 64)
    return _beginning(
        incomplete, (f"{name}x{size}" for name in shipped_profiles() for size in sizes)
    )


def layouts(ctx: typer.Context, incomplete: str) -> list[str]:
    """The valid layouts of a preset on the cluster, where both are given before."""
    from expertlane.spec.model import PRESETS

    # An option without its value yet ends the parsing before arguments have their names.
    model = ctx.params.get("model") or next(iter(ctx.args), "")
    count = str(ctx.params.get("cluster")).rpartition("x")[2]
    if model not in PRESETS or not count.isdigit():
        return []
    from expertlane.planner.candidates import MOST_DEVICES, valid_layouts

    if not 0 < int(count) <= MOST_DEVICES:
        return []
    return _beginning(incomplete, map(str, valid_layouts(PRESETS[model], int(count))))


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
