"""Tables of a plan: the best, kinds of deployment, the Pareto front, their time.

And what would change the choice, in sentences.
"""

import re
from collections.abc import Iterator, Sequence

from expertlane.report.compared import Comparison
from expertlane.report.document import Column, Commands, Figure, Section, Table, Words, number, text
from expertlane.report.loads import is_of_cpus
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
from expertlane.report.speed import FACTS, HOW_TO_READ_FACTS, causes
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.record import (
    BEST,
    EXPERIMENT,
    FAMILY,
    PARETO,
    TWO_POOLS,
    DeploymentRecord,
)
from expertlane.results.results import EngineBest, Level, Results
from expertlane.results.serving_record import SampleRecord, ServingRecord, is_served
from expertlane.spec.deployment import drafts_text
from expertlane.spec.names import Phase

NUM_EXPLAINED = 3
_FIGURES = {"skew": "{:.2g}", "sequences": "{:,.0f}"}
_LEAST = 0.01  # gain in tokens/s that is worth a sentence
_ROUTING = "drawn experts", "skew of experts"
_DRAFTS = "acceptance of drafts"
_LAWS = {
    "driver_s": "host time between steps",
    "driver_per_rank_s": "host time per rank",
    "dp_sync_s": "synchronisation of data-parallel ranks",
    "gemm": "GEMMs",
    "experts": "expert GEMMs",
    "prefill_attention": "prefill attention",
    "decode_attention": "decode attention",
    "latent_prefill": "prefill attention",
    "latent_decode": "decode attention",
    "memory": "norms and copies",
    "intra_node": "transfers inside a node",
    "inter_node": "transfers between nodes",
}


def named(record: DeploymentRecord) -> str:
    """`dp=8,tp=2,ep=16; overlap`; the layout as options take it."""
    layout, options = str(record.layout), str(record.options)
    drafts = drafts_text(record.num_drafts)
    if options == "plain":
        return layout + drafts.replace(", ", "; ")
    return f"{layout}; {options}{drafts}"


def spaced(name: str) -> str:
    """A name with a space after each comma, to be broken at."""
    return re.sub(r",(?! )", ", ", name)


def of_role(results: Results, role: str) -> tuple[DeploymentRecord, ...]:
    """The records of a plan that have a role."""
    return results.select("projected", role)


def rows_of(results: Results) -> tuple[DeploymentRecord, ...]:
    """The best, the winner first; then the best of the other kind, if it is not among them."""
    best, other = of_role(results, BEST), best_of_other_kind(results)
    if other is None or named(other) in map(named, best):
        return best
    return (*best, other)


def best_of_other_kind(results: Results) -> DeploymentRecord | None:
    """The best with experts spread where #1 has them whole, or the other way round."""
    has_experts = of_role(results, BEST)[0].known_layout.ep > 1
    return next(
        (each for each in of_role(results, FAMILY) if (each.known_layout.ep > 1) != has_experts),
        None,
    )


def place_of(results: Results, record: DeploymentRecord) -> int | None:
    """Number of a record's row, from 1; None without one."""
    names = [named(each) for each in rows_of(results)]
    return 1 + names.index(named(record)) if named(record) in names else None


def is_tied(results: Results, record: DeploymentRecord) -> bool:
    """True if it ties for most tokens/s: rows by their place, others by their ratio to #1."""
    place = place_of(results, record)
    if place is not None:
        return place <= results.plans[0].num_tied
    return record.over_best is None or record.over_best.bounds[-1] >= 1


def versus(results: Results, record: DeploymentRecord) -> str:
    """A deployment's ratio to #1: `9.3% slower than #1 (5.1–14%)`, or that they tie."""
    if record.over_best is None:
        return "#1"
    if is_tied(results, record):
        return _tying(record.over_best, "#1")
    return _differing(record.over_best, "#1")


