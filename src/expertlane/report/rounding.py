"""Deployments that round hidden states on their way to experts, and so compute something else."""

from collections.abc import Iterable, Sequence

from expertlane.report.comparison import Row
from expertlane.report.numbers import figures
from expertlane.results.schema import DeploymentResult
from expertlane.spec.names import Phase


def error_in_words(error: float) -> str:
    """`0.165% (root mean square)`; `error`: over the root mean square of the hidden states."""
    return f"{figures(100 * error)}% (root mean square)"


def caveats(rows: Iterable[Row], phase: Phase) -> tuple[str, ...]:
    """One sentence for each of `rows` that rounds: it is not the same computation."""
    return tuple(
        f"{row.deployment.name} rounds hidden states to {row.deployment.options.payload} on their "
        f"way to experts, by {error_in_words(error)}: it does not compute quite the same."
        for row in rows
        if (error := row.deployment.traffic[phase].payload_error)
    )


def same_tokens(deployments: Sequence[DeploymentResult]) -> str:
    """Which deployments generated the same tokens, and which of the others round."""
    first = deployments[0]
    others = [
        (f"#{number}", _rounds(each))
        for number, each in enumerate(deployments, start=1)
        if each.tokens_sha256 != first.tokens_sha256
    ]
    num_all = len(deployments)
    if not others:
        return f"identical in all {num_all} deployments (SHA-256 {first.tokens_sha256[:12]})"
    equal = f"identical to the first deployment's in {num_all - len(others)} of {num_all}"
    if _rounds(first):
        names = ", ".join(name for name, _ in others)
        return f"{equal}; others with {names}: the first rounds hidden states"
    rounded = ", ".join(name for name, rounds in others if rounds)
    exact = ", ".join(name for name, rounds in others if not rounds)
    groups = (
        f"with {rounded} (hidden states are rounded)" if rounded else "",
        f"with {exact} (nothing is rounded)" if exact else "",
    )
    return f"{equal}; others {' and '.join(filter(None, groups))}"


def _rounds(deployment: DeploymentResult) -> bool:
    return any(seen.payload_error for seen in deployment.traffic.values())
