"""The routing that a user asks for: a trace, or a power law of popularity."""

from dataclasses import dataclass
from pathlib import Path

from expertlane.balance.trace import read_trace
from expertlane.cost.routing import PowerLawRouting, RoutingSource, TraceRouting
from expertlane.errors import UserError
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import take_option


@dataclass(frozen=True)
class RoutingChoice:
    """Where the experts that tokens choose come from.

    Args:
        option: what was asked for, as a user would ask again.
        words: for a list of assumptions.
    """

    source: RoutingSource
    option: str
    words: str


def choose_routing(
    model: ModelConfig,
    trace: Path | None,
    skew: float,
    seed: int = 0,
    num_sampled_layers: int = 4,
) -> RoutingChoice:
    """A trace, else experts whose popularity falls with their rank to the power of -`skew`.

    Args:
        num_sampled_layers: for a power law; see `PowerLawRouting.of`.

    Raises:
        UserError: both are given, or the trace is damaged, empty or of other sizes.
    """
    take_option("--skew", skew)
    if trace is None:
        source = PowerLawRouting.of(model, skew, seed, num_sampled_layers)
        words = (
            f"popularity falls by an expert's rank to the power of -{skew:g}, in an order drawn "
            "by layer"
            if skew
            else "every expert is as popular; real traffic is not, so this is the best case"
        )
        if model.routing.n_group > 1:
            words += (
                f"; within the best {model.routing.topk_group} of {model.routing.n_group} groups "
                "of each token"
            )
        return RoutingChoice(source, f"--skew {skew:g}", words)
    if skew:
        raise UserError("--routing-trace and --skew exclude each other")
    read = read_trace(trace)
    if not read.num_tokens:
        raise UserError(f"{trace}: the trace has no tokens")
    sizes = (read.num_experts, read.num_experts_per_tok)
    if sizes != (model.num_experts, model.num_experts_per_tok):
        raise UserError(
            f"{trace} is of {sizes[1]} of {sizes[0]} experts a token; {model.name} has "
            f"{model.num_experts_per_tok} of {model.num_experts}"
        )
    words = f"{read.num_tokens:,} recorded tokens in turn, over and over"
    return RoutingChoice(TraceRouting(read), f"--routing-trace {trace}", words)