def against(ratio: Estimate, name: str) -> str:
    """A ratio to the deployment `name`, in words."""
    low, _, high = ratio.bounds
    return _tying(ratio, name) if low <= 1 <= high else _differing(ratio, name)


def _tying(ratio: Estimate, name: str) -> str:
    return f"ties with {name} ({figures(ratio.value)}×, {low_high(ratio)})"


def _differing(ratio: Estimate, name: str) -> str:
    low, value, high = ratio.bounds
    least, most = sorted(abs(1 - each) for each in (low, high))
    word = "slower" if value < 1 else "faster"
    within = f"{percent(least).rstrip('%')}–{percent(most)}"
    if low <= 1 <= high:  # it is surely slower than another that ties with #1
        within = f"{low_high(ratio)}×"
    return f"{percent(abs(1 - value))} {word} than {name} ({within})"


def serving(record: DeploymentRecord) -> ServingRecord:
    """Throughput and latency of a planned deployment."""
    return record.serving[0]


def asked_rate(results: Results) -> float | None:
    """Requests that arrive a second, of a plan for an open load; None for a closed one."""
    rate: float | None = (results.question.get("load") or {}).get("rate")
    return rate


def as_asked(record: DeploymentRecord) -> ServingRecord:
    """Its record for the load asked for: an open one at its rate, a closed one as `serving`."""
    return record.serving[-1]


def most_requests(results: Results, record: DeploymentRecord) -> Estimate:
    """The most requests/s that it serves; at least the rate that was asked for, if it serves it."""
    output_len: int = results.question["workload"]["output_len"]
    most, rate = serving(record).output_tps / output_len, asked_rate(results)
    if rate is None or rate <= most.value or not is_served(as_asked(record)):
        return most
    return most * (rate / most.value)  # the formula's most is a little too low


def mean_tpot(found: ServingRecord) -> Estimate:
    """Mean TPOT.

    Raises:
        ValueError: it has none.
    """
    if found.tpot_s is None or found.tpot_s.mean is None:
        raise ValueError("a planned deployment has a TPOT")
    return found.tpot_s.mean


def mean_ttft(found: ServingRecord) -> Estimate | None:
    """Mean TTFT; None where the queue would grow without end."""
    return found.ttft_s.mean if found.ttft_s else None


def tpot(record: DeploymentRecord) -> Estimate:
    """Mean TPOT with as many sequences as it is planned with."""
    return mean_tpot(serving(record))


def ttft(record: DeploymentRecord) -> Estimate | None:
    """Mean TTFT with as many sequences as it is planned with."""
    return mean_ttft(serving(record))


def tie_or_gap(results: Results, record: DeploymentRecord) -> str | None:
    """`tie`, or the difference to #1; None of that."""
    if record.over_best is None:
        return None
    if is_tied(results, record):
        return "tie"
    value = record.over_best.value
    return f"{'−' if value < 1 else '+'}{percent(abs(1 - value))}"


def versus_column(results: Results) -> Column[DeploymentRecord]:
    """Column with `tie`, or the difference to #1."""
    return number("vs #1", lambda each: tie_or_gap(results, each))


_HOW: Column[DeploymentRecord] = text("layout and options", lambda each: spaced(named(each)))
_TTFT: Column[DeploymentRecord] = number("TTFT ms", ttft, milliseconds)
_SEQS: Column[DeploymentRecord] = number("seqs", lambda each: serving(each).num_running, whole)
_WAIT: Column[DeploymentRecord] = number("wait s", lambda each: serving(each).place_wait_s, figures)
_COST: Column[DeploymentRecord] = number(
    "$/M out", lambda each: serving(each).usd_per_million_output, figures
)
_TPS: tuple[Column[DeploymentRecord], ...] = (
    number("tokens/s", lambda each: serving(each).output_tps, figures),
    number("low–high", lambda each: serving(each).output_tps, low_high),
)
_TPOT: tuple[Column[DeploymentRecord], ...] = (
    number("TPOT ms", tpot, milliseconds),
    number("low–high", tpot, low_high_ms),
)


