"""Which deployment is faster, by what factor, and where the difference lies: in sentences."""

from collections.abc import Iterator, Sequence
from operator import attrgetter, itemgetter

from expertlane.report.compared import Comparison, Row, projected
from expertlane.report.numbers import figures, milliseconds, percent, times
from expertlane.report.speed import speed_of_links
from expertlane.results.results import Results
from expertlane.spec.names import Phase

# Factors this close to 1 are called equal: one run of a few steps cannot separate them.
_EVEN = 0.05


def verdict(comparison: Comparison, results: Results) -> tuple[str, ...]:
    """The paragraphs on top: which is faster, and why; then what else a reader must know of it."""
    where = _where(comparison, results)
    pair = _pair(comparison)
    if pair is None:
        only = comparison.first
        return (
            f"{only.name} alone {where}: {figures(only.tps)} {comparison.phase} TPS, "
            f"{comparison.latency_name} {milliseconds(only.latency_s)} ms; nothing to "
            "compare it with.",
        )
    faster, slower = pair
    sentences = [_which(comparison, faster, slower, where), _why(comparison, faster, slower)]
    named = [comparison.first, faster, slower]
    if comparison.source == "virtual":
        sentences += [_by_link_speed(results, comparison)]
    elif not comparison.is_run:
        sentences += [_by_context(comparison), _prefill(comparison), _skewed(results, comparison)]
    elif results.measured_on.is_oversubscribed:
        ahead = _pair_by_critical_path(comparison)
        if ahead is not None:
            sentences.append(_by_critical_path(*ahead))
            named += ahead
    numbers = {row.number for row in named}
    rows = [row for row in comparison.rows if row.number in numbers]
    return (*filter(None, sentences), *_rounding(rows))


def _where(comparison: Comparison, results: Results) -> str:
    match comparison.source:
        case "measured":
            return "here"
        case "virtual":
            return "in virtual time"
    return f"on {results.projected_for.name}, projected"


def in_wall_time(wall: Comparison) -> str:
    """How the best proposal and the best baseline compare on the machine as it is."""
    pair = _pair(wall)
    return "" if pair is None else _which(wall, *pair, "in wall time on this machine")


def _by_link_speed(results: Results, comparison: Comparison) -> str:
    """The best proposal over the best baseline on faster and slower links."""
    virtual = results.virtual_time
    proposals = [row.number for row in comparison.proposals]
    if (
        virtual is None
        or not virtual.speeds
        or not proposals
        or len(proposals) == len(comparison.rows)
    ):
        return ""
    factors = []
    for each in virtual.speeds:
        of_row = dict(zip((row.number for row in comparison.rows), each.tps, strict=True))
        best = max(of_row[number] for number in proposals)
        other = max(tps for number, tps in of_row.items() if number not in proposals)
        factor = speed_of_links(virtual, each)
        if factor is None:
            words = "without links"
        elif factor == 1:
            words = "as assumed"
        else:
            words = f"at {times(factor)}"
        factors.append(f"{times(best / other)} {words}")
    return f"Best proposal over best baseline, by link speed: {', '.join(factors)}."


def _pair(comparison: Comparison) -> tuple[Row, Row] | None:
    """The faster and the slower of best proposal and best baseline; else fastest and first."""
    proposal, baseline = comparison.best_proposal, comparison.best_baseline
    if proposal is None or baseline is None:
        proposal, baseline = comparison.fastest, comparison.first
        if proposal is baseline:
            rest = comparison.rows[1:]
            if not rest:
                return None
            baseline = max(rest, key=lambda row: row.tps)
    return (proposal, baseline) if proposal.tps >= baseline.tps else (baseline, proposal)


def _which(comparison: Comparison, faster: Row, slower: Row, where: str) -> str:
    name, first = comparison.latency_name, comparison.first
    latencies = (
        f"{name} {milliseconds(faster.latency_s)} ms against "
        f"{milliseconds(slower.latency_s)} ms ({_latency_words(faster, slower)})"
    )
    rates = f"{figures(faster.tps)} against {figures(slower.tps)} {comparison.phase} TPS"
    fast, slow = (
        f"the best baseline, {row.name}" if row is comparison.best_baseline else row.name
        for row in (faster, slower)
    )
    if is_close(faster, slower):
        sentence = f"Within error {where}: {fast} and {slow}: {rates}; {latencies}."
    else:
        sentence = (
            f"Faster {where}: {fast}, with {times(faster.tps / slower.tps)} the throughput of "
            f"{slow}: {rates}; {latencies}."
        )
    if first not in (faster, slower):
        sentence += (
            f" Against the first deployment, {first.name}: "
            f"{times(faster.tps / first.tps)} the throughput, "
            f"{name} {_latency_words(faster, first)}."
        )
    return sentence


def is_close(faster: Row, slower: Row) -> bool:
    """Whether they differ by little, or some repetition or bound of one is within the other's."""
    low, high = faster.tps_range.bounds[0], slower.tps_range.bounds[-1]
    return faster.tps < (1 + _EVEN) * slower.tps or high >= low


