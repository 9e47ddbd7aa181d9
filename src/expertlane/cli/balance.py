"""`expertlane balance`: how even a placement of experts is on a routing trace, and a better one."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from expertlane.cli.options import takes_groups
from expertlane.cli.output import print_json, print_message, stdout_console
from expertlane.errors import UserError, naming
from expertlane.spec.files import strict_json
from expertlane.spec.printable import printable
from expertlane.spec.ranges import take

if TYPE_CHECKING:
    from rich.console import Console

    from expertlane.balance.judge import Comparison, PlacementScore
    from expertlane.balance.placement import Placement
    from expertlane.balance.trace import RoutingTrace

_MAX_ROWS = 20  # layers in the table


@dataclass(frozen=True, kw_only=True)
class _Options:
    trace: Path = typer.Argument(help="A routing trace (.npz).")
    ranks: int = typer.Option(
        ...,
        metavar="N",
        help="Expert-parallel ranks; ranks that share a sharded expert count as one.",
    )
    ranks_per_node: int | None = typer.Option(
        None,
        metavar="N",
        help="Expert-parallel ranks per node. Default: all on one node.",
    )
    num_redundant_experts: int = typer.Option(
        0, metavar="N", help="Copies of experts beside each MoE layer's own, to share load."
    )
    method: Literal["auto", "linear", "round_robin"] = typer.Option(
        "auto", help="auto: balance by load; linear, round_robin: in order."
    )
    placement: Path | None = typer.Option(
        None, metavar="FILE", help="Evaluate this placement instead of making one."
    )
    no_coactivation: bool = typer.Option(
        False,
        "--no-coactivation",
        help="Balance load only; ignore which experts are chosen together.",
    )
    output: Path | None = typer.Option(None, metavar="FILE", help="Write the new placement (JSON).")
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables.")
    per_node: int = field(init=False)  # ranks

    def __post_init__(self) -> None:
        per_node = self.ranks if self.ranks_per_node is None else self.ranks_per_node
        if per_node < 1 or self.ranks % per_node:
            raise UserError(
                f"--ranks-per-node is {per_node}; it must divide --ranks, which is {self.ranks}"
            )
        object.__setattr__(self, "per_node", per_node)
        if self.placement is not None and (
            self.method != "auto"
            or self.num_redundant_experts
            or self.no_coactivation
            or self.output
        ):
            raise UserError(
                "--placement evaluates a placement as it is; valid without --method, "
                "--num-redundant-experts, --no-coactivation and --output"
            )


@takes_groups
def balance(own: _Options) -> None:
    """Place a model's experts so that ranks are evenly loaded and few tokens cross nodes.

    Reads which experts each token of a trace chose. Compares experts placed in order (before)
    with the new placement (after), both evaluated on the whole trace; needs no model and no GPU.

    \b
    max/mean  load of the most loaded rank over the mean; 1 is balanced, at 2 the experts of a
              layer take twice as long
    cross-node copies of tokens sent to another node, per token and layer; tokens start on the
              nodes in turn
    to move   experts that ranks must fetch to get from before to after

    \b
    Examples:
      expertlane balance trace.npz --ranks 16
          how uneven is it, and how even could it be?
      expertlane balance trace.npz --ranks 16 --ranks-per-node 8 --num-redundant-experts 16
          with 16 redundant experts per layer, on two nodes
      expertlane balance trace.npz --ranks 16 --num-redundant-experts 16 --output placement.json
          keep the placement
      expertlane balance other.npz --ranks 16 --placement placement.json
          does it hold on another trace?
      expertlane balance trace.npz --ranks 16 --json | jq '.total.after'
          for other programs
    """
    from expertlane.balance.trace import read_trace

    read = read_trace(own.trace)
    take(
        "num_slots",
        own.num_redundant_experts + read.num_experts,
        f"--num-redundant-experts {own.num_redundant_experts}: physical experts",
    )
    if own.placement is None:
        after = _made(read, own)
        num_redundant = own.num_redundant_experts
    else:
        after = _read(own.placement, read, own.ranks)
        num_redundant = max(each.num_slots for each in after) - read.num_experts
    before = _linear(read, own.ranks, num_redundant)
    _publish(read, before, after, own)


def _made(trace: "RoutingTrace", own: _Options) -> "list[Placement]":
    from expertlane.balance.judge import coactivation
    from expertlane.balance.placement import Placement
    from expertlane.balance.planner import plan_placement

    num_experts, num_layers = trace.num_experts, len(trace.layers)
    redundant = own.num_redundant_experts
    with naming(f"--num-redundant-experts {redundant}, --ranks {own.ranks}"):
        if own.method == "linear":
            return _linear(trace, own.ranks, redundant)
        if own.method == "round_robin":
            return [Placement.round_robin(num_experts, own.ranks, redundant)] * num_layers
        together = None
        if not own.no_coactivation and own.ranks > own.per_node:
            together = [coactivation(ids, num_experts) for ids in trace.topk_ids]
        return plan_placement(trace.load(), own.ranks, own.per_node, redundant, together)


def _linear(trace: "RoutingTrace", ranks: int, redundant: int) -> "list[Placement]":
    from expertlane.balance.placement import Placement

    return [Placement.linear(trace.num_experts, ranks, redundant)] * len(trace.layers)


def _read(path: Path, trace: "RoutingTrace", ranks: int) -> "list[Placement]":
    from expertlane.balance.placement_file import read_placement

    found = read_placement(path)
    found.check(
        path, model=trace.model, num_experts=trace.num_experts, layers=trace.layers, ep=ranks
    )
    return list(found.layers.values())


def _publish(
    trace: "RoutingTrace",
    before: "list[Placement]",
    after: "list[Placement]",
    own: _Options,
) -> None:
    from expertlane.balance.judge import compare
    from expertlane.balance.moves import keep_slots
    from expertlane.balance.placement_file import ModelPlacement, write_placement

    after = keep_slots(before, after)
    compared = compare(trace, before, after, own.per_node)
    if own.output is not None:
        layers = dict(zip(trace.layers, after, strict=True))
        write_placement(ModelPlacement(trace.model, trace.num_experts, layers), own.output)
    if own.as_json:
        shown = {
            "model": trace.model,
            "num_experts": trace.num_experts,
            "num_experts_per_tok": trace.num_experts_per_tok,
            "num_tokens": trace.num_tokens,
            "ep": before[0].ep,
            "ranks_per_node": own.per_node,
            "num_slots": max(each.num_slots for each in after),
            "layers": [asdict(each) for each in compared[:-1]],
            "total": asdict(compared[-1]),
        }
        print_json(strict_json(shown) + "\n")
    else:
        title = _title(trace, after, own.per_node)
        _show(title, compared, trace.num_tokens, stdout_console())
    if own.output is not None:
        print_message(f"written: {own.output}")


def _title(trace: "RoutingTrace", placements: "list[Placement]", ranks_per_node: int) -> str:
    """Three lines, each short enough for a narrow terminal."""
    from expertlane.report.numbers import counted

    ep, num_slots = placements[0].ep, max(each.num_slots for each in placements)
    return (
        f"expertlane balance: {trace.model}\n"
        f"{counted(trace.num_tokens, 'token')}, {trace.num_experts_per_tok} of "
        f"{trace.num_experts} experts each\n"
        f"{counted(ep, 'rank')} on {counted(ep // ranks_per_node, 'node')}, "
        f"{num_slots:,} physical experts per layer"
    )


def _show(title: str, compared: "list[Comparison]", num_tokens: int, console: "Console") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    *layers, total = compared
    shown = sorted(layers, key=lambda each: -each.before.max_over_mean)[:_MAX_ROWS]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("layer")
    for heading in ("max/mean before", "after", "cross-node before", "after", "to move"):
        table.add_column(Text(heading), justify="right")
    for each in sorted(shown, key=lambda each: each.layer or 0):
        table.add_row(*_row(str(each.layer), each, num_tokens))
    table.add_section()
    table.add_row(*_row("all", total, num_tokens * len(layers)))
    console.print(Text(printable(title, keep="\n"), style="bold"))
    console.print()
    console.print(table)
    console.print()
    if len(layers) > len(shown):
        console.print(f"The {len(shown)} least balanced of {len(layers)} layers; all: all layers.")
    console.print(
        "Before: experts in order. Cross-node: copies to other nodes, per token and layer."
    )
    if (line := _more_crossings(total, num_tokens * len(layers))) is not None:
        console.print(line)


def _more_crossings(total: "Comparison", num_tokens: int) -> str | None:
    """That crossings rose, and what for; None where they did not.

    Args:
        num_tokens: counted once a layer.
    """
    before, after = total.before, total.after
    if after.cross_node_copies <= before.cross_node_copies:
        return None
    was, now = (_crossings(each, num_tokens) for each in (before, after))
    rose = f"Cross-node copies rose from {was} to {now}"
    if after.max_over_mean < before.max_over_mean:
        return f"{rose}: the price of balance."
    return f"{rose}, and load is not better balanced."


def _row(name: str, each: "Comparison", num_tokens: int) -> list[str]:
    before, after = each.before, each.after
    return [
        name,
        f"{before.max_over_mean:.3f}",
        f"{after.max_over_mean:.3f}",
        _crossings(before, num_tokens),
        _crossings(after, num_tokens),
        f"{each.num_moves:,}",
    ]


def _crossings(score: "PlacementScore", num_tokens: int) -> str:
    return f"{score.cross_node_copies / max(num_tokens, 1):.3f}"
