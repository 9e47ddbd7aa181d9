"""What would change a plan's answer, in words: where #1 and its rival are level."""

from collections.abc import Iterator

from expertlane.report.numbers import percent
from expertlane.report.planning import rows_of
from expertlane.results.break_even import Level
from expertlane.results.results import Results

_FIGURES = {"skew": "{:.2g}", "sequences": "{:,.0f}"}
_LEAST = 0.01  # of tokens a second
_ROUTING = "drawn experts", "skew of experts"
_DRAFTS = "acceptance of drafts"
_LAWS = {
    "driver_s": "the host's time between steps",
    "driver_per_rank_s": "the host's time for each rank",
    "dp_sync_s": "how long data-parallel ranks take to agree",
    "gemm": "matrix products",
    "experts": "products of experts",
    "prefill_attention": "attention of prompts",
    "decode_attention": "attention of decodes",
    "latent_prefill": "attention of prompts",
    "latent_decode": "attention of decodes",
    "memory": "norms and copies",
    "intra_node": "transfers inside a node",
    "inter_node": "transfers between nodes",
}


def rival_of(results: Results) -> int | None:
    """The row, from 1, that #1 is held against; None of a plan without one."""
    found = results.plans[0].break_even
    if found is None:
        return None
    rows = [place for place, each in enumerate(rows_of(results), 1) if each.name == found.rival]
    return rows[0] if rows else None


def what_would_change(results: Results) -> Iterator[str]:
    """Where #1 and its rival are level, what is lost beyond, and what to measure first."""
    found, rival = results.plans[0].break_even, rival_of(results)
    if found is None or rival is None:
        return
    if found.levels:
        ahead = " and ".join(map(_ahead, found.levels))
        ends = [_at_end(each, rival) for each in found.levels if _is_lost(each)]
        lost = f"; {', '.join(ends)}" if ends else ""
        yield f"#1 leads #{rival} {ahead} (screened){lost}."
    if found.unsure:
        share = percent(found.unsure_share)
        yield f"Measure first: {measurement(found.unsure)}, {share} of what is unsure between them."


def _ahead(level: Level) -> str:
    """Where #1 is ahead."""
    figure = _FIGURES[level.varied].format
    if level.at is None:
        low, high = map(figure, level.tried)
        if level.varied == "skew":
            return f"at any skew up to {high}"
        return f"with {low} to {high} sequences"
    is_below = level.asked < level.at
    if level.varied == "skew":
        return f"{'under' if is_below else 'over'} skew {figure(level.at)}"
    return f"{'under' if is_below else 'over'} {figure(level.at)} sequences"


def _is_lost(level: Level) -> bool:
    """Whether the guess matters."""
    over = level.over_at_end
    return level.at is not None and (over is None or over > 1 + _LEAST)


def _at_end(level: Level, rival: int) -> str:
    """What is lost beyond."""
    end = _FIGURES[level.varied].format(level.end)
    where = f"at skew {end}" if level.varied == "skew" else f"with {end} sequences"
    if level.over_at_end is None:
        return f"{where} #1 keeps no limit"
    return f"{where} #{rival} has {percent(level.over_at_end - 1)} more"


def measurement(unsure: str) -> str:
    """An error in words, with what tells more of it."""
    if unsure in _ROUTING:
        return "the routing of your traffic (--routing-trace)"
    if unsure == _DRAFTS:
        return "how many drafts are accepted (--mtp-acceptance)"
    parts = unsure.split(".")
    words = _LAWS.get(unsure) or _LAWS.get(parts[-1])
    if words is None:
        words = " in ".join((_LAWS.get(parts[0], parts[0]), *parts[1:]))
    return f"{words} (expertlane calibrate)"
