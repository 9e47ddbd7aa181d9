"""Results of any command: the schema of `results.json`."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import numpy as np

from expertlane.errors import UserError
from expertlane.results.estimate import Estimate
from expertlane.results.hardware import Cluster, Machine, VirtualTime
from expertlane.results.record import (
    BEST,
    DECODE_POOL,
    EXPERIMENT,
    PREFILL_POOL,
    TWO_POOLS,
    Conditions,
    DeploymentRecord,
    PairRecord,
    PoolRole,
    RatioRecord,
    Source,
    TieBreak,
)
from expertlane.results.serving_record import ServingRecord, is_served
from expertlane.spec.files import strict_json
from expertlane.spec.names import EngineName
from expertlane.spec.ranges import Strict, Valid
from expertlane.version import __version__

SCHEMA_VERSION = 9
FOREIGN_LOAD = 0.05  # share of the cores; less is noise
_MILLION, _S_PER_HOUR = 1e6, 3600

Kind = Literal["comparison", "simulation", "plan", "bench", "verify", "drill"]


def _is_moment(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


_Moment = Annotated[str, Valid(_is_moment, "a date and time in ISO 8601")]
NoPools = Literal["no split", "too large", "over limits", "not simulated", "not run"]
ServeRole = Literal[PoolRole, "router"]


@dataclass(frozen=True)
class Versions(Strict):
    """Versions of the software that ran; torch is None where nothing was measured."""

    expertlane: str
    python: str
    numpy: str
    torch: str | None = None


@dataclass(frozen=True)
class Assumption(Strict):
    """An assumption behind numbers.

    Attributes:
        source: source of the numbers that rest on it.
        change: option that changes it; empty for none.
    """

    name: str
    value: str
    why: str = ""
    change: str = ""
    source: Source = "projected"


@dataclass(frozen=True)
class ServeCommand(Strict):
    """Commands that start the servers of a pool, or the router before them.

    Attributes:
        system: the engine, as its makers write it.
        lines: to start one server, one for each of its nodes in order; empty where there is no
            command.
        note: differences from the deployment or between lines, what is left to do; may be empty.
        num_servers: servers that are started alike.
        checked: the version whose parser takes the command's options; None for unverified.
    """

    system: str
    lines: tuple[str, ...]
    note: str
    role: ServeRole = "both"
    num_servers: int = 1
    checked: str | None = None

    @property
    def label(self) -> str:
        """The system, what of it is started, and how far the command can be relied on."""
        of = {"both": "", "router": " router"}.get(self.role, f" {self.role} pool")
        num = f", start {self.num_servers}" if self.num_servers > 1 else ""
        if not self.lines:
            return f"{self.system}{of}"
        trust = f"options of {self.checked}" if self.checked else "unverified"
        return f"{self.system}{of}{num} ({trust})"


@dataclass(frozen=True)
class EngineBest(Strict):
    """The best deployment of an engine.

    Attributes:
        engine: name that `--engine` takes.
        title: its name as its makers write it.
        version: version whose source, or documentation, its limits are from.
        aggregated: None where it runs none that meets the limits.
        pools: disaggregated: both together, that for prefill and that for decode; empty where they
            are not better than `aggregated`.
        why: what it does instead of the plan's choice; empty where it runs that.
        source: file or page behind `why`.
        commands: commands that start the better of the two.
    """

    engine: EngineName
    title: str
    version: str
    aggregated: DeploymentRecord | None
    pools: tuple[DeploymentRecord, ...] = ()
    why: str = ""
    source: str = ""
    commands: tuple[ServeCommand, ...] = ()

    @property
    def best(self) -> DeploymentRecord | None:
        """The pools together, or the aggregated."""
        return self.pools[0] if self.pools else self.aggregated


Varied = Literal["skew", "sequences"]


@dataclass(frozen=True)
class Level(Strict):
    """Break-even point of #1 and its rival in one variable.

    Attributes:
        asked: value that the plan was made for.
        at: value nearest to `asked` at which both have equal tokens/s; None without one.
        end: value tried at which the rival does best, beyond `at` if there is one.
        over_at_end: tokens/s of the rival over those of #1 at `end`; None where #1 misses the
            limits there.
        tried: the least and the largest value.
    """

    varied: Varied
    asked: float
    at: float | None
    end: float
    over_at_end: float | None
    tried: tuple[float, float]


@dataclass(frozen=True)
class BreakEven(Strict):
    """Break-even points of #1 and the best of another kind.

    Attributes:
        rival: name of the rival.
        levels: break-even points, one per variable.
        unsure: law or routing whose error makes most of the ratio's uncertainty; empty without any.
        unsure_share: its share of the squared uncertainty.
    """

    rival: str
    levels: tuple[Level, ...]
    unsure: str = ""
    unsure_share: float = 0.0


@dataclass(frozen=True)
class ServedLoad(Strict):
    """The part of a load that a plan on some devices serves.

    Attributes:
        num_served: requests at once within the limits; 0 where none keeps them, or nothing fits.
        requests_per_s: of an open load, the most within the limits; None of a closed one.
        is_served: true if an open load is served at its rate within the limits, or the load is
            closed.
    """

    num_devices: int
    num_served: int
    requests_per_s: float | None = None
    is_served: bool = True


@dataclass(frozen=True)
class PlanSummary(Strict):
    """Counts and findings of a search; the deployments that it found are records.

    Attributes:
        top_k: experts per token of the model that was planned for.
        num_candidates, num_too_large, num_over_limits: deployments of one pool.
        num_pool_candidates: disaggregated deployments tried.
        num_simulated, num_open: of one pool, simulated request by request; and not simulated,
            though they may have more tokens a second than the best.
        num_tied: number of deployments, the best first, that tie for most tokens/s.
        tie_spread: gap of the least of them to the most tokens/s; a share.
        tie_break: criterion that decided among them; None where one was alone.
        break_even: break-even points of the best and its rival; None without a rival.
        no_two_pools: why there are none: the devices cannot be split for the model, nothing fits,
            none keeps the limits, or the engine runs none.
        engine: the engine asked for; None for any.
        engines: the best of each, or of the one asked for.
        experiment: the file for `expertlane compare` that was written; None if none was.
        scripts: the folder with scripts that start the engines' best; None if none were written.
        fewer_devices: the next smaller cluster, where the smallest that serves all was asked for;
            `num_devices` is 0 where there is none.
    """

    top_k: int
    num_candidates: int
    num_too_large: int
    num_over_limits: int = 0
    num_pool_candidates: int = 0
    num_simulated: int = 0
    num_open: int = 0
    num_tied: int = 1
    tie_spread: float = 0.0
    tie_break: TieBreak | None = None
    break_even: BreakEven | None = None
    no_two_pools: NoPools | None = None
    engine: EngineName | None = None
    engines: tuple[EngineBest, ...] = ()
    experiment: str | None = None
    scripts: str | None = None
    fewer_devices: ServedLoad | None = None


@dataclass(frozen=True)
class WorkloadVerdict(Strict):
    """Comparison of projected deployments on the whole workload.

    Attributes:
        name: the deployment that is compared (`choose_compared`).
        over: its output tokens/s over those of each other one by name, the best of them first, with
            the bounds that are left when shared errors have cancelled.
        causes_s: by cause, seconds of the whole system per output token, less those of the best of
            the others.
    """

    name: str
    over: dict[str, Estimate] = field(default_factory=dict)
    causes_s: dict[str, float] = field(default_factory=dict)

    @property
    def compared(self) -> tuple[str, ...]:
        """Names of all compared, the first sentence's deployment first."""
        return (self.name, *self.over) if self.over else ()


