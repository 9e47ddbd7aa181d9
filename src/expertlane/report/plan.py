"""A plan as sections: what to run, what else was close, and why the others lose."""

from collections.abc import Callable

from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import bytes_si, counted, figures, milliseconds, percent
from expertlane.results.plan import NoPools, PlannedDeployment, PlanResults
from expertlane.results.projection import Estimate, StepProjection

_NO_POOLS: dict[NoPools, str] = {
    "no split": "there is no way to split the devices between them",
    "too large": "the model does not fit both parts of any split",
    "over limits": "none keeps the limits",
}
_SHOWN_SHARE = 0.005
_NUM_EXPLAINED = 3
_MOST = 0.5  # of the time


def title(plan: PlanResults) -> str:
    """The report's heading."""
    return f"expertlane plan: {plan.model['name']} on {plan.cluster}"


def sections(plan: PlanResults) -> tuple[Section, ...]:
    """Everything below the heading."""
    return (
        Section("Verdict", verdict(plan), leads=True),
        _best(plan),
        _families(plan),
        _pareto(plan),
        _why(plan),
        _run_it(plan),
        _assumptions(plan),
    )


def verdict(plan: PlanResults) -> tuple[str, ...]:
    """What to run, what comes next, and what else was tried."""
    best = plan.best[0]
    lines = [
        f"Run {named(best)}: {_span(best.tps)} output tokens/s with "
        f"{counted(best.num_sequences, 'sequence')} at once, TPOT {_ms_span(best.tpot_s)} ms, TTFT "
        f"{_ms_or_never(best.ttft_s)} ms. Projected, low to high in brackets; nothing was run."
    ]
    if len(plan.best) > 1:
        second = plan.best[1]
        close = second.tps.high > best.tps.low
        lines.append(
            f"Next: {named(second)} at {percent(second.tps.value / best.tps.value)} of its tokens "
            f"a second{', within the bounds: too close to tell' if close else ''}."
        )
    lines.append(_pools(plan))
    lines.append(
        f"{counted(plan.num_candidates, 'deployment')} of one pool: {plan.num_too_large:,} too "
        f"large, {plan.num_over_limits:,} over the limits; {plan.num_pool_candidates:,} more "
        f"tried for two pools. Limits: {_limits(plan)}."
    )
    return (*lines, *_firmness(best), *plan.cautions)


def _firmness(best: PlannedDeployment) -> list[str]:
    """A sentence where most of the best one's time is not what was measured."""
    if best.decode is None or best.prefill is None:
        return []
    of_decode = min(1.0, best.decode.step_s.value / best.tpot_s.value)  # the rest is prefill
    steps = ((of_decode, best.decode), (1 - of_decode, best.prefill))
    bound = sum(part * step.basis_shares.get("bound", 0.0) for part, step in steps)
    extrapolated = sum(part * step.extrapolated_share for part, step in steps)
    said = (
        (bound, "rests on datasheets and assumptions alone"),
        (extrapolated, "lies outside the sizes that were ever measured"),
    )
    most = [f"{words} ({percent(share)})" for share, words in said if share > _MOST]
    if not most:
        return []
    return [
        f"Most of the first one's time {' and '.join(most)}: trust its bounds, and "
        "orders and factors more than digits."
    ]


def _pools(plan: PlanResults) -> str:
    if plan.two_pools is None:
        why = _NO_POOLS[plan.no_two_pools or "over limits"]
        return f"Two pools, prefill apart from decode: {why}."
    pools, best = plan.two_pools, plan.best[0]
    factor = pools.tps.value / best.tps.value
    comparison = "faster than one pool" if factor > 1 else "of one pool's"
    return (
        f"Two pools: prefill on {pools.num_prefill_devices} ({named(pools.prefill)}), decode on "
        f"{pools.num_decode_devices} ({named(pools.decode)}): {_span(pools.tps)} tokens/s, "
        f"{figures(factor)}× {comparison}, TPOT {_ms_span(pools.tpot_s)} ms, TTFT "
        f"{_ms_or_never(pools.ttft_s)} ms. Keys and values of a prompt travel "
        f"{milliseconds(pools.transfer_s.value)} ms, before its second token."
    )


def _limits(plan: PlanResults) -> str:
    limits = [
        f"{name} {1e3 * limit:g} ms"
        for name, limit in (("TPOT", plan.max_tpot_s), ("TTFT", plan.max_ttft_s))
        if limit is not None
    ]
    return ", ".join(limits) or "none"


def _best(plan: PlanResults) -> Section:
    columns = (
        text("#"),
        text("layout and options"),
        number("seqs"),
        number("tokens/s"),
        number("low"),
        number("high"),
        number("TPOT ms"),
        number("TTFT ms"),
    )
    rows = tuple(
        (
            str(place),
            named(each),
            f"{each.num_sequences:,}",
            figures(each.tps.value),
            figures(each.tps.low),
            figures(each.tps.high),
            milliseconds(each.tpot_s.value),
            "—" if each.ttft_s is None else milliseconds(each.ttft_s.value),
        )
        for place, each in enumerate(plan.best, 1)
    )
    loses = tuple((str(place), each.why) for place, each in enumerate(plan.best, 1) if each.why)
    parts: list[str | Table] = [Table("", columns, rows)]
    if loses:
        parts.append(Table("Why they lose to the first", (text("#"), text("why")), loses))
    return Section("Best deployments (projected in full)", tuple(parts), leads=True)


