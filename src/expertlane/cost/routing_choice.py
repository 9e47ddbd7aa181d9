"""The routing that a user names: `uniform`, `power:0.6`, or a trace."""

import math
import os
from pathlib import Path

from expertlane.balance.trace import read_trace
from expertlane.cost.routing import PowerLawRouting, RoutingSource, TraceRouting
from expertlane.errors import UserError
from expertlane.spec.model import ModelConfig

_UNIFORM = "uniform"
_POWER = "power:"


def choose_routing(text: str, model: ModelConfig, seed: int = 0) -> RoutingSource:
    """Where the experts that tokens choose come from.

    Raises:
        UserError: it is none of the three, or the trace is damaged, empty or of another model.
    """
    text = text.strip()
    if text == _UNIFORM:
        return PowerLawRouting.of(model, 0.0, seed)
    if text.startswith(_POWER):
        return PowerLawRouting.of(model, _alpha(text), seed)
    if not os.path.isfile(text):
        raise UserError(
            f"--routing is {text!r}, and there is no such file; valid: uniform, power:ALPHA, or a "
            "trace of expertlane generate --record-routing"
        )
    trace = read_trace(Path(text))
    if not trace.num_tokens:
        raise UserError(f"{text}: the trace has no tokens")
    for name, theirs, ours in (
        ("experts", trace.num_experts, model.num_experts),
        ("experts per token", trace.num_experts_per_tok, model.num_experts_per_tok),
    ):
        if theirs != ours:
            raise UserError(
                f"{text} is of {trace.model} with {theirs} {name}; {model.name} has {ours}"
            )
    return TraceRouting(trace)


def _alpha(text: str) -> float:
    try:
        alpha = float(text.removeprefix(_POWER))
    except ValueError:
        alpha = math.nan
    if not 0 <= alpha < math.inf:
        raise UserError(f"--routing is {text!r}; ALPHA must be a number, 0 or more: power:0.6")
    return alpha
