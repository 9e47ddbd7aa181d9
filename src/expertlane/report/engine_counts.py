"""Tables and plots of servers' own metrics, with the client's counts, and cautions from them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from expertlane.report.charts.curves import Axis, Curve, Point, curves_chart
from expertlane.report.document import Chart, Column, Section, Table, Words, number, text
from expertlane.report.loads import LoadPoint, Note
from expertlane.report.numbers import NONE, counted, percent, times, whole
from expertlane.results.engine_record import EngineRecord, GaugesRecord
from expertlane.results.estimate import Estimate

_UNEVEN = 1.2  # busiest rank over the mean: above it there is a note
_CACHED = 0.01  # share of cached prompt tokens: above it there is a note
_LEAST_SAMPLES, _MOST_SAMPLES = 3, 40  # of a curve over time
_MOST_CURVES = 8  # of a chart; with more ranks, a curve for each server


class _Load(NamedTuple):
    of: LoadPoint
    engine: EngineRecord


def _with_metrics(found: Sequence[LoadPoint]) -> list[_Load]:
    return [_Load(each, each.serving.engine) for each in found if each.serving.engine is not None]


def _agreement(engine: EngineRecord) -> str:
    if not engine.rounds:
        return NONE
    return "differs" if engine.differences else "same"


def _mean_running(engine: EngineRecord) -> float | None:
    running = [] if engine.gauges is None else engine.gauges.total("num_running")
    return sum(running) / len(running) if running else None


def _most_waiting(engine: EngineRecord) -> float | None:
    waiting = [] if engine.gauges is None else engine.gauges.total("num_waiting")
    return max(waiting, default=None)


_COLUMNS: tuple[Column[_Load], ...] = (
    text("server", lambda each: each.of.record.name),
    text("load", lambda each: each.of.load),
    text("metrics of", lambda each: each.engine.engine),
    number("requests", lambda each: each.engine.counts.num_requests, whole),
    number("prompt tokens", lambda each: each.engine.counts.num_prompt_tokens, whole),
    number("output tokens", lambda each: each.engine.counts.num_output_tokens, whole),
    text("client's counts", lambda each: _agreement(each.engine)),
    number("prefix cache hits", lambda each: each.engine.cached_share, percent),
    number("preemptions", lambda each: each.engine.counts.num_preemptions, whole),
    number("running, mean", lambda each: _mean_running(each.engine), "{:.1f}".format),
    number("waiting, max", lambda each: _most_waiting(each.engine), whole),
    number(
        "KV cache, max",
        lambda each: each.engine.gauges and each.engine.gauges.most_kv_usage,
        percent,
    ),
    number("ranks, max/mean", lambda each: each.engine.max_over_mean, times),
)


class _Rank(NamedTuple):
    of: LoadPoint
    rank: str
    engine: EngineRecord


_RANK_COLUMNS: tuple[Column[_Rank], ...] = (
    text("server", lambda each: each.of.record.name),
    text("load", lambda each: each.of.load),
    text("rank", lambda each: each.rank),
    number("requests", lambda each: each.engine.by_rank[each.rank].num_requests, whole),
    number("prompt tokens", lambda each: each.engine.by_rank[each.rank].num_prompt_tokens, whole),
    number("output tokens", lambda each: each.engine.by_rank[each.rank].num_output_tokens, whole),
    number("preemptions", lambda each: each.engine.by_rank[each.rank].num_preemptions, whole),
)


def counted_by_servers(found: Sequence[LoadPoint], doubts: Sequence[Note]) -> Section:
    """The section of servers' own metrics.

    Args:
        found: every load of every server.
        doubts: notes of `engine_notes`.
    """
    known = _with_metrics(found)
    parts: list[Words] = []
    if known:
        parts.append(Table.of("", _COLUMNS, known))
        parts.append(
            "Increase of the server's counters over the rounds, without warm-up. Gauges were read "
            "every half second, or less often where reading takes long."
        )
    ranks = [_Rank(each.of, rank, each.engine) for each in known for rank in each.engine.by_rank]
    if any(len(each.engine.by_rank) > 1 for each in known):
        parts.append(Table.of("By data-parallel rank", _RANK_COLUMNS, ranks))
    parts += [f"{subject}: {sentence}." for subject, sentence in doubts]
    silent = dict.fromkeys(each.record.name for each in found if each.serving.engine is None)
    if silent:
        parts.append(f"No known engine's metrics at /metrics: {', '.join(silent)}.")
    return Section("Server metrics (measured)", tuple(parts), chapter="sure")


def over_time(found: Sequence[LoadPoint]) -> Section:
    """The section of plots of servers' gauges over time, in the last round of each load."""
    drawn = [
        _gauge(found, "num_running", "running requests", "{} running requests"),
        _gauge(found, "num_waiting", "waiting requests", "{} waiting requests"),
        _gauge(found, "kv_usage", "KV cache in use, %", "{}% of the KV cache in use", 100.0),
    ]
    heading = "Server metrics over time (measured)"
    return Section(heading, tuple(filter(None, drawn)), "plots", "sure")


