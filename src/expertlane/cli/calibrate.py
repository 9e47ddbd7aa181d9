"""`expertlane calibrate`: measure this machine, and write what the cluster model needs of it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.options import CPU_ISA, TIMEOUT, dtype_option
from expertlane.cli.output import AnswerOptions
from expertlane.errors import UserError
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.files import strict_json
from expertlane.spec.names import CpuIsa, Dtype

if TYPE_CHECKING:
    from expertlane.calibrate.run import Calibration
    from expertlane.cost.laws.profile import Profile

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class _Options:
    panel: ClassVar = Panel.DEPLOYMENT
    name: str = typer.Argument("this-machine", metavar="NAME", help="Name of the profile.")
    ranks: int | None = typer.Option(
        None, show_default="as many as GPUs, else cores", help="Ranks that measure, all at once."
    )
    dtype: Dtype | None = dtype_option("the machine's choice")
    within: float = typer.Option(
        240.0,
        metavar="SECONDS",
        help="Time to measure in; a short one gives fewer sizes and rounds. One round is always "
        "made, however long it takes.",
    )
    timeout_s: float = TIMEOUT
    cpu_isa: CpuIsa | None = CPU_ISA


@dataclass(frozen=True, kw_only=True)
class _Output(AnswerOptions):
    changes: ClassVar = {"out": {"show_default": "., for NAME.toml"}}


@takes_groups
def calibrate(own: _Options, output_options: _Output) -> None:
    """Measure this machine, to plan and simulate for it.

    Times matrix products, experts, attention, small operations, collectives over 2, 4, 8 … ranks,
    and whole steps of a small model, in rounds; takes about three minutes on two cores that nothing
    else uses, and no more than four unless --within says so. All ranks measure at once, since they
    share memory; where there are enough cores each has its own. What other programs disturb is
    measured again, for at most a quarter of the time. The profile says what share stayed disturbed.

    The profile is a TOML file, in the format of those that come with expertlane. It holds for
    one number of ranks and one dtype: calibrate again for others, and for other hardware.

    \b
    Examples:
      expertlane calibrate
          all cores or GPUs; writes this-machine.toml
      expertlane calibrate laptop --dtype bfloat16 --out profiles
          in the type that models run in; writes profiles/laptop.toml
      expertlane calibrate --ranks 1 --json | jq '.memory_bytes_per_s'
          one rank alone; for other programs
    """
    path = _checked(own, output_options.out or Path())
    from expertlane.cost.laws.profile import write_profile
    from expertlane.report.calibration import Rounds, report_of

    calibration, profile = _measure(own)
    write_profile(profile, path)
    created = output.now()
    quiet = calibration.quiet
    rounds = Rounds(
        dtype=calibration.machine.dtype,
        num_rounds=len(calibration.measured.operations),
        most_rounds=calibration.grid.num_rounds,
        num_kept=quiet.num_kept,
        num_disturbed=quiet.num_disturbed,
        foreign_cpu_share=quiet.foreign_cpu_share,
        again_s=quiet.again_s,
    )
    report = report_of(profile, rounds, path, output.command_line(), created)

    def as_json() -> str:
        return strict_json(_summary(profile, calibration, path)) + "\n"

    output.print_report(report, output_options, path, as_json)
    output.print_written([path])


def _checked(own: _Options, folder: Path) -> Path:
    """The file to write, after all checks that need no measuring."""
    from expertlane.engine.ranks.torchrun import is_under_torchrun

    if not _NAME.fullmatch(own.name):
        raise UserError(
            f"NAME is {own.name!r}; it must be up to 64 letters, digits, dots, dashes and "
            "underscores"
        )
    if is_under_torchrun():
        raise UserError("calibrate measures one machine and starts its own ranks; no torchrun")
    path = folder / f"{own.name}.toml"
    output.check_file(path)
    return path


def _measure(own: _Options) -> "tuple[Calibration, Profile]":
    from expertlane.calibrate.run import Calibration, num_devices
    from expertlane.engine.launch import start_pool

    num_ranks = own.ranks or num_devices()
    config = EngineConfig(timeout_s=own.timeout_s, dtype=own.dtype, cpu_isa=own.cpu_isa)
    pool = start_pool(config, num_ranks)
    assert pool is not None, "not under torchrun"
    with pool:
        calibration = Calibration(pool, num_ranks, within_s=own.within)
        with output.progress_on_stderr() as progress:
            calibration.run(progress)
        if calibration.took_s > own.within:
            output.print_message(
                f"expertlane: measuring took {calibration.took_s:.0f} s, longer than --within "
                f"{own.within:g}: the first round, which is always made, cannot be shorter"
            )
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
