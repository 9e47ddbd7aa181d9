"""Which deployment was faster, by what factor, and where the difference lies: in sentences."""

from expertlane.report.comparison import Comparison, Row, gain
from expertlane.report.numbers import figures, milliseconds, percent, times
from expertlane.report.rounding import caveats
from expertlane.results.schema import Machine, Results
from expertlane.spec.names import Cause, Phase

# Factors this close to 1 are called equal: one run of a few steps does not tell them apart.
_EVEN = 0.05
_FOREIGN_LOAD = 0.05


def verdict(comparison: Comparison, machine: Machine) -> tuple[str, ...]:
    """The paragraphs on top of a report."""
    pair = _pair(comparison)
    if pair is None:
        only = comparison.rows[0]
        return (
            f"{only.deployment.name} alone: {figures(only.phase.tps)} {comparison.phase} TPS, "
            f"{comparison.latency_name} {milliseconds(only.latency_s.median)} ms; nothing to "
            "compare it with.",
        )
    faster, slower = pair
    sentences = [_which(comparison, faster, slower), _why(comparison, faster, slower)]
    named = [comparison.rows[0], faster, slower]
    by_critical_path = _pair_by_critical_path(comparison)
    if machine.is_oversubscribed and by_critical_path is not None:
        sentences.append(_by_critical_path(*by_critical_path))
        named += by_critical_path
    numbers = {row.number for row in named}
    rows = [row for row in comparison.rows if row.number in numbers]
    return (*filter(None, sentences), *caveats(rows, comparison.phase))


def oversubscription(machine: Machine) -> str | None:
    """What ranks that share cores mean for the numbers, or None where each has its own."""
    if not machine.is_oversubscribed:
        return None
    return (
        f"{machine.num_ranks} ranks share {machine.num_cores} "
        f"core{'s' if machine.num_cores > 1 else ''}: wall times compare work and waiting on this "
        "machine, not a cluster; critical-path CPU time is the figure closest to one core a rank."
    )


def foreign_load(results: Results) -> str | None:
    """What else ran on the host, or None where it was little."""
    share = results.foreign_cpu_share
    if share < _FOREIGN_LOAD:
        return None
    used = f"Other processes used {percent(share)} of the cores meanwhile"
    return f"{used}: repeat it on an idle machine."


def _pair(comparison: Comparison) -> tuple[Row, Row] | None:
    """The faster and the slower of best proposal and best baseline; else fastest and first."""
    proposal, baseline = comparison.best_proposal, comparison.best_baseline
    if proposal is None or baseline is None:
        proposal, baseline = comparison.fastest, comparison.rows[0]
        if proposal is baseline:
            rest = comparison.rows[1:]
            if not rest:
                return None
            baseline = max(rest, key=lambda row: row.phase.tps)
    if proposal.phase.tps >= baseline.phase.tps:
        return proposal, baseline
    return baseline, proposal


def _which(comparison: Comparison, faster: Row, slower: Row) -> str:
    between = gain(faster.deployment, slower.deployment, comparison.phase)
    name = comparison.latency_name
    latencies = (
        f"{name} {milliseconds(faster.latency_s.median)} ms against "
        f"{milliseconds(slower.latency_s.median)} ms ({_latency_words(between.latency_factor)})"
    )
    rates = (
        f"{figures(faster.phase.tps)} against {figures(slower.phase.tps)} {comparison.phase} TPS"
    )
    fast, slow = _role(comparison, faster), _role(comparison, slower)
    if between.throughput_factor < 1 + _EVEN or _runs_overlap(faster, slower):
        sentence = f"Too close to call here: {fast} and {slow}: {rates}; {latencies}."
    else:
        sentence = (
            f"Faster here: {fast}, with {times(between.throughput_factor)} the throughput of "
            f"{slow}: {rates}; {latencies}."
        )
    first = comparison.rows[0]
    if first not in (faster, slower):
        factor = faster.against_first
        sentence += (
            f" Against the first deployment, {first.deployment.name}: "
            f"{times(factor.throughput_factor)} the throughput, "
            f"{name} {_latency_words(factor.latency_factor)}."
        )
    return sentence


def _runs_overlap(faster: Row, slower: Row) -> bool:
    """Whether some repetition of the slower one was as fast as one of the faster."""
    return max(slower.phase.tps_of_runs) >= min(faster.phase.tps_of_runs)


def _role(comparison: Comparison, row: Row) -> str:
    name = row.deployment.name
    if row is comparison.best_baseline:
        return f"the best baseline, {name}"
    return name


def _latency_words(factor: float) -> str:
    if abs(factor - 1) < _EVEN:
        return "the same"
    return f"{times(factor)} lower" if factor > 1 else f"{times(1 / factor)} higher"


def _why(comparison: Comparison, faster: Row, slower: Row) -> str:
    """The cause that costs the slower one most more, and the faster one's own largest."""
    phase = comparison.phase
    fast_s = faster.deployment.breakdown_s[phase]
    slow_s = slower.deployment.breakdown_s[phase]
    excess_s = {cause: slow_s[cause] - fast_s[cause] for cause in slow_s}
    main = max(excess_s, key=lambda cause: excess_s[cause])
    largest = max(fast_s, key=lambda cause: fast_s[cause])
    if excess_s[main] <= 0:
        return ""
    unit = "per token of every sequence" if phase is Phase.DECODE else "over the prefill"
    sentence = (
        f"Why: {unit}, the largest difference is {main.value}: "
        f"{_part(slower, phase, main)} with {slower.deployment.name}, "
        f"{_part(faster, phase, main)} with {faster.deployment.name}."
    )
    if largest is not main:
        sentence += (
            f" The largest part of {faster.deployment.name} is {largest.value}, "
            f"{_part(faster, phase, largest)}."
        )
    return sentence


def _part(row: Row, phase: Phase, cause: Cause) -> str:
    seconds = row.deployment.breakdown_s[phase][cause]
    return f"{milliseconds(seconds)} ms ({percent(row.deployment.cause_shares(phase)[cause])})"


def _pair_by_critical_path(comparison: Comparison) -> tuple[Row, Row] | None:
    """The best proposal and the best baseline by that measure, the one ahead first."""

    def tps(row: Row) -> float:
        return row.phase.critical_path.tps

    baselines = [row for row in comparison.rows if row.deployment.is_baseline]
    proposals = [row for row in comparison.rows if not row.deployment.is_baseline]
    if not baselines or not proposals:
        return None
    best = max(baselines, key=tps), max(proposals, key=tps)
    ahead, behind = sorted(best, key=tps, reverse=True)
    return (ahead, behind) if tps(behind) else None


def _by_critical_path(ahead: Row, behind: Row) -> str:
    """The same two deployments or others, whichever they are by wall time."""
    tps, tps_behind = ahead.phase.critical_path.tps, behind.phase.critical_path.tps
    rates = f"{figures(tps)} against {figures(tps_behind)} TPS"
    factor = tps / tps_behind
    if factor < 1 + _EVEN:
        outcome = f"{ahead.deployment.name} and {behind.deployment.name} are even: {rates}"
    else:
        outcome = (
            f"{ahead.deployment.name} is ahead, with {times(factor)} the throughput of "
            f"{behind.deployment.name}: {rates}"
        )
    return (
        "By critical-path CPU time, as if every rank had a core and transfers were free, "
        f"{outcome}. That favours deployments that communicate most."
    )