def plan(results: Results) -> tuple[Section, ...]:
    """The sections of `expertlane plan` after its verdict."""
    return (
        _best(results),
        *_at_rate(results),
        _families(results),
        _engines(results),
        _pareto(results),
        _time(results),
        _run_it(results),
    )


def _best(results: Results) -> Section:
    rows = of_role(results, BEST)
    place: Column[DeploymentRecord] = text("#", lambda each: 1 + rows.index(each))
    others = (*_TPS, _TPOT[0], _TTFT, *_costs(rows), versus_column(results))
    columns = (_HOW, _SEQS, *_waits(rows), *others)
    said = (
        ["wait s: mean wait of a request for one of the places (seqs); TTFT starts after it."]
        if _waits(rows)
        else []
    )
    parts: list[Words] = [Table.of("", (place, *columns), rows), *said, *_gaps(place, rows)]
    return Section("Best deployments", tuple(parts), "top", "found")


def _p95(found: Summary | None) -> Estimate | None:
    return found.p95 if found else None


def _sample(record: DeploymentRecord) -> SampleRecord:
    sample = as_asked(record).sample
    assert sample is not None, "an open load is served in its steady state"
    return sample


def _num_waiting(record: DeploymentRecord) -> float | None:
    """Waiting requests; None where a queue grows without end."""
    return None if as_asked(record).ttft_s is None else _sample(record).num_waiting


_AT_RATE: tuple[Column[DeploymentRecord], ...] = (
    number("TPOT ms", lambda each: mean_tpot(as_asked(each)), milliseconds),
    number("low–high", lambda each: mean_tpot(as_asked(each)), low_high_ms),
    number("TTFT ms", lambda each: mean_ttft(as_asked(each)), milliseconds),
    number("p95", lambda each: _p95(as_asked(each).ttft_s), milliseconds),
    number("decoding", lambda each: _sample(each).num_decoding, figures),
    number("waiting", _num_waiting, figures),
)


def _at_rate(results: Results) -> list[Section]:
    """The best and the pools, at the rate that was asked for; empty for a closed load."""
    if (rate := asked_rate(results)) is None:
        return []
    rows = (*of_role(results, BEST), *of_role(results, TWO_POOLS))
    place: Column[DeploymentRecord] = text(
        "#", lambda each: "pools" if each.prefill_layout else 1 + rows.index(each)
    )
    is_served: Column[DeploymentRecord] = text("served", lambda each: how_served(results, each))
    most: Column[DeploymentRecord] = number(
        "most req/s", lambda each: most_requests(results, each), with_bounds
    )
    said = (
        "decoding, waiting: mean number of requests after and before their first token. most "
        "req/s: with as many sequences as the limits allow."
    )
    table = Table.of("", (place, is_served, *_AT_RATE, most), rows)
    return [Section(f"At {rate:,g} requests/s", (table, said), chapter="found")]


def how_served(results: Results, record: DeploymentRecord) -> str:
    """The part of an open load that is served, or the limits that it misses."""
    found, rate = as_asked(record), asked_rate(results)
    if found.ttft_s is None:
        served = found.requests_per_s
        return f"{figures(served)} of {rate:g} req/s" if served is not None else "a part"
    missed = [each.slo.name for each in found.slos if not each.is_met]
    return f"misses {', '.join(missed)}" if missed else "all"


def _waits(rows: Sequence[DeploymentRecord]) -> list[Column[DeploymentRecord]]:
    """Column of the wait for a place; none where no request waits."""
    return [_WAIT] if any(serving(each).place_wait_s is not None for each in rows) else []


def _costs(rows: Sequence[DeploymentRecord]) -> list[Column[DeploymentRecord]]:
    """Column of dollars per million output tokens; none without a price."""
    return [_COST] if any(serving(each).usd_per_million_output for each in rows) else []


