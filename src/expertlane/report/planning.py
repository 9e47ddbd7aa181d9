"""What a planner found: what to run, what else was close, and each gap to #1."""

from collections.abc import Iterator

from expertlane.report.compared import Comparison
from expertlane.report.document import Column, Section, Table, Words, number, text
from expertlane.report.numbers import (
    bytes_si,
    counted,
    figures,
    low_high,
    low_high_ms,
    milliseconds,
    percent,
    times,
    whole,
    with_bounds,
)
from expertlane.report.serving import ms_with_bounds
from expertlane.report.setup import cautions
from expertlane.report.time_spent import FACTS, HOW_TO_READ_FACTS, causes
from expertlane.results.estimate import Estimate
from expertlane.results.record import (
    BEST,
    DECODE_POOL,
    EXPERIMENT,
    FAMILY,
    PARETO,
    PREFILL_POOL,
    TWO_POOLS,
    DeploymentRecord,
    ServingRecord,
)
from expertlane.results.results import NoPools, Results
from expertlane.spec.names import Phase

_NO_POOLS: dict[NoPools, str] = {
    "no split": "the devices cannot be split",
    "too large": "the model does not fit both pools of any split",
    "over limits": "none meets the limits",
}
NUM_EXPLAINED = 3
_MOST = 0.5  # of the time


def named(record: DeploymentRecord) -> str:
    """`dp=8, tp=2, ep=16; overlap`."""
    layout, options = str(record.layout).replace(",", ", "), str(record.options)
    return layout + ("" if options == "plain" else f"; {options}")


def serving(record: DeploymentRecord) -> ServingRecord:
    """How a planned deployment serves."""
    return record.serving[0]


def tpot(record: DeploymentRecord) -> Estimate:
    """Mean.

    Raises:
        ValueError: it has none.
    """
    found = serving(record).tpot_s
    if found is None or found.mean is None:
        raise ValueError(f"{record.name} has no TPOT")
    return found.mean


def _ttft(record: DeploymentRecord) -> Estimate | None:
    found = serving(record).ttft_s
    return found.mean if found else None


_HOW: Column[DeploymentRecord] = text("layout and options", named)
_SEQS: Column[DeploymentRecord] = number("seqs", lambda each: serving(each).num_running, whole)
_TPS: tuple[Column[DeploymentRecord], ...] = (
    number("tokens/s", lambda each: serving(each).output_tps, figures),
    number("low–high", lambda each: serving(each).output_tps, low_high),
)
_TPOT: tuple[Column[DeploymentRecord], ...] = (
    number("TPOT ms", tpot, milliseconds),
    number("low–high", tpot, low_high_ms),
)


def plan(results: Results) -> tuple[Section, ...]:
    """The sections of `expertlane plan`."""
    return (
        Section("Verdict", verdict(results), "top"),
        _best(results),
        _families(results),
        _pareto(results),
        _time(results),
        _run_it(results),
    )


def verdict(results: Results) -> tuple[str, ...]:
    """What to run, what comes next, and what else was tried."""
    ranked, found = results.select("projected", BEST), results.plans[0]
    best = ranked[0]
    lines = [
        f"Run {named(best)}: {with_bounds(serving(best).output_tps)} output tokens/s with "
        f"{counted(serving(best).num_running or 0, 'sequence')} at once, "
        f"{_latencies(best)}. Projected, low to high in brackets; nothing was run."
    ]
    if len(ranked) > 1:
        first, second = serving(best).output_tps, serving(ranked[1]).output_tps
        close = second.bounds[-1] > first.bounds[0]
        lines.append(
            f"Next: {named(ranked[1])} at {percent(second.value / first.value)} of its tokens "
            f"a second{', within error' if close else ''}."
        )
    lines.append(_two_pools(results))
    limits = ", ".join(
        f"{name} {1e3 * limit:g} ms"
        for name, limit in (
            ("TPOT", results.question.get("max_tpot_s")),
            ("TTFT", results.question.get("max_ttft_s")),
        )
        if limit is not None
    )
    lines.append(
        f"{counted(found.num_candidates, 'deployment')} aggregated: {found.num_too_large:,} do not "
        f"fit, {found.num_over_limits:,} miss the limits; {found.num_pool_candidates:,} more "
        f"tried disaggregated. Limits: {limits or 'none'}."
    )
    return (*lines, *_firmness(best), *cautions(results))


