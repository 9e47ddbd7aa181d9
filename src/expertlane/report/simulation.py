"""A simulated deployment as sections of a report."""

from collections.abc import Iterator

from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import (
    NONE,
    bytes_si,
    counted,
    figures,
    milliseconds,
    percent,
    times,
)
from expertlane.results.simulation import (
    Number,
    PhaseSimulation,
    PoolSimulation,
    Simulation,
    Spread,
)
from expertlane.spec.names import Phase, ProjectedCause, Traffic

_NARROW = 0.05  # of the time; less is not worth a sentence
_UNSURE = 0.2  # of the time that is extrapolated, from where on a sentence says so


def title(simulation: Simulation) -> str:
    """The report's heading."""
    deployment = simulation.deployment
    prefill = deployment.prefill_layout
    layout = str(deployment.layout.layout)
    if prefill is not None:
        layout = f"{prefill.layout} + {layout}"
    return (
        f"expertlane simulate: {simulation.model['name']} as {layout} on {simulation.cluster.name}"
    )


def sections(simulation: Simulation) -> tuple[Section, ...]:
    """Everything below the heading, in order."""
    return (
        Section("What limits it", tuple(limits(simulation)), leads=True),
        _service(simulation),
        _steps(simulation),
        _why(simulation),
        _memory(simulation),
        _experts(simulation),
        _basis(simulation),
        _assumptions(simulation),
        _setup(simulation),
    )


def limits(simulation: Simulation) -> Iterator[str]:
    """What holds the deployment back, and by how much; the main thing first."""
    phases = phases_of(simulation)
    total_s = sum(phase.seconds.value for _, phase in phases)
    busiest = max(phases, key=lambda named: named[1].seconds.value)
    for name, phase in sorted(phases, key=lambda named: named is not busiest):
        cause, share = phase.largest
        step_s, above = phase.step_s.mean.value, phase.step_s.mean.value / phase.floor_s
        yield (
            f"{name.capitalize()} is limited by {cause}: {percent(share)} of the time. A step "
            f"takes {_with_bounds(phase.step_s.mean)} ms on average, {times(above)} its floor of "
            f"{milliseconds(phase.floor_s)} ms"
            + (
                f"; without {cause} it would take {milliseconds(step_s * (1 - share))} ms."
                if share > _NARROW
                else "."
            )
        )
    if len(phases) > 1:
        name, phase = busiest
        yield f"{percent(phase.seconds.value / total_s)} of the steps' time is {name}."
    yield from _held_back(simulation)
    unsure = sum(phase.extrapolated_share * phase.seconds.value for _, phase in phases) / total_s
    if unsure > _UNSURE:
        yield (
            f"{percent(unsure)} of the time lies outside the sizes that were measured: take the "
            "bounds, not the values."
        )


def _held_back(simulation: Simulation) -> Iterator[str]:
    wanted, setup = simulation.workload.batch, simulation.deployment
    for pool in simulation.pools:
        if pool.role != "prefill" and wanted is not None and pool.most_running < wanted:
            layout = pool.layout.layout
            slots = layout.dp * layout.replicas * setup.max_num_seqs
            if pool.memory.num_resident < min(wanted, slots) or slots < wanted:
                room = "room (--max-num-seqs)" if slots <= pool.memory.num_resident else "memory"
                yield (
                    f"At most {counted(pool.most_running, 'sequence')} of {wanted:,} ran at once, "
                    f"for want of {room}."
                )
        if pool.num_preemptions:
            yield (
                f"{counted(pool.num_preemptions, 'preemption')}: the cache was too small for all "
                "that ran."
            )
    if simulation.cluster.num_idle:
        yield f"{counted(simulation.cluster.num_idle, 'device')} of the cluster stay idle."


def phases_of(simulation: Simulation) -> list[tuple[str, PhaseSimulation]]:
    """What each phase was in the pool that is for it, by its name."""
    found = []
    for pool in simulation.pools:
        if pool.role != "decode" and pool.prefill is not None:
            found.append((Phase.PREFILL.value, pool.prefill))
        if pool.role != "prefill" and pool.decode is not None:
            found.append((Phase.DECODE.value, pool.decode))
    return found


