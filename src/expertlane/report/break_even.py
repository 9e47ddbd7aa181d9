"""Break-even points of a plan's #1 and its rival, in words."""

from collections.abc import Iterator

from expertlane.report.numbers import percent
from expertlane.report.planning import rows_of
from expertlane.results.results import Level, Results

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