def _families(plan: PlanResults) -> Section:
    return Section(
        "The best of each kind (screened)",
        (
            Table(
                "",
                (
                    text("kind"),
                    text("layout and options"),
                    number("seqs"),
                    number("tokens/s"),
                    number("TPOT ms"),
                    text("why it loses"),
                ),
                tuple(
                    (
                        family,
                        named(each),
                        f"{each.num_sequences:,}",
                        figures(each.tps.value),
                        milliseconds(each.tpot_s.value),
                        each.why,
                    )
                    for family, each in plan.families.items()
                ),
            ),
        ),
    )


def _pareto(plan: PlanResults) -> Section:
    return Section(
        "Pareto front: tokens a second against TPOT (screened)",
        (
            Table(
                "",
                (
                    number("TPOT ms"),
                    number("low"),
                    number("high"),
                    number("tokens/s"),
                    number("low"),
                    number("high"),
                    number("seqs"),
                    text("layout and options"),
                ),
                tuple(
                    (
                        milliseconds(each.tpot_s.value),
                        milliseconds(each.tpot_s.low),
                        milliseconds(each.tpot_s.high),
                        figures(each.tps.value),
                        figures(each.tps.low),
                        figures(each.tps.high),
                        f"{each.num_sequences:,}",
                        named(each),
                    )
                    for each in plan.pareto
                ),
            ),
            "No deployment has both more tokens a second and a lower TPOT than one of these.",
        ),
    )


_FACTS: tuple[tuple[str, Callable[[StepProjection], str]], ...] = (
    ("ms a step", lambda step: milliseconds(step.step_s.value)),
    ("its floor, ms", lambda step: milliseconds(step.floor_s)),
    ("FLOPs of peak", lambda step: percent(step.flops_utilisation)),
    ("reads of bandwidth", lambda step: percent(step.read_utilisation)),
    ("on bounds alone", lambda step: percent(step.basis_shares.get("bound", 0.0))),
    ("extrapolated", lambda step: percent(step.extrapolated_share)),
)


def _why(plan: PlanResults) -> Section:
    steps: list[tuple[str, StepProjection]] = []
    for place, each in enumerate(plan.best[:_NUM_EXPLAINED], 1):
        for phase, step in (("decode", each.decode), ("prefill", each.prefill)):
            if step is not None:
                steps.append((f"#{place} {phase}", step))
    causes = dict.fromkeys(cause for _, step in steps for cause in step.shares)
    rows = [
        (cause, *(percent(step.shares[cause]) for _, step in steps))
        for cause in causes
        if any(step.shares[cause] > _SHOWN_SHARE for _, step in steps)
    ]
    rows += [(name, *(value(step) for _, step in steps)) for name, value in _FACTS]
    return Section(
        "Where the time of a step goes",
        (
            Table("", (text(""), *(number(heading) for heading, _ in steps)), tuple(rows)),
            "Mean over ranks. Floor: bytes of weights, keys and values over the memory's "
            "bandwidth, or FLOPs over the peak, of the busiest rank. On bounds alone: time that "
            "rests on datasheets and assumptions; the rest is fitted to measurements of others.",
        ),
    )


def _run_it(plan: PlanResults) -> Section:
    best = plan.best[0]
    parts: list[str | Table] = [
        f"Each rank holds {bytes_si(best.weight_bytes)} of weights, "
        f"{bytes_si(best.activation_bytes)} of activations and "
        f"{bytes_si(best.sequence_bytes)} of keys and values a full-length sequence of its own."
    ]
    if plan.experiment is not None:
        parts.append(f"Measured on such a cluster by: expertlane compare {plan.experiment}")
    for each in plan.commands:
        said = each.command or "cannot express it"
        parts.append(f"{each.system}: {said}{f'  ({each.note})' if each.note else ''}")
    return Section("Run it", tuple(parts))


def _assumptions(plan: PlanResults) -> Section:
    rows = tuple((each.name, each.value, each.change) for each in plan.assumptions)
    columns = (text("taken for granted"), text("as"), text("change it by"))
    return Section("Assumptions", (Table("", columns, rows),))


def named(each: PlannedDeployment) -> str:
    """`dp=8, tp=2, ep=16; overlap`."""
    layout, options = str(each.layout.layout).replace(",", ", "), str(each.options)
    return layout + ("" if options == "plain" else f"; {options}")


def _span(estimate: Estimate) -> str:
    low, high = figures(estimate.low), figures(estimate.high)
    return f"{figures(estimate.value)} ({low}–{high})"


def _ms_span(estimate: Estimate) -> str:
    low, high = milliseconds(estimate.low), milliseconds(estimate.high)
    return f"{milliseconds(estimate.value)} ({low}–{high})"


def _ms_or_never(estimate: Estimate | None) -> str:
    return "without end" if estimate is None else _ms_span(estimate)