def _service(simulation: Simulation) -> Section:
    service, load = simulation.service, simulation.workload
    spreads = [("TTFT", service.ttft_s), ("TPOT", service.tpot_s), ("E2E", service.e2e_s)]
    latency = Table(
        "Latency, ms",
        (text(""), *(number(each) for each in ("mean", "median", "low–high", "p95", "low–high"))),
        tuple((name, *_spread(spread)) for name, spread in spreads),
    )
    rates = (
        ("output tokens/s", service.output_tps),
        ("output tokens/s a device", _over(service.output_tps, simulation.deployment.num_ranks)),
        ("total tokens/s", service.total_tps),
        ("requests/s", service.requests_per_s),
    )
    throughput = Table(
        "Throughput",
        (text(""), number("value"), number("low–high")),
        tuple((name, figures(each.value), _range(each)) for name, each in rates),
    )
    what = f"batch {load.batch:,}" if load.rate is None else f"{load.rate:g} requests/s"
    return Section(
        "What users would feel (projected)",
        (
            f"{what}: {counted(load.num_requests, 'request')}, prompts of {load.prompt_len} and "
            f"outputs of {load.output_len} tokens.",
            latency,
            throughput,
        ),
        leads=True,
    )


def _over(value: Number, num: int) -> Number:
    return Number(value.value / num, value.low / num, value.high / num, value.basis)


def _spread(spread: Spread | None) -> tuple[str, ...]:
    if spread is None:
        return (NONE,) * 5
    return (
        milliseconds(spread.mean.value),
        milliseconds(spread.median.value),
        _range(spread.median, 1e3),
        milliseconds(spread.p95.value),
        _range(spread.p95, 1e3),
    )


def _range(value: Number, scale: float = 1.0) -> str:
    return f"{figures(scale * value.low)}–{figures(scale * value.high)}"


def _with_bounds(value: Number) -> str:
    return f"{milliseconds(value.value)} ({_range(value, 1e3)})"


def _steps(simulation: Simulation) -> Section:
    phases = phases_of(simulation)
    rows = (
        ("steps", [f"{phase.num_steps:,}" for _, phase in phases]),
        ("tokens a step", [figures(phase.num_tokens) for _, phase in phases]),
        ("sequences a step", [figures(phase.num_seqs) for _, phase in phases]),
        ("ms a step, mean", [milliseconds(phase.step_s.mean.value) for _, phase in phases]),
        ("low–high", [_range(phase.step_s.mean, 1e3) for _, phase in phases]),
        ("p95", [milliseconds(phase.step_s.p95.value) for _, phase in phases]),
        ("floor, ms", [milliseconds(phase.floor_s) for _, phase in phases]),
        ("of peak FLOP/s", [percent(phase.flops_utilisation) for _, phase in phases]),
        ("of peak bytes/s", [percent(phase.read_utilisation) for _, phase in phases]),
    )
    return Section(
        "Steps",
        (
            _by_phase("", phases, rows),
            "Steps with any prompt in them count as prefill. Floor: what the busiest rank reads "
            "over its memory's bandwidth, or its FLOPs over the peak, whichever is longer.",
        ),
    )


def _by_phase(
    name: str,
    phases: list[tuple[str, PhaseSimulation]],
    rows: tuple[tuple[str, list[str]], ...],
) -> Table:
    return Table(
        name,
        (text(""), *(number(phase) for phase, _ in phases)),
        tuple((row, *cells) for row, cells in rows),
    )


def _why(simulation: Simulation) -> Section:
    phases = phases_of(simulation)
    causes = [
        cause.value
        for cause in ProjectedCause
        if any(phase.shares.get(cause.value, 0.0) > 0 for _, phase in phases)
    ]
    rows = tuple(
        (
            cause,
            [percent(share) if (share := phase.shares[cause]) else NONE for _, phase in phases],
        )
        for cause in causes
    )
    return Section(
        "Where the time goes",
        (
            _by_phase("", phases, rows),
            "Mean over ranks. Reads: of operations that are bound by memory. Waiting is until the "
            "last rank of a group came; exposed is what even that one waits.",
        ),
    )