def _latencies(record: DeploymentRecord) -> str:
    ttft = _ttft(record)
    return f"TPOT {ms_with_bounds(tpot(record))} ms, TTFT " + (
        "unbounded" if ttft is None else f"{ms_with_bounds(ttft)} ms"
    )


def _firmness(best: DeploymentRecord) -> Iterator[str]:
    """A sentence where most of the best one's time is not what was measured."""
    if best.decode is None or best.prefill is None:
        return
    of_decode = min(1.0, best.decode.round_s.value / tpot(best).value)  # the rest is prefill
    steps = ((of_decode, best.decode), (1 - of_decode, best.prefill))
    bound = sum(part * step.basis_shares.get("bound", 0.0) for part, step in steps)
    extrapolated = sum(part * (step.extrapolated_share or 0.0) for part, step in steps)
    said = (
        (bound, "rests on datasheets and assumptions"),
        (extrapolated, "lies outside the measured sizes"),
    )
    most = [f"{words} ({percent(share)})" for share, words in said if share > _MOST]
    if most:
        yield (
            f"Most of the time of #1 {' and '.join(most)}: rankings are reliable, absolute "
            "values are not."
        )


def _two_pools(results: Results) -> str:
    together = next(iter(results.select("projected", TWO_POOLS)), None)
    if together is None:
        why = _NO_POOLS[results.plans[0].no_two_pools or "over limits"]
        return f"Disaggregated (prefill and decode apart): {why}."
    (prefill,) = results.select("projected", PREFILL_POOL)
    (decode,) = results.select("projected", DECODE_POOL)
    best = serving(results.select("projected", BEST)[0]).output_tps
    factor = serving(together).output_tps.value / best.value
    travels = milliseconds(serving(together).transfer_s or 0.0)
    than = "the aggregated best"
    return (
        f"Disaggregated: prefill on {prefill.num_ranks} ({named(prefill)}), decode on "
        f"{decode.num_ranks} ({named(decode)}): {with_bounds(serving(together).output_tps)} "
        f"tokens/s, {figures(factor)}× {than}"
        f", {_latencies(together)}. KV transfer: {travels} ms per prompt, before its "
        "second token."
    )


def _best(results: Results) -> Section:
    rows = results.select("projected", BEST)
    place: Column[DeploymentRecord] = text("#", lambda each: 1 + rows.index(each))
    ttft: Column[DeploymentRecord] = number("TTFT ms", _ttft, milliseconds)
    why: Column[DeploymentRecord] = text("gap to #1", lambda each: each.why)
    loses = [each for each in rows if each.why]
    parts: list[Words] = [Table.of("", (place, _HOW, _SEQS, *_TPS, _TPOT[0], ttft), rows)]
    if loses:
        parts.append(Table.of("Gap to #1", (place, why), loses))
    return Section("Best deployments (projected in full)", tuple(parts), "top")


def _families(results: Results) -> Section:
    kind: Column[DeploymentRecord] = text("kind", lambda each: each.name)
    why: Column[DeploymentRecord] = text("gap to #1", lambda each: each.why)
    columns = (kind, _HOW, _SEQS, _TPS[0], _TPOT[0], why)
    table = Table.of("", columns, results.select("projected", FAMILY))
    return Section("The best of each kind (screened)", (table,))


def _pareto(results: Results) -> Section:
    table = Table.of("", (*_TPOT, *_TPS, _SEQS, _HOW), results.select("projected", PARETO))
    return Section(
        "Pareto front: tokens/s against TPOT (screened)",
        (
            table,
            "No aggregated deployment has both more tokens/s and a lower TPOT than one of these.",
        ),
    )