def _gauge(
    found: Sequence[LoadPoint], name: str, what: str, title: str, scale: float = 1.0
) -> Chart | None:
    """A gauge over time, by server and data-parallel rank; None if it is unknown, or always 0.

    Args:
        name: a field of `RankGauges`.
        title: what is said of the highest sample, with a place for it.
        scale: factor from the gauge to what is drawn.
    """
    curves: list[Curve] = []
    for is_by_rank in (True, False):
        curves = []
        for each in _with_metrics(found):
            gauges, named = each.engine.gauges, at(found, each.of)
            if gauges is None:
                continue
            series = _series(gauges, name, is_by_rank=is_by_rank)
            for rank, values in series.items():
                where = f"{named}, rank {rank}" if len(series) > 1 else named
                curves.append(Curve(where, _points(gauges, values, scale)))
        if len(curves) <= _MOST_CURVES:
            break
    curves = [each for each in curves if len(each.points) >= _LEAST_SAMPLES]
    num_all, curves = len(curves), curves[:_MOST_CURVES]
    if not any(point.y.value for each in curves for point in each.points):
        return None
    highest = max(curves, key=lambda each: max(point.y.value for point in each.points))
    most = max(point.y.value for point in highest.points)
    return curves_chart(
        f"At most {title.format(f'{most:,.4g}')}, at {highest.name}",
        Axis("seconds since the start of the last round"),
        Axis(what),
        curves,
        note=f"The first {len(curves)} of {num_all}." if num_all > len(curves) else "",
    )


def _series(gauges: GaugesRecord, name: str, *, is_by_rank: bool) -> dict[str, Sequence[float]]:
    """A gauge's samples by rank; or those of all ranks: the sum of requests, the fullest cache."""
    series = {rank: getattr(each, name) for rank, each in gauges.ranks.items()}
    series = {rank: values for rank, values in series.items() if values}
    if is_by_rank or not series:
        return series
    joined: Callable[[Iterable[float]], float] = max if name == "kv_usage" else sum
    return {"": [*map(joined, zip(*series.values(), strict=True))]}


def _points(gauges: GaugesRecord, values: Sequence[float], scale: float) -> tuple[Point, ...]:
    """The samples of the last round; of many, some at equal distances."""
    last = max(gauges.rounds, default=0)
    own = [
        Point(time_s, Estimate(scale * value))
        for round_, time_s, value in zip(gauges.rounds, gauges.times_s, values, strict=True)
        if round_ == last
    ]
    return tuple(own[:: -(-len(own) // _MOST_SAMPLES) or 1])


def engine_notes(
    found: Sequence[LoadPoint], *, shares_prefixes: bool, seed: str = "another --seed"
) -> Iterator[Note]:
    """Cautions from the servers' metrics: one of each kind, for the worst load.

    Args:
        shares_prefixes: True if requests of the load share prefixes, so that cache hits are wanted.
        seed: what gives other prompts, in words.
    """
    known = _with_metrics(found)
    differing = [each for each in known if each.engine.differences]
    others = [each for each in known if each.engine.num_others]
    if others:
        worst = max(others, key=lambda each: each.engine.num_others)
        yield (
            "Other traffic",
            f"the server also completed {counted(worst.engine.num_others, 'request')} of other "
            f"clients at {at(found, worst.of)}: they slow what was measured",
        )
    elif differing:
        worst = differing[0]
        first = worst.engine.differences[0]
        yield (
            "Counts",
            f"in a round at {at(found, worst.of)} the server counted {first.engine:,} "
            f"{first.what}, the client {first.client:,}",
        )
    cached = [each for each in known if (each.engine.cached_share or 0.0) > _CACHED]
    if cached and not shares_prefixes:
        worst = max(cached, key=lambda each: each.engine.cached_share or 0.0)
        yield (
            "Prefix cache",
            f"{percent(worst.engine.cached_share or 0.0)} of prompt tokens at "
            f"{at(found, worst.of)} were in the prefix cache from earlier requests, so that "
            f"prefill is faster than with new prompts: repeat with {seed}, or with --flush-caches",
        )
    full = [each for each in known if each.engine.counts.num_preemptions]
    if full:
        worst = max(full, key=lambda each: each.engine.counts.num_preemptions or 0)
        yield (
            "KV cache",
            f"was full: {counted(worst.engine.counts.num_preemptions or 0, 'preemption')} at "
            f"{at(found, worst.of)}; the memory for it is part of what was compared",
        )
    uneven = [each for each in known if (each.engine.max_over_mean or 1.0) > _UNEVEN]
    if uneven:
        worst = max(uneven, key=lambda each: each.engine.max_over_mean or 1.0)
        work = worst.engine.work_by_rank
        num_idle = sum(not each for each in work.values())
        idle = f"; {num_idle} of {len(work)} had no work" if num_idle else ""
        yield (
            "Ranks",
            f"the busiest data-parallel rank had {times(worst.engine.max_over_mean or 1.0)} the "
            f"mean work at {at(found, worst.of)}{idle}",
        )


def at(found: Sequence[LoadPoint], each: LoadPoint) -> str:
    """The load in words, with the server's name if there are several."""
    several = len({id(one.record) for one in found}) > 1
    return f"{each.load} of {each.record.name}" if several else each.load