@dataclass(frozen=True, repr=False)
class Results(Strict):
    """All content of one results file.

    Attributes:
        command: command line that repeats it.
        created: ISO 8601, UTC.
        question: what was asked for. comparison: `experiment` (model, workload, seed, cluster and
            deployments), `skew` of its projection, `projection` as `ProjectionSetup` has it, limits
            and `load` as a plan's where there are any; simulation: `model`, `workload`, `serving`;
            plan: `model`, `workload` (means), `load` (lengths and a rate, as
            asked for), `projection`, `max_tpot_s`, `max_ttft_s`, and `slos` of other statistics;
            bench: `model`, `workload`, `ranks_per_node`, or `urls`, `endpoint` and `rounds` of
            servers; verify: `model`, `url`, `reference`, `seed`, `num_prompts` and `budget_s`;
            drill: `model`, `workload`, `url`, `batch` or `rate`, and `fault`. A comparison of
            servers has `servers`, their number, and `workload` as a bench; without an experiment
            the name of the `model` in place of `experiment`.
            The workload of a simulation or bench has what is the same for all loads: `prompt_len`,
            `output_len`, `seed`, and `requests`, the file they are from; `prefix_len` and
            `num_prefixes` where prompts share a prefix. `price`: dollars per device-hour, where one
            was given.
        machine: the machine that ran; None where nothing was measured.
        cluster: the modelled cluster; None where nothing was modelled.
        virtual_time: None where nothing is in virtual time.
        pairs: the deployment that a comparison's first sentence is about with each that it is
            compared with, on each clock; the best of the others before the first.
        ratios: of two servers that were measured in turns, the first one's numbers over the
            second one's.
        cautions: cautions for a reader, in sentences.
        plans: a plan's one, or of a comparison's projection one for each top-k.
        context: of a comparison's projection the one that is spoken of: the longest at which all
            sequences fit everywhere, else the shortest.
        workload: verdict of a comparison's projection, usual conditions; None where nothing fits.
        not_measured: why a comparison was projected alone.
        foreign_cpu_share: share of the host's cores that other processes used meanwhile.

    Raises:
        UserError: no deployment, a measured one without a machine, a projected one without a
            cluster, or one measured deployment of a comparison twice.
    """

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    kind: Kind
    command: str
    created: _Moment
    versions: Versions
    question: dict[str, Any]
    deployments: tuple[DeploymentRecord, ...]
    machine: Machine | None = None
    cluster: Cluster | None = None
    virtual_time: VirtualTime | None = None
    pairs: tuple[PairRecord, ...] = ()
    ratios: tuple[RatioRecord, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    cautions: tuple[str, ...] = ()
    plans: tuple[PlanSummary, ...] = ()
    context: int | None = None
    workload: WorkloadVerdict | None = None
    not_measured: str | None = None
    foreign_cpu_share: float = 0.0

    def __post_init__(self) -> None:
        if not self.deployments:
            raise UserError("results without a deployment")
        on_ranks = [each for each in self.select("measured") if each.server is None]
        if self.machine is None and any(each.layout for each in on_ranks):
            raise UserError("results that were measured, without the machine")
        if self.cluster is None and self.select("projected"):
            raise UserError("results that were projected, without the cluster")
        if self.virtual_time is None and self.select("virtual"):
            raise UserError("results in virtual time, without its links")
        for source in ("measured", "virtual"):
            names = [each.name for each in self.select(source)]
            if self.kind == "comparison" and len(set(names)) < len(names):
                raise UserError(f"results with one deployment twice: {', '.join(names)}")

    @classmethod
    def now(
        cls,
        kind: Kind,
        command: str,
        question: dict[str, Any],
        deployments: Sequence[DeploymentRecord],
        *,
        torch_version: str | None = None,
        **parts: Any,
    ) -> "Results":
        """Results of a command that has just ended; `question` may hold dataclasses."""
        plain = {key: _plain(value) for key, value in question.items()}
        return cls(
            kind=kind,
            command=command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=Versions(
                __version__, platform.python_version(), np.__version__, torch_version
            ),
            question=json.loads(strict_json(plain)),  # lists, as they are read back
            deployments=tuple(deployments),
            **parts,
        )

    def __repr__(self) -> str:
        """A line with kind, size and time; the whole would be megabytes."""
        cluster = "" if self.cluster is None else self.cluster.name
        of = ", ".join(filter(None, [self.model_name, cluster]))
        num = len(self.deployments)
        return (
            f"<Results of a {self.kind}: {of}; {num} record{'' if num == 1 else 's'}, "
            f"{self.created}>"
        )

    @property
    def model_name(self) -> str:
        """The name of the model that was asked about; empty where the question has none."""
        model = self.question.get("model", self.question.get("experiment", {}).get("model"))
        return str(model.get("name", "") if isinstance(model, dict) else model or "")

    def beside(self, projected: "Results") -> "Results":
        """These measurements with a projection of the same experiment."""
        return replace(
            self,
            question=projected.question | self.question,
            deployments=self.deployments + projected.deployments,
            cluster=projected.cluster,
            assumptions=self.assumptions + projected.assumptions,
            plans=projected.plans,
            context=projected.context,
            workload=projected.workload,
        )

    def changed(self, change: Callable[[DeploymentRecord], DeploymentRecord]) -> "Results":
        """The results with every record changed, those of a plan's engines too."""

        def of_engine(best: EngineBest) -> EngineBest:
            aggregated = None if best.aggregated is None else change(best.aggregated)
            return replace(best, aggregated=aggregated, pools=tuple(map(change, best.pools)))

        plans = [replace(each, engines=tuple(map(of_engine, each.engines))) for each in self.plans]
        deployments = tuple(map(change, self.deployments))
        return replace(self, deployments=deployments, plans=tuple(plans))

    def select(
        self, source: Source, role: str | None = None, conditions: Conditions | None = None
    ) -> tuple[DeploymentRecord, ...]:
        """The records of one source that have a role, under the same conditions if given."""
        return tuple(
            each
            for each in self.deployments
            if each.source == source
            and (role is None or role in each.roles)
            and (conditions is None or each.conditions == conditions)
        )

    @property
    def is_of_servers(self) -> bool:
        """True if deployments were measured from outside, as servers."""
        return any(each.server is not None for each in self.deployments)

    @property
    def faster_pools(self) -> DeploymentRecord | None:
        """A plan's disaggregated pools, where they are faster than #1 beyond their errors.

        For an open load also where only they serve it at its rate.
        """
        for pools in self.select("projected", TWO_POOLS):
            best = self.select("projected", BEST)[0]
            of_pools, of_best = (is_served(each.serving[-1]) for each in (pools, best))
            if of_pools != of_best:
                return pools if of_pools else None
            if pools.over_best is not None and pools.over_best.bounds[0] > 1:
                return pools
        return None

    def pairs_of(self, source: Source) -> tuple[PairRecord, ...]:
        """Pairs in numbers of one source."""
        return tuple(each for each in self.pairs if each.source == source)

    @property
    def measured_on(self) -> Machine:
        """`machine`, of results that were measured."""
        assert self.machine is not None, "checked when they were made"
        return self.machine

    @property
    def projected_for(self) -> Cluster:
        """`cluster`, of results that were projected."""
        assert self.cluster is not None, "checked when they were made"
        return self.cluster

    @property
    def conditions(self) -> tuple[Conditions, ...]:
        """Conditions of an experiment's projected deployments, each once, the usual ones first."""
        found = (each.conditions for each in self.select("projected", EXPERIMENT))
        return tuple(dict.fromkeys(each for each in found if each is not None))


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def with_costs(results: Results, usd_per_hour: float) -> Results:
    """The results with each load's dollars for a million tokens.

    Devices that a deployment leaves idle are not counted. On CPUs, and of a server seen from
    outside, the price is of all that ran.

    Args:
        usd_per_hour: price of one device; kept as the question's `price`.
    """

    def priced(record: DeploymentRecord) -> DeploymentRecord:
        if record.roles and {*record.roles} <= {PREFILL_POOL, DECODE_POOL}:
            return record  # one of two pools: a token's price is that of both
        is_cpu = results.machine is not None and results.machine.device == "cpu"
        usd_per_s = usd_per_hour / _S_PER_HOUR * (1 if is_cpu else record.num_ranks or 1)

        def cost(tps: Estimate | None) -> Estimate | None:
            return None if tps is None else _MILLION * usd_per_s / tps

        serving = tuple(
            replace(
                each,
                usd_per_million_output=cost(each.output_tps),
                usd_per_million_total=cost(_total_tps(each, results)),
            )
            for each in record.serving
        )
        return replace(record, serving=serving)

    return replace(results.changed(priced), question=results.question | {"price": usd_per_hour})


def _total_tps(serving: ServingRecord, results: Results) -> Estimate | None:
    """Total tokens/s; of a plan, from its output by the ratio of lengths, which are all alike."""
    if serving.total_tps is not None or results.kind != "plan":
        return serving.total_tps
    workload: dict[str, int] = results.question["workload"]
    return serving.output_tps * (1 + workload["prompt_len"] / workload["output_len"])
