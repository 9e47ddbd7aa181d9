"""Which deployment was faster, by what factor, and where the difference lies: in sentences."""

from expertlane.report.comparison import Comparison, Row, gain
from expertlane.report.numbers import figures, milliseconds, percent, times
from expertlane.results import Machine
from expertlane.spec.names import Cause, Phase

# Factors this close to 1 are called equal: one run of a few steps does not tell them apart.
_EVEN = 0.05


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
    if machine.is_oversubscribed:
        sentences.append(_by_critical_path(faster, slower))
    return tuple(filter(None, sentences))


def oversubscription(machine: Machine) -> str | None:
    """What ranks that share cores mean for the numbers, or None where each has its own."""
    if not machine.is_oversubscribed:
        return None
    return (
        f"{machine.num_ranks} ranks share {machine.num_cores} "
        f"core{'s' if machine.num_cores > 1 else ''}: wall times compare work and waiting on this "
        "machine, not a cluster; critical-path CPU time is the figure closest to one core a rank."
    )


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
    if between.throughput_factor < 1 + _EVEN:
        sentence = f"Equally fast here: {fast} and {slow}: {rates}; {latencies}."
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


def _by_critical_path(faster: Row, slower: Row) -> str:
    ahead, behind = sorted((faster, slower), key=lambda row: -row.phase.critical_path.tps)
    ahead_tps, behind_tps = ahead.phase.critical_path.tps, behind.phase.critical_path.tps
    if not behind_tps:
        return ""
    also = "too" if ahead is faster else "instead"
    return (
        f"By critical-path CPU time, with a core for each rank and free transfers, "
        f"{ahead.deployment.name} would be ahead {also}, with {times(ahead_tps / behind_tps)} the "
        f"throughput of {behind.deployment.name}: {figures(ahead_tps)} against "
        f"{figures(behind_tps)} TPS."
    )
