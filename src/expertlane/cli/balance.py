"""`expertlane balance`: how even a placement of experts is on a routing trace, and a better one."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from expertlane.cli.help import Panel
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.options import (
    MODEL_HELP,
    NUM_REDUNDANT,
    known_models,
    placement_option,
    ranks_per_node_option,
)
from expertlane.cli.output import (
    AnswerOptions,
    Call,
    command_line,
    may_be_lost,
    now,
    print_report,
    print_written,
    slug,
)
from expertlane.errors import UserError, naming
from expertlane.spec.files import strict_json
from expertlane.spec.ranges import take

if TYPE_CHECKING:
    from expertlane.balance.engine_routing import Routing
    from expertlane.balance.placement import Placement
    from expertlane.report.placement import Evaluation

_FILE = "placement.json"


@dataclass(frozen=True, kw_only=True)
class _Options:
    panel: ClassVar = Panel.DEPLOYMENT
    trace: Path = typer.Argument(
        metavar="ROUTING_TRACE",
        help="Trace of expertlane generate --record-routing; SGLang's expert distribution record "
        "(.pt); or responses of vLLM or SGLang with routed experts (JSON).",
    )
    model: str | None = typer.Option(
        None,
        metavar="MODEL",
        autocompletion=known_models,
        show_default="the one that the file names",
        help=f"{MODEL_HELP} Needed for responses; for SGLang's record it is only a name.",
    )
    ep_ranks: int = typer.Option(
        ..., "--ep", help="Expert-parallel ranks; ranks that share a sharded expert count as one."
    )
    ranks_per_node: int | None = ranks_per_node_option(None, "all on one node")
    num_redundant_experts: int = NUM_REDUNDANT
    placement: str | None = placement_option(None, "one that balances the trace, written")
    no_coactivation: bool = typer.Option(
        False,
        rich_help_panel=Panel.MORE_DEPLOYMENT,
        help="Balance load only; ignore which experts are chosen together.",
    )
    per_node: int = field(init=False)  # ranks

    def __post_init__(self) -> None:
        per_node = self.ep_ranks if self.ranks_per_node is None else self.ranks_per_node
        if per_node < 1 or self.ep_ranks % per_node:
            raise UserError(
                f"--ranks-per-node is {per_node}; it must divide --ep, which is {self.ep_ranks}"
            )
        object.__setattr__(self, "per_node", per_node)
        if self.placement is not None and self.no_coactivation:
            raise UserError("--no-coactivation is for a new placement; leave --placement out")
        if self.is_file and self.num_redundant_experts:
            raise UserError(
                f"--num-redundant-experts is {self.num_redundant_experts}, but {self.placement} "
                "says which copies there are"
            )

    @property
    def is_file(self) -> bool:
        """True if `--placement` names a file."""
        return self.placement not in (None, "linear", "round_robin")


@takes_groups
def balance(own: _Options, output_options: AnswerOptions) -> None:
    """Place a model's experts so that ranks are evenly loaded and few tokens cross nodes.

    Reads which experts each token of a trace chose. Compares experts placed in order (before)
    with the new placement (after), both evaluated on the whole trace, and writes the new one to
    placement.json; needs no model and no GPU.

    \b
    max/mean    load of the most loaded rank over the mean; 1 is balanced, at 2
                the experts of a layer take twice as long
    cross-node  copies of tokens sent to another node, per token and layer;
                tokens start on the nodes in turn
    to move     experts that ranks must fetch to get from before to after

    \b
    Examples:
      expertlane balance routing.npz --ep 16
          how uneven is it, and how even could it be?
      expertlane balance routing.npz --ep 16 --ranks-per-node 8 \\
          --num-redundant-experts 16
          with 16 redundant experts per layer, on two nodes
      expertlane balance other.npz --ep 16 --placement mine/placement.json
          does it hold on another trace?
      expertlane balance routing.npz --ep 16 --json | jq '.total.after'
          for other programs
    """
    from expertlane.balance.holding import ModelPlacement, write_placement
    from expertlane.balance.placement import keep_slots
    from expertlane.report.placement import report_of

    read = _routing(own)
    take(
        "num_slots",
        own.num_redundant_experts + read.num_experts,
        f"--num-redundant-experts {own.num_redundant_experts}: physical experts",
    )
    if own.is_file:
        if output_options.out is not None:
            raise UserError(f"--out is for a new placement; {own.placement} is only evaluated")
        folder = None
        after = _read(Path(own.placement or ""), read, own.ep_ranks)
        num_redundant = max(each.num_slots for each in after) - read.num_experts
    else:
        folder = Call.typed(output_options).folder(slug("balance", read.model))
        after = _made(read, own)
        num_redundant = own.num_redundant_experts
    before = _linear(read, own.ep_ranks, num_redundant)
    after = keep_slots(before, after)
    if folder is not None:
        layers = dict(zip(read.layers, after, strict=True))
        write_placement(ModelPlacement(read.model, read.num_experts, layers), folder / _FILE)
    placed = _evaluated(read, before, after, own)
    report = report_of(placed, command_line(), now())
    with nullcontext() if folder is None else may_be_lost():
        print_report(report, output_options, None, lambda: _json(read, after, placed, own))
    if folder is not None:
        print_written([folder / _FILE])


def _routing(own: _Options) -> "Routing":
    """The file's trace or loads; answers alone need the model's configuration."""
    from expertlane.balance.engine_routing import is_answers, read_routing
    from expertlane.cli.model import find_model

    model = None
    if own.model is not None and is_answers(own.trace):
        model = find_model(own.model, weights=False).config
    return read_routing(own.trace, model, own.model)


def _made(trace: "Routing", own: _Options) -> "list[Placement]":
    from expertlane.balance.placement import Placement
    from expertlane.balance.planner import plan_placement
    from expertlane.balance.trace import coactivation

    num_experts, num_layers = trace.num_experts, len(trace.layers)
    redundant = own.num_redundant_experts
    with naming(f"--num-redundant-experts {redundant}, --ep {own.ep_ranks}"):
        if own.placement == "linear":
            return _linear(trace, own.ep_ranks, redundant)
        if own.placement == "round_robin":
            return [Placement.round_robin(num_experts, own.ep_ranks, redundant)] * num_layers
        together = None
        chosen = None if own.no_coactivation else trace.topk_ids
        if chosen is not None and own.ep_ranks > own.per_node:
            together = [coactivation(ids, num_experts) for ids in chosen]
        return plan_placement(trace.load(), own.ep_ranks, own.per_node, redundant, together)


def _linear(trace: "Routing", ranks: int, redundant: int) -> "list[Placement]":
    from expertlane.balance.placement import Placement

    return [Placement.linear(trace.num_experts, ranks, redundant)] * len(trace.layers)


def _read(path: Path, trace: "Routing", ranks: int) -> "list[Placement]":
    from expertlane.balance.holding import read_placement

    found = read_placement(path)
    found.check(
        path, model=trace.model, num_experts=trace.num_experts, layers=trace.layers, ep=ranks
    )
    return list(found.layers.values())


def _evaluated(
    trace: "Routing", before: "list[Placement]", after: "list[Placement]", own: _Options
) -> "Evaluation":
    from expertlane.balance.trace import RoutingTrace, compare
    from expertlane.report.numbers import counted
    from expertlane.report.placement import Evaluation

    *layers, total = compare(
        trace.layers, trace.load(), trace.topk_ids, before, after, own.per_node
    )
    num_nodes = own.ep_ranks // own.per_node
    setting = (
        f"{trace.model} | {_size(trace)} | EP {own.ep_ranks} on {counted(num_nodes, 'node')}, "
        f"{max(each.num_slots for each in after):,} physical experts per layer"
    )
    is_own = own.placement is None
    num_tokens = trace.num_tokens if isinstance(trace, RoutingTrace) else None
    return Evaluation(trace.model, setting, layers, total, num_tokens, num_nodes, is_own)


def _size(trace: "Routing") -> str:
    from expertlane.balance.trace import RoutingTrace
    from expertlane.report.numbers import counted

    if isinstance(trace, RoutingTrace):
        return (
            f"{counted(trace.num_tokens, 'token')}, {trace.num_experts_per_tok} of "
            f"{trace.num_experts} experts each"
        )
    return f"{trace.num_choices:,} choices in a layer, of {trace.num_experts} experts"


def _json(
    trace: "Routing", placements: "list[Placement]", placed: "Evaluation", own: _Options
) -> str:
    shown = {
        "model": trace.model,
        "num_experts": trace.num_experts,
        "num_experts_per_tok": trace.num_experts_per_tok,
        "num_tokens": placed.num_tokens,
        "ep": own.ep_ranks,
        "ranks_per_node": own.per_node,
        "num_slots": max(each.num_slots for each in placements),
        "layers": [asdict(each) for each in placed.layers],
        "total": asdict(placed.total),
    }
    return strict_json(shown) + "\n"