def explained(results: Results) -> list[tuple[str, DeploymentRecord]]:
    """The first few, each under its number."""
    return [
        (f"#{place}", each)
        for place, each in enumerate(results.select("projected", BEST)[:NUM_EXPLAINED], 1)
    ]


def _time(results: Results) -> Section:
    of_phases = {
        phase: [
            (name, step) for name, each in explained(results) for step in each.steps_of(phase)[:1]
        ]
        for phase in (Phase.DECODE, Phase.PREFILL)
    }
    tables = [
        table
        for phase, steps in of_phases.items()
        for table in causes(str(phase).capitalize(), steps, FACTS)
    ]
    return Section(
        "Where the time goes, per step",
        (*tables, f"Mean over ranks. {HOW_TO_READ_FACTS}"),
    )


def _run_it(results: Results) -> Section:
    found, best = results.plans[0], results.select("projected", BEST)[0]
    memory = best.pools[0]
    parts = [
        f"Each rank holds {bytes_si(memory.weight_bytes or 0)} of weights, "
        f"{bytes_si(memory.activation_bytes or 0)} of activations and "
        f"{bytes_si(memory.sequence_bytes or 0)} of KV per full-length sequence."
    ]
    if found.experiment is not None:
        parts.append(f"To measure it on such a cluster: expertlane compare {found.experiment}")
    for each in found.commands:
        said = each.command or "cannot express it"
        parts.append(f"{each.system}: {said}{f'  ({each.note})' if each.note else ''}")
    return Section("Run it", tuple(parts))


def beside(results: Results, comparison: Comparison) -> Section:
    """A planner's best against an experiment's own deployments."""
    heading = "Projected: the planner's best"
    if not results.plans:
        return Section(heading, ("Not searched: the cluster is larger than plan takes.",))
    parts: list[Words] = [_decode_sentence(results, comparison)]
    best = results.select("projected", BEST, comparison.conditions)
    if best:
        own = [
            each
            for each in results.select("projected", EXPERIMENT, comparison.conditions)
            if each.serving
        ]
        name: Column[DeploymentRecord] = text("deployment", lambda each: each.name)
        parts.append(_served_sentence(best[0], own))
        parts.append(Table.of("The whole workload", (name, _SEQS, *_TPS, *_TPOT), (best[0], *own)))
    parts.append(
        "The whole workload: all prompts and outputs, sequences admitted as soon as memory allows; "
        "output tokens/s, other requests' prefills included in TPOT."
    )
    return Section(heading, tuple(parts))


def _decode_sentence(results: Results, comparison: Comparison) -> str:
    found, best = results.plans[0], comparison.planned
    head = (
        f"Decode at {comparison.context:,}: of {found.num_candidates:,} "
        f"deployments ({found.num_too_large:,} do not fit)"
    )
    if best is None:
        return f"{head} none holds all {comparison.num_seqs:,} sequences."
    against = "; ".join(f"{times(best.tps / row.tps)} {row.name}" for row in comparison.rows)
    return (
        f"{head} the fastest is {best.name}: {with_bounds(best.step.tps)} TPS, TPOT "
        f"{ms_with_bounds(best.step.round_s)} ms. Relative to the "
        f"experiment's deployments: {against}."
    )


def _served_sentence(best: DeploymentRecord, own: list[DeploymentRecord]) -> str:
    head = f"The whole workload: the best is {best.name}"
    if not own:
        return f"{head}; none of the experiment's deployments fits."
    output = [serving(each).output_tps.value for each in own]
    fastest = output.index(max(output))
    return (
        f"{head}, with {times(serving(best).output_tps.value / output[0])} the output of "
        f"{own[0].name} and {times(serving(best).output_tps.value / output[fastest])} that of "
        f"{own[fastest].name}, the experiment's best."
    )
