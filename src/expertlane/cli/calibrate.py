"""`expertlane calibrate`: measure this machine, and write what the cluster model needs of it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from expertlane.cli import output
from expertlane.cli.options import Dtype, dtype_option, takes_groups, timeout_option
from expertlane.errors import UserError
from expertlane.spec.files import strict_json
from expertlane.spec.printable import printable

if TYPE_CHECKING:
    from expertlane.calibrate.run import Calibration
    from expertlane.cost.laws.profile import Profile

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class _Options:
    name: str = typer.Argument("this-machine", metavar="NAME", help="Name of the profile.")
    ranks: int | None = typer.Option(
        None,
        metavar="N",
        help="Ranks that measure, all at once. Default: as many as there are GPUs, else cores.",
    )
    dtype: Dtype | None = dtype_option("the machine's choice")
    out: Path | None = typer.Option(
        None, metavar="FILE", help="The profile to write (.toml). Default: NAME.toml."
    )
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables.")
    timeout_s: float = timeout_option()


@takes_groups
def calibrate(own: _Options) -> None:
    """Measure this machine, to plan and simulate for it.

    Times matrix products, experts, attention, small operations, collectives over 2, 4, 8 … ranks,
    and whole steps of a small model, in rounds; takes up to three minutes on two cores that nothing
    else uses. All ranks measure at once, since they share memory; where there are enough cores
    each has its own. What other programs disturb is measured again, within a minute in all, and no
    round begins that would end after four minutes, save the first. The profile says what share was
    disturbed all the same.

    The profile is a TOML file, in the format of those that come with expertlane. It holds for
    one number of ranks and one dtype: calibrate again for others, and for other hardware.

    \b
    Examples:
      expertlane calibrate
          all cores or GPUs; writes this-machine.toml
      expertlane calibrate laptop --dtype bfloat16 --out profiles/laptop.toml
          in the type that models run in
      expertlane calibrate --ranks 1 --json | jq '.memory_bytes_per_s'
          one rank alone; for other programs
    """
    path = _checked(own)
    from expertlane.cost.laws.profile_file import write_profile

    calibration, profile = _measure(own)
    write_profile(profile, path)
    if own.as_json:
        output.print_json(strict_json(_summary(profile, calibration, path)) + "\n")
    else:
        _show(profile, calibration)
    output.print_message(f"written: {path}")


def _checked(own: _Options) -> Path:
    """Where to write, once all that can be known before measuring is known to be right."""
    from expertlane.engine.torchrun import is_under_torchrun

    if not _NAME.fullmatch(own.name):
        raise UserError(
            f"NAME is {own.name!r}; it must be up to 64 letters, digits, dots, dashes and "
            "underscores"
        )
    path = Path(f"{own.name}.toml") if own.out is None else own.out
    if path.suffix != ".toml":
        raise UserError(f"--out is {path}; a profile's file must end in .toml")
    if is_under_torchrun():
        raise UserError("calibrate measures one machine and starts its own ranks; no torchrun")
    output.check_file("--out", path, "machine.toml")
    return path


def _measure(own: _Options) -> "tuple[Calibration, Profile]":
    from expertlane.calibrate.run import Calibration, num_devices
    from expertlane.engine.launch import start_pool

    num_ranks = own.ranks or num_devices()
    pool = start_pool(num_ranks, timeout_s=own.timeout_s, dtype=own.dtype)
    assert pool is not None, "not under torchrun"
    with pool:
        calibration = Calibration(pool, num_ranks)
        with output.progress_on_stderr() as progress:
            calibration.run(progress)
        return calibration, calibration.profile(own.name)


def _summary(profile: "Profile", calibration: "Calibration", path: Path) -> dict[str, object]:
    device = profile.device
    return {
        "name": profile.name,
        "file": str(path),
        "device": device.name,
        "num_ranks": profile.ranks_per_node,
        "dtype": calibration.machine.dtype,
        "cores": calibration.cores,
        "memory_bytes": device.memory_bytes,
        "memory_bytes_per_s": device.memory_bytes_per_s,
        "flops_per_s": dict(device.flops_per_s),
        "link_bytes_per_s": max((link.bytes_per_s for link in profile.links.values()), default=0),
        "surfaces": {
            name: {"low": surface.low, "high": surface.high, "origin": surface.origin}
            for name, surface in profile.surfaces.items()
        },
        "terms": {
            name: {"value": term.value, "low": term.low, "high": term.high}
            for name, term in profile.terms.items()
        },
        "num_rounds": len(calibration.measured.operations),
        "disturbed_share": calibration.quiet.disturbed_share,
        "measured_again_s": calibration.quiet.again_s,
        "foreign_cpu_share": calibration.quiet.foreign_cpu_share,
    }


def _show(profile: "Profile", calibration: "Calibration") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console, device = output.stdout_console(), profile.device
    console.print(Text(f"expertlane calibrate: {profile.name}", style="bold"))
    name = printable(device.name)
    console.print(f"{profile.ranks_per_node} × {name}, {calibration.machine.dtype}")
    console.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("per rank", "value", "low", "high"):
        table.add_column(heading, justify="left" if heading == "per rank" else "right")
    for dtype, rate in device.flops_per_s.items():
        table.add_row(f"matrix product, {dtype}", f"{rate / 1e9:,.1f} GFLOP/s", "", "")
    table.add_row("memory bandwidth", f"{device.memory_bytes_per_s / 1e9:,.1f} GB/s", "", "")
    for link in list(profile.links.values())[:1]:
        table.add_row("rank to rank", f"{link.bytes_per_s / 1e9:,.2f} GB/s", "", "")
    for label, name in (
        ("scheduler overhead", "driver_s"),
        ("overhead per operation", "overhead_s"),
        ("overhead per transfer", "overhead_s.transfer"),
        ("shortest all-to-all", "floor_s.all_to_all.all_links"),
        ("kernel launch", "launch_s"),
    ):
        term = profile.terms.get(name)
        if term is not None:
            values = (f"{1e6 * value:,.0f} µs" for value in (term.value, term.low, term.high))
            table.add_row(label, *values)
    console.print(table)
    console.print()
    laws = ", ".join(sorted({name.partition(".")[0] for name in profile.surfaces}))
    console.print(f"Laws of time: {laws}.", highlight=False)
    quiet, num_rounds = calibration.quiet, len(calibration.measured.operations)
    if num_rounds < calibration.grid.num_rounds:
        console.print(
            f"{num_rounds} of {calibration.grid.num_rounds} rounds: they took too long for more, "
            "so bounds say little of the spread."
        )
    if quiet.num_disturbed:
        console.print(
            f"Disturbed: {quiet.num_disturbed} of {quiet.num_kept} measurements "
            f"({quiet.disturbed_share:.0%}), although {quiet.again_s:.0f} s went into measuring "
            f"again. Other programs took up to {quiet.foreign_cpu_share:.0%} of the cores; "
            "calibrate again on a quiet machine.",
            highlight=False,
        )
