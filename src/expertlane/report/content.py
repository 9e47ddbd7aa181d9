"""A report's sections, made from results alone; both renderers print exactly these."""

from typing import Any

from expertlane.report.breakdown import bottlenecks, work_and_traffic
from expertlane.report.comparison import Comparison, Gain, Row, compare
from expertlane.report.document import Section, Table, number, text
from expertlane.report.goals import experts_per_rank, goals, part_of_expert
from expertlane.report.numbers import (
    NONE,
    bytes_si,
    counted,
    figures,
    milliseconds,
    rate_si,
    signed,
    span,
    times,
)
from expertlane.report.paper import paper_sections
from expertlane.report.projected import projected_sections
from expertlane.report.rebalance import rebalancing
from expertlane.report.rounding import same_tokens
from expertlane.report.traffic import details, hot_spots
from expertlane.report.verdict import foreign_load, oversubscription, verdict
from expertlane.results.schema import Machine, Results


def title(results: Results) -> str:
    """The report's heading."""
    experiment = results.experiment
    name = experiment.get("name", "comparison")
    top_k = experiment.get("model", {}).get("num_experts_per_tok")
    return f"expertlane: {name}" + (f", top-{top_k}" if top_k else "")


def sections(results: Results, *, traffic: bool = False) -> tuple[Section, ...]:
    """Everything below the heading, in order; with `traffic`, each deployment's in detail."""
    projected = projected_sections(results)
    machine = results.machine
    if machine is None:  # nothing was measured
        return (*projected, _controlled(results))
    comparison = compare(results)
    moved = rebalancing(results.deployments)
    notes = filter(None, (oversubscription(machine), foreign_load(results)))
    return (
        Section("Verdict", (*verdict(comparison, machine), *notes), leads=True),
        _deployments(comparison, results.deployments[0].source),
        _gains(comparison),
        bottlenecks(comparison),
        work_and_traffic(comparison),
        hot_spots(comparison),
        *([] if moved is None else [moved]),
        *(details(results, comparison, machine) if traffic else ()),
        *goals(results, comparison, machine),
        *projected,
        _assumptions(results),
        _controlled(results),
        *paper_sections(results),
    )


def _deployments(comparison: Comparison, source: str) -> Section:
    return Section(
        f"Deployments ({source})",
        (
            Table(
                "",
                (
                    text("#"),
                    text("deployment"),
                    text("layout"),
                    number("ranks"),
                    text("each rank holds, weights"),
                ),
                tuple(
                    (
                        str(row.number),
                        row.deployment.name,
                        str(row.deployment.layout.layout),
                        str(row.deployment.num_ranks),
                        _holds(row),
                    )
                    for row in comparison.rows
                ),
            ),
            Table(
                "",
                (
                    text("#"),
                    text("deployment"),
                    number("prefill TPS"),
                    number("TTFT ms"),
                    number("decode TPS"),
                    number("runs"),
                    number("TPOT ms"),
                    number("p95"),
                    number("× first"),
                    number("× best base"),
                ),
                tuple(_speed(row) for row in comparison.rows),
            ),
            f"Factors are of {comparison.phase} TPS, a mean. Runs: the slowest and the fastest "
            "repetition; what is closer together than that is not told apart. TTFT and TPOT are "
            "medians. × best base: against the best baseline.",
            *(
                f"#{row.number} dispatches by {table}: tokens of a rank in a micro-batch, timed at "
                "its start."
                for row in comparison.rows
                if (table := row.deployment.dispatch_table) is not None
            ),
        ),
        leads=True,
    )


def _holds(row: Row) -> str:
    layers = {
        sum(1 for experts in rank.num_experts_per_layer if experts)
        for rank in row.deployment.per_rank
    }
    num_experts = experts_per_rank(row)
    memory = max(rank.weight_bytes for rank in row.deployment.per_rank)
    if not num_experts:
        return f"no experts; up to {bytes_si(memory)}"
    return (
        f"{span(layers)} layer{'' if layers == {1} else 's'} × {span(num_experts)} "
        f"expert{'' if num_experts == {1} else 's'}, {part_of_expert(row)} of each; "
        f"up to {bytes_si(memory)}"
    )