def _families(results: Results) -> Section:
    """The best of each kind, without those among the best."""
    best = {named(each) for each in of_role(results, BEST)}
    rows = [each for each in of_role(results, FAMILY) if named(each) not in best]
    kind: Column[DeploymentRecord] = text("kind", lambda each: each.name)
    columns = (kind, _HOW, _TPS[0], _TPOT[0], _TTFT, *_costs(rows), versus_column(results))
    parts = (Table.of("", columns, rows), *_gaps(kind, rows)) if rows else ()
    return Section("Best of other kinds", parts, chapter="found")


def pools_named(prefill: DeploymentRecord, decode: DeploymentRecord) -> str:
    """Disaggregated pools in words, each with its ranks."""
    return (
        f"{named(prefill)} on {counted(prefill.num_ranks, 'rank')} for prefill and "
        f"{named(decode)} on {decode.num_ranks} for decode"
    )


def engine_best_named(each: EngineBest) -> str:
    """The best that an engine runs, in words; empty where it runs none."""
    if each.pools:
        _, prefill, decode = each.pools
        return pools_named(prefill, decode)
    return "" if each.aggregated is None else named(each.aggregated)


def engines_of(results: Results) -> tuple[EngineBest, ...]:
    """The best of each engine; of a cluster of CPUs, of the only one that serves on them."""
    found = results.plans[0].engines
    if is_of_cpus(results):
        return tuple(each for each in found if each.engine == "expertlane")
    return found


def _engines(results: Results) -> Section:
    """The best of each engine, and why it does not run the plan's choice."""
    heading, engines = "Best of each engine", engines_of(results)
    if results.plans[0].engine is not None or not any(each.why for each in engines):
        return Section(heading, ())

    def of_best(column: Column[DeploymentRecord]) -> Column[EngineBest]:
        return column.of(lambda each: each.best)

    name: Column[EngineBest] = text("engine", lambda each: each.title)
    how: Column[EngineBest] = text(
        _HOW.heading, lambda each: spaced(engine_best_named(each)) or None
    )
    costs = _costs([each.best for each in engines if each.best is not None])
    told = (_SEQS, _TPS[0], _TPOT[0], _TTFT, *costs, versus_column(results))
    columns = (name, how, *map(of_best, told))
    version: Column[EngineBest] = text("version", lambda each: each.version)
    does: Column[EngineBest] = text("because it", lambda each: each.why)
    source: Column[EngineBest] = text("source", lambda each: each.source)
    others = [each for each in engines if each.why]
    why = Table.of(
        "Why an engine does not run the plan's choice", (name, does, version, source), others
    )
    return Section(heading, (Table.of("", columns, engines), why), chapter="found")


def _gaps(name: Column[DeploymentRecord], rows: Sequence[DeploymentRecord]) -> list[Table]:
    """Why deployments that do not tie with #1 are slower."""
    ratio: Column[DeploymentRecord] = number("of #1", lambda each: each.over_best, with_bounds)
    why: Column[DeploymentRecord] = text("gap to #1", lambda each: each.why)
    slower = [each for each in rows if each.why]
    return [Table.of("Gap to #1", (name, ratio, why), slower)] if slower else []


def _pareto(results: Results) -> Section:
    rows = results.select("projected", PARETO)
    table = Table.of("", (*_TPOT, *_TPS, _SEQS, *_costs(rows), _HOW), rows)
    return Section(
        "Pareto front: tokens/s against TPOT (screened)",
        (
            table,
            "No aggregated deployment has both more tokens/s and a lower TPOT than one of these.",
        ),
        chapter="found",
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
        chapter="why",
    )


