"""The answer of `expertlane balance`: a placement of experts beside experts in order."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from expertlane.balance.trace import Comparison, PlacementScore
from expertlane.report.document import Answer, Column, Report, Section, Table, number, text
from expertlane.report.numbers import counted, percent, whole

_MOST_ROWS = 12  # layers in the answer


@dataclass(frozen=True)
class Evaluation:
    """A placement on a trace.

    Attributes:
        setting: model and placement, in a line.
        layers, total: before and after, layer by layer and over all.
        num_tokens: tokens of the trace; None where only loads of experts are known.
        num_nodes: nodes that ranks are on.
        is_own: whether the placement was made from this trace.
    """

    model: str
    setting: str
    layers: Sequence[Comparison]
    total: Comparison
    num_tokens: int | None
    num_nodes: int
    is_own: bool


def report_of(placed: Evaluation, command: str, created: str) -> Report:
    """The answer, and every layer."""
    table = partial(_table, placed)
    worst = sorted(placed.layers, key=lambda each: -each.before.max_over_mean)[:_MOST_ROWS]
    shown = sorted(worst, key=lambda each: each.layer or 0)
    title = ""
    if len(shown) < len(placed.layers):
        title = f"The {len(shown)} least balanced of {len(placed.layers)} layers, and all:"
    answer = Answer(
        placed.setting, _headline(placed), (table(title, shown), " ".join(_notes(placed)))
    )
    return Report(
        title=f"expertlane balance: {placed.model}",
        answer=answer,
        source="measured",
        command=command,
        created=created,
        sections=(
            Section(
                "Placement",
                (placed.setting, _headline(placed), table("", placed.layers), *_notes(placed)),
            ),
        ),
    )


def _headline(placed: Evaluation) -> str:
    before, after = placed.total.before.max_over_mean, placed.total.after.max_over_mean
    if placed.num_tokens == 0:
        return "The trace has no tokens: nothing to balance."
    if before == after:
        return f"Max/mean load of ranks stays {after:.3f}."
    change = percent(abs(after / before - 1))
    less = "less" if after < before else "more"
    return (
        f"Max/mean load of ranks {before:.3f} → {after:.3f}: the most loaded rank has {change} "
        f"{less}."
    )


def _table(placed: Evaluation, title: str, layers: Sequence[Comparison]) -> Table:
    """A row for each layer, then all of them; crossings where there are nodes to cross."""
    num_tokens = placed.num_tokens
    columns: list[Column[Comparison]] = [
        text("layer", lambda each: "all" if each.layer is None else str(each.layer)),
        number("max/mean before", lambda each: each.before.max_over_mean, "{:.3f}".format),
        number("after", lambda each: each.after.max_over_mean, "{:.3f}".format),
    ]
    if placed.num_nodes > 1 and num_tokens is not None:

        def per_token(each: Comparison, score: PlacementScore) -> float:
            of = len(placed.layers) if each.layer is None else 1
            return (score.cross_node_copies or 0) / max(num_tokens * of, 1)

        columns += [
            number("cross-node before", lambda each: per_token(each, each.before), "{:.3f}".format),
            number("after", lambda each: per_token(each, each.after), "{:.3f}".format),
        ]
    columns.append(number("to move", lambda each: each.num_moves, whole))
    return Table.of(title, columns, (*layers, placed.total))


def _notes(placed: Evaluation) -> list[str]:
    """Notes on the meaning of the numbers, and how far to trust them."""
    notes = ["Before: experts in order. To move: experts that ranks must fetch."]
    if placed.num_tokens is None:
        notes.append(
            "Only loads of experts are known, not tokens: what crosses nodes is not told, nor "
            "which experts are chosen together."
        )
    elif placed.num_nodes > 1:
        notes.append("Cross-node: copies of tokens sent to other nodes, per token and layer.")
        before, after = placed.total.before, placed.total.after
        if (after.cross_node_copies or 0) > (before.cross_node_copies or 0):
            is_price = after.max_over_mean < before.max_over_mean
            why = ": the price of balance." if is_price else ", and load is not better balanced."
            notes.append(f"Cross-node copies rose{why}")
    if placed.is_own:
        made_from = "loads"
        if placed.num_tokens is not None:
            made_from = counted(placed.num_tokens, "token")
        notes.append(
            f"Evaluation on the {made_from} it was made from, so optimistic: check it on another "
            "trace with --placement."
        )
    return notes