def _memory(simulation: Simulation) -> Section:
    pools = simulation.pools
    rows = (
        ("weights", [bytes_si(pool.memory.weight_bytes) for pool in pools]),
        ("key/value cache", [bytes_si(pool.memory.kv_bytes) for pool in pools]),
        ("activations of the largest step", [_activations(pool) for pool in pools]),
        ("allowed in all", [bytes_si(pool.memory.allowed_bytes) for pool in pools]),
        ("sequences of full length that fit", [f"{pool.memory.num_resident:,}" for pool in pools]),
        ("most sequences at once", [f"{pool.most_running:,}" for pool in pools]),
        ("preemptions", [f"{pool.num_preemptions:,}" for pool in pools]),
    )
    names = ["" if pool.role == "both" else f"{pool.role} ({pool.layout.layout})" for pool in pools]
    return Section(
        "Memory of the fullest rank",
        (
            Table(
                "",
                (text(""), *map(number, names)),
                tuple((row, *cells) for row, cells in rows),
            ),
            "Sequences are of the whole pool. The cache is no larger than this load could use.",
        ),
    )


def _activations(pool: PoolSimulation) -> str:
    return bytes_si(pool.memory.activation_bytes)


def _experts(simulation: Simulation) -> Section:
    phases = phases_of(simulation)
    rows = [
        ("busiest rank's pairs over the mean", [figures(each.rank_pairs) for _, each in phases])
    ]
    links = list(phases[0][1].traffic_bytes)
    for link in links:
        for kind in Traffic:
            sent = [getattr(phase.traffic_bytes[link], kind.label) for _, phase in phases]
            if any(sent):
                cells = [
                    bytes_si(each / phase.num_tokens)
                    for each, (_, phase) in zip(sent, phases, strict=True)
                ]
                rows.append((f"{link} {kind.label} a token", cells))
    loads = [
        max(layer) * len(layer) / sum(layer)
        for layer in simulation.num_tokens_per_expert
        if any(layer)
    ]
    parts: tuple[str | Table, ...] = (_by_phase("", phases, tuple(rows)),)
    if loads:
        fullest = f"Fullest expert over the mean, all steps together: {figures(max(loads))} in the "
        parts += (
            fullest + f"least even layer, {figures(sum(loads) / len(loads))} in the mean layer.",
        )
    return Section("Experts and traffic", parts)


def _basis(simulation: Simulation) -> Section:
    phases = phases_of(simulation)
    bases = dict.fromkeys(basis for _, phase in phases for basis in phase.basis_shares)
    rows = [
        (basis, [percent(phase.basis_shares.get(basis, 0.0)) for _, phase in phases])
        for basis in bases
    ]
    rows.append(("extrapolated", [percent(phase.extrapolated_share) for _, phase in phases]))
    return Section(
        "What the times rest on",
        (
            _by_phase("", phases, tuple(rows)),
            "Of operations and transfers. Fitted: to published measurements; bound: a datasheet's "
            "figures; extrapolated, of either: beyond the sizes that were measured.",
        ),
    )


def _assumptions(simulation: Simulation) -> Section:
    return Section(
        "Assumptions",
        (
            Table(
                "",
                (text("what"), text("here"), text("why, and what changes it")),
                tuple(
                    (each.name, each.value, each.why + (f" ({each.option})" if each.option else ""))
                    for each in simulation.assumptions
                ),
            ),
        ),
    )


def _setup(simulation: Simulation) -> Section:
    cluster, versions = simulation.cluster, simulation.versions
    rows = (
        (
            "cluster",
            f"{cluster.name}: {cluster.num_devices} × {cluster.device}, "
            f"{cluster.ranks_per_node} a node",
        ),
        ("options", str(simulation.deployment.options)),
        ("seed", str(simulation.workload.seed)),
        ("software", f"expertlane {versions.expertlane}, Python {versions.python}"),
        ("run", f"{simulation.command}, {simulation.created}"),
    )
    return Section("What was simulated", (Table("", (text("what"), text("value")), rows),))
