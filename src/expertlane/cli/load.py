"""The options of a load: what plan, simulate, bench and compare serve, within what limits."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from expertlane.cli.help import Panel
from expertlane.cli.options import parse_list, seed_option
from expertlane.errors import UserError, naming
from expertlane.spec.ranges import RANGES, shown

if TYPE_CHECKING:
    from expertlane.spec.model import ModelConfig
    from expertlane.spec.workload import SLO, LengthRange, Load, RecordedRequest

_OPEN_SIZE = 100  # requests of an open loop


@dataclass(frozen=True)
class Defaults:
    """A command's default load.

    Attributes:
        batch: default of `--batch`.
        waves: requests per place of a batch, so that finished ones are replaced.
        least: requests at least.
        burst_from: batches of this size and more get one wave, which takes long enough.
    """

    batch: str
    prompt_len: int
    output_len: int
    waves: int
    least: int = 1
    burst_from: int | None = None

    def num_requests(self, batch: int) -> int:
        """Requests of a closed loop with this batch."""
        is_burst = self.burst_from is not None and batch >= self.burst_from
        wanted = max(self.least, batch if is_burst else self.waves * batch)
        return min(wanted, int(RANGES["num_requests"].high))

    @property
    def of_closed(self) -> str:
        """The default number of requests, in words."""
        least = f", at least {self.least}" if self.least > 1 else ""
        burst = "" if self.burst_from is None else f", from {self.burst_from} on the batch"
        return f"{self.waves} × the batch{least}{burst}"

    def changes(self, **others: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """What help says of the options of a load: these defaults, and what else differs."""
        requests = f"{self.of_closed}; with --rate {_OPEN_SIZE}; of --requests all"
        shown = {
            "batch": self.batch,
            "num_requests": requests,
            "prompt_len": str(self.prompt_len),
            "output_len": str(self.output_len),
        }
        of_defaults = {name: {"show_default": text} for name, text in shown.items()}
        return of_defaults | {
            name: of_defaults.get(name, {}) | more for name, more in others.items()
        }


MODELLED = Defaults("256", 1024, 256, waves=4, least=32)  # plan and simulate: a cluster
MEASURED = Defaults("1,8,32", 32, 32, waves=2, burst_from=64)  # bench: perhaps a laptop
SERVED = Defaults("32", 1024, 256, waves=2)  # compare: servers that somebody runs
STEADY = Defaults("8", 32, 64, waves=3, least=16)  # drill: repeated again and again
_OPEN_PROMPTS = 32  # different ones of an open loop that is repeated


_RATE_HELP = "Open loop instead of --batch: Poisson arrivals, R requests per second."
_ONE: dict[str, dict[str, Any]] = {"batch": {"metavar": "N"}, "rate": {"metavar": "R"}}
_RECORDED = (
    "Recorded requests, with their lengths and arrival times: Mooncake's JSON lines or Azure's CSV "
    "of LLM inference."
)
SLO_HELP = (
    "Latency objectives, a statistic and its limit each. For example: ttft.p95=2s,tpot.mean=20ms. "
    "Of ttft, tpot, itl or e2e the mean, median, p90, p95 or p99."
)


def slo_option(more: str, panel: Panel | None = None) -> Any:
    """Latency objectives.

    Args:
        more: further help: the command's use of them.
    """
    text = f"{SLO_HELP} {more}"
    return typer.Option(None, metavar="SLO[,SLO…]", help=text, rich_help_panel=panel)


@dataclass(frozen=True, kw_only=True)
class TrafficOptions:
    """Requests and when they come; with the defaults of bench."""

    defaults = MEASURED
    changes: ClassVar = MEASURED.changes()
    panel: ClassVar = Panel.WORKLOAD
    batch: str | None = typer.Option(None, metavar="N[,N…]", help="Closed loop: concurrency N.")
    rate: str | None = typer.Option(None, metavar="R[,R…]", help=_RATE_HELP)
    num_requests: int | None = typer.Option(
        None,
        rich_help_panel=Panel.MORE_WORKLOAD,
        help="Requests per batch size or rate. Of --requests, the first N.",
    )
    prompt_len: str | None = typer.Option(
        None, metavar="N[:N]", help="Tokens per prompt. N:N: uniform in that range."
    )
    output_len: str | None = typer.Option(
        None, metavar="N[:N]", help="Tokens per output. N:N: uniform in that range."
    )
    requests: Path | None = typer.Option(
        None,
        rich_help_panel=Panel.MORE_WORKLOAD,
        help=f"{_RECORDED} With --batch or --rate only the lengths are taken.",
    )
    prefix_len: int | None = typer.Option(
        None,
        show_default="0",
        rich_help_panel=Panel.MORE_WORKLOAD,
        help="Length of the prefix that prompts share; part of --prompt-len.",
    )
    num_prefixes: int | None = typer.Option(
        None,
        show_default="1",
        rich_help_panel=Panel.MORE_WORKLOAD,
        help="Number of different shared prefixes; each prompt has one of them.",
    )

    def loads(self) -> "list[Load]":
        """The loads, one for each batch size or rate.

        Raises:
            UserError: it is not clear what, or the file of requests cannot be read.
        """
        from expertlane.spec.workload import Load

        if self.batch is not None and self.rate is not None:
            raise UserError("--batch and --rate exclude each other; run one, then the other")
        rates = self._numbers("rate", "2,5")
        batches = self._numbers("batch", "1,8,32")
        if self.requests is not None:
            recorded = self._recorded(self.requests)
            self._check_size(batches, len(recorded))
            how = [(each, None) for each in batches] + [(None, each) for each in rates]
            return [Load.of(recorded, *each) for each in how or [(None, None)]]
        lengths = self._range("prompt_len"), self._range("output_len")
        num, shared = self.num_requests, self._shared(lengths[0])
        if rates:
            return [Load(num or _OPEN_SIZE, *lengths, rate=each, **shared) for each in rates]
        if not batches:
            usual = [int(each) for each in self.defaults.batch.split(",")]
            batches = sorted({min(each, num or each) for each in usual})
        self._check_size(batches, num)
        return [
            Load(num or self.defaults.num_requests(each), *lengths, batch=each, **shared)
            for each in batches
        ]

    def asked_of(self, load: "Load", seed: int) -> dict[str, Any]:
        """The lengths, seed and source of all loads, as results record them."""
        asked = {
            "prompt_len": str(load.prompt_len),
            "output_len": str(load.output_len),
            "seed": seed,
            "requests": None if self.requests is None else str(self.requests),
        }
        return asked | self._shared(load.prompt_len)

    def _shared(self, prompt_len: "LengthRange") -> dict[str, Any]:
        """Shared prefixes of prompts; empty where there are none."""
        if not self.prefix_len:
            if self.num_prefixes is not None and self.prefix_len is None:
                raise UserError("--num-prefixes is given, but --prefix-len is not")
            return {}
        if self.prefix_len >= prompt_len.low:
            raise UserError(
                f"--prefix-len is {self.prefix_len}, --prompt-len {prompt_len}; a prompt must be "
                "longer than its prefix"
            )
        return {"prefix_len": self.prefix_len, "num_prefixes": self.num_prefixes or 1}

    def _numbers(self, name: str, example: str) -> list[Any]:
        text = getattr(self, name)
        return [] if text is None else parse_list(f"--{name}", name, text, example)

    def _recorded(self, path: Path) -> "tuple[RecordedRequest, ...]":
        from expertlane.spec.request_file import read_requests

        for name in ("prompt_len", "output_len", "prefix_len", "num_prefixes"):
            if getattr(self, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} and --requests exclude each other; the file has lengths")
        with naming("--requests"):
            return read_requests(path, self.num_requests)

    def _check_size(self, batches: list[int], num_requests: int | None) -> None:
        if num_requests is not None and batches and num_requests < max(batches):
            what = "--num-requests is" if self.requests is None else f"{self.requests} gives"
            raise UserError(
                f"{what} {num_requests:,}, fewer than --batch {max(batches):,}; as many or more "
                "are needed"
            )

    def _range(self, name: str) -> "LengthRange":
        from expertlane.spec.workload import LengthRange

        text = getattr(self, name)
        if text is None:
            default = getattr(self.defaults, name)
            return LengthRange(default, default)
        lengths = LengthRange.parse(name, text)
        if lengths is None:
            raise UserError(
                f"--{name.replace('_', '-')} is {shown(text)}; it must be {RANGES[name]}, or two, "
                "the lower one first: 32:512"
            )
        return lengths


@dataclass(frozen=True, kw_only=True)
class ServedLoad(TrafficOptions):
    """The load of compare on running servers: one."""

    defaults = SERVED
    changes: ClassVar = SERVED.changes(**_ONE)
    panel: ClassVar = Panel.MORE_WORKLOAD
    seed: int | None = seed_option(None, "another one each time, so that nothing is cached yet")

    def load(self) -> "Load":
        """The one load.

        Raises:
            UserError: it is not clear what, or the file of requests cannot be read.
        """
        load, *more = self.loads()
        if more:
            name = "--rate" if load.batch is None else "--batch"
            raise UserError(f"{name} has several numbers; compare takes one, and bench several")
        return load


@dataclass(frozen=True, kw_only=True)
class LoadOptions(TrafficOptions):
    """The load, its latency objectives and the price of a GPU-hour.

    Attributes:
        slos: see `--slo`.
    """

    seed: int = seed_option(0)
    slo: list[str] | None = slo_option("Goodput counts requests within all limits.")
    price: float | None = typer.Option(
        None,
        metavar="DOLLARS",
        rich_help_panel=Panel.MORE_WORKLOAD,
        help="Price per GPU-hour, on CPUs of all machines per hour; gives the cost per million "
        "tokens.",
    )
    slos: "tuple[SLO, ...]" = field(init=False)

    def __post_init__(self) -> None:
        from expertlane.spec.workload import parse_slos

        object.__setattr__(self, "slos", parse_slos(self.slo or ()))

    def question(self, load: "Load") -> dict[str, Any]:
        """The lengths, seed and source of all loads, as results record them."""
        return self.asked_of(load, self.seed)


@dataclass(frozen=True, kw_only=True)
class SimulatedLoad(LoadOptions):
    """The load of simulate, with defaults for a cluster."""

    defaults = MODELLED
    changes: ClassVar = MODELLED.changes()


@dataclass(frozen=True, kw_only=True)
class DrillLoad(LoadOptions):
    """The load of drill: one, whose requests are repeated; none of a file."""

    defaults = STEADY
    changes: ClassVar = STEADY.changes(
        num_requests={
            "show_default": f"{STEADY.of_closed}; with --rate {_OPEN_PROMPTS}",
            "help": "Requests per batch size or rate. The same ones are sent again and again.",
        },
        **{name: {"hidden": True} for name in ("requests", "slo", "price")},
        **_ONE,
    )
    panel: ClassVar = Panel.MORE_WORKLOAD

    def load(self) -> "Load":
        """The load; its number of requests is that of different ones.

        Raises:
            UserError: it is none, or several, or an option is for other commands.
        """
        for name in ("requests", "slo", "price"):
            if getattr(self, name):
                raise UserError(f"--{name} is for expertlane bench; drill has no such option")
        asked = self
        if self.rate is not None:
            asked = replace(self, num_requests=self.num_requests or _OPEN_PROMPTS)
        elif self.batch is None:
            asked = replace(self, batch=STEADY.batch)
        loads = asked.loads()
        if len(loads) > 1:
            raise UserError("--batch and --rate take one number each; drill has one load")
        return loads[0]


@dataclass(frozen=True, kw_only=True)
class PlannedLoad(SimulatedLoad):
    """The load of plan: one concurrency, or one rate, in the steady state."""

    changes: ClassVar = MODELLED.changes(
        batch={"metavar": "N", "show_default": f"{MODELLED.batch}, or as many as fit"},
        rate={
            "metavar": "R",
            "help": f"{_RATE_HELP} Deployments are ranked by the most requests per second that "
            "they serve within --slo, then the best are simulated at R.",
        },
        num_requests={"hidden": True},
        requests={"help": f"{_RECORDED} Only their lengths are taken."},
        slo={
            "help": f"{SLO_HELP} Deployments that miss one are left out; those that miss one only "
            "at --rate come last."
        },
    )

    @property
    def limits(self) -> str | None:
        """`--slo` as one text; None where it is not given."""
        return ",".join(self.slo) if self.slo else None

    def lengths(self, load: "Load") -> dict[str, Any]:
        """Lengths that vary and shared prefixes, as an experiment's `[projection]` takes them."""
        if self.requests is not None:
            return {"requests": str(self.requests)}
        shared = self._shared(load.prompt_len)
        if not load.varies:
            return shared
        return {"prompt_len": str(load.prompt_len), "output_len": str(load.output_len)} | shared

    def load(self, model: "ModelConfig") -> "Load":
        """The load in its steady state; default lengths are cut to the model's positions.

        Raises:
            UserError: `--num-requests` is given, an output has one token, or the model has too few
                positions.
        """
        from expertlane.spec.workload import check_lengths

        if self.num_requests is not None:
            raise UserError(
                "--num-requests is for expertlane simulate and bench; plan takes a load without "
                "end: --batch or --rate, and --prompt-len, --output-len or --requests"
            )
        asked, num_requests = self, None
        if self.rate is None:
            asked = replace(self, batch=self.batch or self.defaults.batch)
            num_requests = int(asked._single("batch"))
        else:
            self._single("rate")
        if self.requests is None:
            cut = asked._cut(model.max_position_embeddings)
            asked = replace(cut, num_requests=num_requests)
        (load,) = asked.loads()
        if load.output_len.high == 1:
            raise UserError(
                "--output-len is 1; plan weighs prompts against decode steps, of which there are "
                "none then: give 2 or more, or use expertlane simulate"
            )
        if load.varies:
            check_lengths(load, model.max_position_embeddings)
        else:
            load.means(batch=1).check_model(model, as_options=True)
        return load.of_lengths()

    def question(self, load: "Load") -> dict[str, Any]:
        """The load as results have it; with its rate, where it has one."""
        of_rate = {} if load.rate is None else {"rate": load.rate}
        return super().question(load) | of_rate

    def _single(self, name: str) -> float:
        """The value of `--batch` or `--rate`, of which plan takes one."""
        text, allowed = getattr(self, name), RANGES[name]
        value = allowed.parse(text)
        if value is None:
            raise UserError(
                f"--{name} is {shown(text)}; for plan it must be {allowed}; simulate takes several"
            )
        return float(value)

    def _cut(self, limit: int) -> "PlannedLoad":
        """Default lengths cut to the model's positions; if both are cut, a fourth is output."""
        prompt, output = (self._range(name).high for name in ("prompt_len", "output_len"))
        if prompt + output <= limit:
            return self
        if self.output_len is None:
            room = limit // 4 if self.prompt_len is None else limit - prompt
            output = min(output, room) if room > 0 else output
        room = limit - output
        if self.prompt_len is None and room > 0:
            prompt = min(prompt, room)
        return replace(
            self,
            prompt_len=self.prompt_len or str(prompt),
            output_len=self.output_len or str(output),
        )