def _speed(row: Row) -> tuple[str, ...]:
    prefill, decode = row.deployment.prefill, row.deployment.decode
    best = row.against_best
    return (
        str(row.number),
        row.deployment.name,
        figures(prefill.tps),
        milliseconds(prefill.ttft_s.median),
        figures(decode.tps) if decode else NONE,
        _range(row.phase.tps_of_runs),
        milliseconds(decode.tpot_s.median) if decode else NONE,
        milliseconds(decode.tpot_s.p95) if decode else NONE,
        figures(row.against_first.throughput_factor),
        figures(best.throughput_factor) if best else NONE,
    )


def _range(values: tuple[float, ...]) -> str:
    return f"{figures(min(values))}–{figures(max(values))}" if len(values) > 1 else NONE


def _gains(comparison: Comparison) -> Section:
    first, best = comparison.rows[0], comparison.best_baseline
    against_first = [(row, row.against_first) for row in comparison.rows]
    against_best = [(row, row.against_best) for row in comparison.rows if row.against_best]
    if best is None or best is first:
        also = "" if best is None else ", also the best baseline"
        name = f"Against the first, {first.deployment.name}{also}"
        return Section("Gains", (_gain_table(name, comparison, against_first),))
    return Section(
        "Gains",
        (
            _gain_table(f"Against the first, {first.deployment.name}", comparison, against_first),
            _gain_table(
                f"Against the best baseline, {best.deployment.name}", comparison, against_best
            ),
        ),
    )


def _gain_table(name: str, comparison: Comparison, gains: list[tuple[Row, Gain]]) -> Table:
    latency = comparison.latency_name
    return Table(
        name,
        (
            text("#"),
            text("deployment"),
            number(f"{comparison.phase} TPS gained"),
            number("throughput"),
            number(f"{latency} ms changed"),
            number("latency"),
        ),
        tuple(
            (
                str(row.number),
                row.deployment.name,
                signed(gain.tps),
                times(gain.throughput_factor),
                signed(1e3 * gain.latency_s),
                times(gain.latency_factor),
            )
            for row, gain in gains
        ),
    )


def _assumptions(results: Results) -> Section:
    return Section(
        "Assumptions",
        (
            Table(
                "",
                (text("what"), text("here"), text("why")),
                tuple((each.name, each.value, each.why) for each in results.assumptions),
            ),
        ),
    )


def _controlled(results: Results) -> Section:
    experiment, machine, versions = results.experiment, results.machine, results.versions
    rows = (
        ("model", _listed(experiment.get("model", {}))),
        ("workload", _listed(experiment.get("workload", {}))),
        ("weights", _weights(experiment)),
        *([] if machine is None else _of_machine(machine)),
        (
            "software",
            f"expertlane {versions.expertlane}, torch {versions.torch}, Python {versions.python}",
        ),
        ("run", f"{results.command}, {results.created}"),
        *([("generated tokens", same_tokens(results.deployments))] if results.deployments else []),
    )
    return Section(
        "Controlled variables (the same for every deployment)",
        (Table("", (text("what"), text("value")), rows),),
    )


def _of_machine(machine: Machine) -> list[tuple[str, str]]:
    return [
        (
            "machine",
            f"{machine.cpu_name}, {machine.num_cores} cores, {bytes_si(machine.memory_bytes)}, "
            f"device {machine.device}, {machine.backend}",
        ),
        (
            "measured peak",
            f"{rate_si(machine.peak.gemm_flops_per_s, 'FLOP')} ({machine.peak.dtype}), "
            f"{rate_si(machine.peak.read_bytes_per_s, 'B')} read, "
            f"on {counted(machine.peak.num_units, machine.peak.unit)}",
        ),
        ("dtype", machine.dtype),
        (
            "ranks",
            f"{machine.num_ranks}, {figures(machine.ranks_per_core)} a core, "
            f"{machine.ranks_per_node} a node for the traffic counters",
        ),
    ]


def _weights(experiment: dict[str, Any]) -> str:
    checkpoint = experiment.get("checkpoint")
    return checkpoint or f"random, seed {experiment.get('seed', NONE)}"


def _listed(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())