def _latency_words(row: Row, other: Row) -> str:
    factor = other.latency_s / row.latency_s
    if abs(factor - 1) < _EVEN:
        return "the same"
    return f"{times(factor)} lower" if factor > 1 else f"{times(1 / factor)} higher"


def _why(comparison: Comparison, faster: Row, slower: Row) -> str:
    """The cause that costs the slower one most more, and the faster one's own largest."""
    fast_s, slow_s = faster.step.breakdown_s, slower.step.breakdown_s
    excess_s = {cause: slow_s[cause] - fast_s.get(cause, 0.0) for cause in slow_s}
    main = max(excess_s, key=lambda cause: excess_s[cause])
    largest, _ = faster.step.largest
    if excess_s[main] <= 0:
        return ""
    unit = "per decode step" if comparison.phase is Phase.DECODE else "over the prefill"
    if comparison.context is not None:
        unit += f" at {comparison.context:,} tokens of context"
    sentence = (
        f"Why: {unit}, the largest difference is {main}: {_part(slower, main)} with "
        f"{slower.name}, {_part(faster, main)} with {faster.name}."
    )
    if largest != main:
        sentence += f" Largest cost of {faster.name}: {largest}, {_part(faster, largest)}."
    return sentence


def _part(row: Row, cause: str) -> str:
    seconds = row.step.breakdown_s.get(cause, 0.0)
    return f"{milliseconds(seconds)} ms ({percent(row.step.shares.get(cause, 0.0))})"


def _by_context(comparison: Comparison) -> str:
    """What the best proposal gains from the shortest to the longest context."""
    proposal, best, first = comparison.best_proposal, comparison.best_baseline, comparison.first
    contexts = comparison.contexts
    if proposal is None:
        return "No deployment is a proposal; all are baselines."
    if best is None or len(contexts) < 2:
        return ""

    def factors(other: Row) -> str:
        found = [
            comparison.at(proposal, each).tps.value / comparison.at(other, each).tps.value
            for each in contexts
        ]
        low, high = times(min(found)), times(max(found))
        return low if low == high else f"{figures(min(found))} to {high}"

    also = "" if best is first else f" and {factors(first)} that of {first.name}"
    return (
        f"From {contexts[0]:,} to {contexts[-1]:,} tokens of context {proposal.name} has "
        f"{factors(best)} the decode TPS of {best.name}{also}."
    )


def _prefill(comparison: Comparison) -> str:
    of_parts = [
        [(row.name, step.tps.value) for row in rows if (step := row.record.prefill)]
        for rows in (comparison.proposals, comparison.baselines)
    ]
    if not all(of_parts):
        return ""
    (proposal, tps), (best, tps_of_best) = (max(each, key=itemgetter(1)) for each in of_parts)
    return (
        f"Prefill: {figures(tps)} TPS with {proposal}, {figures(tps_of_best)} with "
        f"{best} ({times(tps / tps_of_best)})."
    )


def _skewed(results: Results, comparison: Comparison) -> str:
    skewed = next((each for each in results.conditions if each.routing == "skewed"), None)
    other = projected(results, skewed) if skewed else None
    if other is None or other.best_baseline is None or other.best_proposal is None:
        return ""
    best, proposal = other.best_baseline, other.best_proposal
    return (
        f"With skewed routing the best proposal, {proposal.name}, has "
        f"{times(proposal.tps / best.tps)} the decode TPS of the best baseline, {best.name}, at "
        f"{comparison.context:,} tokens."
    )


def _pair_by_critical_path(comparison: Comparison) -> tuple[Row, Row] | None:
    """The best proposal and the best baseline by that measure, the one ahead first."""
    of_parts = (comparison.baselines, comparison.proposals)
    if not all(of_parts):
        return None
    tps = attrgetter("critical_path_tps")
    ahead, behind = sorted((max(rows, key=tps) for rows in of_parts), key=tps, reverse=True)
    return (ahead, behind) if behind.critical_path_tps else None


def _by_critical_path(ahead: Row, behind: Row) -> str:
    """Which is ahead by critical-path CPU time; by wall time it may be the other."""
    tps, tps_behind = ahead.critical_path_tps, behind.critical_path_tps
    rates = f"{figures(tps)} against {figures(tps_behind)} TPS"
    factor = tps / tps_behind
    if factor < 1 + _EVEN:
        outcome = f"{ahead.name} and {behind.name} are within error: {rates}"
    else:
        outcome = (
            f"{ahead.name} is ahead, with {times(factor)} the throughput of {behind.name}: {rates}"
        )
    return (
        "By critical-path CPU time (one core per rank, transfers free), "
        f"{outcome}. This favours deployments that communicate most."
    )


def _rounding(rows: Sequence[Row]) -> Iterator[str]:
    """One sentence for each that rounds hidden states: it is not the same computation."""
    for row in rows:
        error = row.step.traffic.payload_error if row.step.traffic else None
        if error:
            yield (
                f"{row.name} rounds hidden states to {row.record.options.payload} on their way to "
                f"experts, by {error_in_words(error)}: its outputs differ slightly."
            )


def error_in_words(error: float) -> str:
    """`0.165% (root mean square)`; `error`: over the root mean square of the hidden states."""
    return f"{figures(100 * error)}% (root mean square)"