def _run_it(results: Results) -> Section:
    found, best = results.plans[0], results.select("projected", BEST)[0]
    memory = best.pools[0]
    parts: list[str | Commands] = [
        f"Each rank holds {bytes_si(memory.weight_bytes or 0)} of weights, "
        f"{bytes_si(memory.activation_bytes or 0)} of activations and "
        f"{bytes_si(memory.sequence_bytes or 0)} of KV per full-length sequence."
    ]
    if found.experiment is not None:
        parts.append(
            f"To measure the best aggregated on such a cluster: expertlane compare "
            f"{found.experiment} (it runs no disaggregated pools)"
        )
    for each in engines_of(results):
        named_best = engine_best_named(each) if found.engine is None else ""
        lines: list[str | Figure] = []
        for command in each.commands:
            lines.append(Figure(command.label, command.lines))
            if command.note:
                lines.append(f"({command.note})")
        if named_best or lines:
            parts.append(Commands(named_best and f"{each.title}: {named_best}", tuple(lines)))
    if any(each.commands for each in engines_of(results)):
        parts.append(
            "HOST0, HOST1 … are the names of the nodes. The commands set the plan's limits: "
            "concurrent requests, tokens per step, and tokens per request with room above the mean."
        )
    return Section("Run it", tuple(parts), chapter="run")


def beside(results: Results, comparison: Comparison) -> Section:
    """A plan's best against an experiment's own deployments."""
    heading = "Projected: the planner's best"
    if not results.plans:
        return Section(heading, ("Not searched: the cluster has more than 96 devices.",))
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


def rival_of(results: Results) -> int | None:
    """Row number, from 1, of #1's rival; None without one."""
    found = results.plans[0].break_even
    if found is None:
        return None
    rows = [place for place, each in enumerate(rows_of(results), 1) if each.name == found.rival]
    return rows[0] if rows else None


def what_would_change(results: Results) -> Iterator[str]:
    """Sentences: break-even points, the loss of #1 beyond them, and what to measure first."""
    found, rival = results.plans[0].break_even, rival_of(results)
    if found is None or rival is None:
        return
    if found.levels:
        ahead = " and ".join(map(_ahead, found.levels))
        ends = [_at_end(each, rival) for each in found.levels if _is_lost(each)]
        lost = f"; {', '.join(ends)}" if ends else ""
        yield f"#1 stays above #{rival} {ahead} (screened){lost}."
    if found.unsure:
        share = percent(found.unsure_share)
        what = measurement(found.unsure)
        yield f"Measure first: {what}, {share} of the uncertainty of their ratio."


def _ahead(level: Level) -> str:
    """The range in which #1 is ahead."""
    figure = _FIGURES[level.varied].format
    if level.at is None:
        low, high = map(figure, level.tried)
        if level.varied == "skew":
            return f"at any skew up to {high}"
        return f"with {low} to {high} sequences"
    is_below = level.asked < level.at
    if level.varied == "skew":
        return f"{'below' if is_below else 'above'} skew {figure(level.at)}"
    return f"{'below' if is_below else 'above'} {figure(level.at)} sequences"


def _is_lost(level: Level) -> bool:
    """True if the rival leads beyond the break-even point by more than `_LEAST`."""
    over = level.over_at_end
    return level.at is not None and (over is None or over > 1 + _LEAST)


def _at_end(level: Level, rival: int) -> str:
    """The loss of #1 beyond the break-even point."""
    end = _FIGURES[level.varied].format(level.end)
    where = f"at skew {end}" if level.varied == "skew" else f"with {end} sequences"
    if level.over_at_end is None:
        return f"{where} #1 misses the limits"
    return f"{where} #{rival} has {percent(level.over_at_end - 1)} more tokens/s"


def measurement(unsure: str) -> str:
    """The source of an error in words, with the option or command that measures it."""
    if unsure in _ROUTING:
        return "the routing of your traffic (--routing-trace)"
    if unsure == _DRAFTS:
        return "how many drafts are accepted (--mtp-acceptance)"
    parts = unsure.split(".")
    words = _LAWS.get(unsure) or _LAWS.get(parts[-1])
    if words is None:
        words = " in ".join((_LAWS.get(parts[0], parts[0]), *parts[1:]))
    return f"{words} (expertlane calibrate)"
