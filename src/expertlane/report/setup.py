"""Cautions, assumptions and setup of a run, which every report has."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from expertlane.report.document import Column, Section, Table, text
from expertlane.report.numbers import (
    NONE,
    bytes_si,
    counted,
    figures,
    percent,
    rate_si,
    shortened,
)
from expertlane.results.hardware import Machine, below_above
from expertlane.results.record import EXPERIMENT, Conditions, DeploymentRecord, Source
from expertlane.results.results import FOREIGN_LOAD, Assumption, Results
from expertlane.spec.files import build
from expertlane.spec.workload import SLO

_NAME_COLUMNS = 36  # columns of a file's name


def cautions(results: Results) -> Iterator[str]:
    """Cautions for a reader, in sentences."""
    machine = results.machine
    num_ranks = max((each.num_ranks for each in results.select("measured")), default=0)
    if machine is not None and machine.is_oversubscribed_by(num_ranks):
        instead = ""
        if results.virtual_time is not None:
            instead = "; in virtual time each rank has its own core"
        elif results.kind == "comparison":
            instead = "; critical-path CPU time is the figure closest to one core per rank"
        yield (
            f"{num_ranks} ranks share {counted(machine.num_cores, 'core')}: wall times compare "
            f"work and waiting on this machine, not a cluster{instead}."
        )
    num_preemptions = sum(
        each.num_preemptions or 0 for record in results.deployments for each in record.serving
    )
    if num_preemptions:
        yield f"{counted(num_preemptions, 'preemption')}: the KV cache was too small for the load."
    if busy := foreign_load(results):
        yield busy
    if results.not_measured:
        yield f"Nothing was measured here: {results.not_measured}."
    yield from results.cautions


def foreign_load(results: Results) -> str:
    """Advice where other processes disturbed the run; empty where they did not."""
    share = results.foreign_cpu_share
    if share < FOREIGN_LOAD:
        return ""
    return f"Other processes used {percent(share)} of the cores: repeat it on an idle machine."


def how_judged(results: Results) -> str:
    """Error of projections of this kind, in words."""
    cluster = results.projected_for
    judged, nearest = cluster.judged, cluster.nearest
    if judged is None:
        if nearest is None:
            return "Not validated: no projection like this was compared with measurements."
        return (
            f"Not validated itself; in the nearest validated kind ({nearest.what}) measured over "
            f"projected tokens/s were {below_above(nearest.output)} (5th to 95th percentile); "
            "bounds are no narrower."
        )
    least = ""
    if nearest is not None:
        which = "that is the range shown" if nearest.is_own_kind else "bounds are no narrower"
        least = (
            f" Measured over projected tokens/s of this and similar kinds: "
            f"{below_above(nearest.output)} (5th to 95th percentile); {which}."
        )
    return (
        f"Validated: {percent(judged.median_error)} median error on "
        f"{counted(judged.num_rows, 'row')} ({judged.what}).{least}"
    )


def limits_of(results: Results) -> list[str]:
    """Limits that were asked for, such as `TPOT ≤ 20 ms`."""
    others = [str(build(SLO, each, "slos")) for each in results.question.get("slos", ())]
    return others + [
        f"{name} ≤ {1e3 * results.question[key]:g} ms"
        for name, key in (("TPOT", "max_tpot_s"), ("TTFT", "max_ttft_s"))
        if results.question.get(key) is not None
    ]


def source_of(results: Results, source: Source) -> str:
    """Where numbers are from, and the framework that corrects them: `projected, framework trt`."""
    framework = results.cluster.framework if results.cluster is not None else ""
    return f"{source}, framework {framework}" if source == "projected" and framework else source


def routing_of(conditions: Conditions) -> str:
    """The experts that tokens are taken to choose, in a few words."""
    option, _, value = conditions.routing.partition(" ")
    if option == "--routing-trace":
        return f"routing of {shortened(Path(value).name, _NAME_COLUMNS)}"
    if option != "--skew":
        return f"routing {conditions.routing}"
    if not float(value):
        return "routing uniform (assumed; the best case)"
    return f"routing skew {value} (assumed; --skew 0 is uniform)"


def assumptions(results: Results, source: Source, heading: str = "Assumptions") -> Section:
    """The assumptions behind numbers of one source."""
    rows = [each for each in results.assumptions if each.source == source]
    columns: list[Column[Assumption]] = [
        text("assumption", lambda each: each.name),
        text("value", lambda each: each.value),
    ]
    if any(each.why for each in rows):
        columns.append(text("why", lambda each: each.why))
    if any(each.change for each in rows):
        columns.append(text("change it by", lambda each: each.change))
    return Section(heading, (Table.of("", columns, rows),) if rows else ())


def setup(results: Results, heading: str) -> Section:
    """Setup that all deployments share, and the command to repeat it."""
    experiment = results.question.get("experiment", results.question)
    versions, records = results.versions, results.deployments
    rows = []
    if results.kind == "comparison" and "experiment" not in results.question:
        rows.append(("model", results.model_name))
        rows.append(("workload", _listed(experiment["workload"])))
    elif results.kind == "comparison":
        rows += [
            ("model", _listed(experiment.get("model", {}))),
            ("workload", _listed(experiment.get("workload", {}))),
            (
                "weights",
                experiment.get("checkpoint") or f"random, seed {experiment.get('seed', NONE)}",
            ),
        ]
    if results.machine is not None:
        rows += _machine(results.machine)
    if results.cluster is not None:
        cluster = results.cluster
        rows.append(
            (
                "cluster",
                f"{cluster.name}: {cluster.num_devices} × {cluster.device}, "
                f"{cluster.ranks_per_node} per node",
            )
        )
    if results.kind in ("simulation", "bench"):
        if records[0].options is not None:
            rows.append(("options", str(records[0].options)))
        rows.append(("seed", str(experiment.get("workload", {}).get("seed", NONE))))
    software = [f"expertlane {versions.expertlane}", f"Python {versions.python}"]
    if versions.torch:
        software.insert(1, f"torch {versions.torch}")
    rows += [
        ("software", ", ".join(software)),
        ("run", f"{results.command}, {results.created}"),
    ]
    compared = results.select("measured", EXPERIMENT)
    if compared and not results.is_of_servers:
        rows.append(("generated tokens", same_tokens(compared)))
    return Section(heading, (Table.facts(rows),))


def _listed(fields: dict[str, Any]) -> str:
    """The fields that say something: no None, False, 0 or empty list; 0 may be a seed."""
    return ", ".join(
        f"{name} {_said(value)}".rstrip()
        for name, value in fields.items()
        if value or (name == "seed" and value is not None)
    )


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_listed(value)})"
    if isinstance(value, list):
        return "/".join("none" if each is None else str(each) for each in value)
    return "" if value is True else str(value)


def _machine(machine: Machine) -> list[tuple[str, str]]:
    peak = machine.peak
    rows = [
        (
            "machine",
            f"{machine.cpu_name}, {counted(machine.num_cores, 'core')}, "
            f"{bytes_si(machine.memory_bytes)}, device {machine.device}, {machine.backend}",
        ),
        ("dtype", f"{machine.dtype}, kernels of {machine.kernels}"),
        (
            "ranks",
            f"{machine.num_ranks}, {figures(machine.ranks_per_core)} per core, "
            f"{machine.ranks_per_node} per node for the traffic counters",
        ),
    ]
    if peak is not None:
        measured = (
            f"{rate_si(peak.gemm_flops_per_s, 'FLOP')} ({peak.dtype}), "
            f"{rate_si(peak.read_bytes_per_s, 'B')} read, on {counted(peak.num_units, peak.unit)}"
        )
        rows.insert(1, ("measured peak", measured))
    return rows


def same_tokens(records: Sequence[DeploymentRecord]) -> str:
    """Which deployments generated the same tokens, and which of the others round numbers."""
    first = records[0]
    others = [
        (f"#{number}", _rounded(each))
        for number, each in enumerate(records, start=1)
        if each.tokens_sha256 != first.tokens_sha256
    ]
    num_all = len(records)
    if not others:
        return (
            f"identical in all {num_all} deployments (SHA-256 {(first.tokens_sha256 or '')[:12]})"
        )
    equal = f"identical to the first deployment's in {num_all - len(others)} of {num_all}"
    if rounds := _rounded(first):
        names = ", ".join(name for name, _ in others)
        return f"{equal}; others with {names}: the first rounds {rounds}"
    names_of: dict[str, list[str]] = {}
    for name, rounds in sorted(others, key=lambda each: not each[1]):
        names_of.setdefault(rounds or "nothing", []).append(name)
    groups = (
        f"with {', '.join(names)} ({rounds} {'is' if rounds == 'nothing' else 'are'} rounded)"
        for rounds, names in names_of.items()
    )
    return f"{equal}; others {' and '.join(groups)}"


def _rounded(record: DeploymentRecord) -> str:
    """Types that are rounded, `weights, keys and values`; empty for none."""
    sent = any(step.traffic and step.traffic.payload_error for step in record.steps)
    rounded = record.options.rounded if record.options else ()
    return ", ".join((*rounded, *(("hidden states",) if sent else ())))
