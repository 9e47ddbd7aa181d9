"""Gains and factors of each deployment, against the first and against the best baseline."""

from dataclasses import dataclass

from expertlane.results.schema import DeploymentResult, PhaseResult, Quantiles, Results
from expertlane.spec.names import Phase


@dataclass(frozen=True)
class Gain:
    """One deployment against another.

    Attributes:
        tps: more tokens per second; negative is fewer.
        throughput_factor: over the other's TPS; above 1 is faster.
        latency_s: more seconds a token; negative is faster.
        latency_factor: the other's latency over this one's; above 1 is faster.
    """

    tps: float
    throughput_factor: float
    latency_s: float
    latency_factor: float


@dataclass(frozen=True)
class Row:
    """One deployment in the compared phase.

    Attributes:
        number: its place in the tables, from 1.
        latency_s: TPOT, or TTFT where nothing was decoded.
        against_best: None where no deployment is a baseline.
    """

    number: int
    deployment: DeploymentResult
    phase: PhaseResult
    latency_s: Quantiles
    against_first: Gain
    against_best: Gain | None


@dataclass(frozen=True)
class Comparison:
    """All deployments in one phase: decode, or prefill where nothing was decoded.

    Attributes:
        best_baseline: the baseline of the highest TPS, or None.
    """

    phase: Phase
    rows: tuple[Row, ...]
    best_baseline: Row | None

    @property
    def latency_name(self) -> str:
        """What the latency is called."""
        return "TPOT" if self.phase is Phase.DECODE else "TTFT"

    @property
    def fastest(self) -> Row:
        """Of the highest TPS."""
        return max(self.rows, key=lambda row: row.phase.tps)

    @property
    def best_proposal(self) -> Row | None:
        """The fastest that is no baseline, or None."""
        proposals = [row for row in self.rows if not row.deployment.is_baseline]
        return max(proposals, key=lambda row: row.phase.tps, default=None)


def compare(results: Results) -> Comparison:
    """Set the deployments of one results file against each other."""
    deployments = results.deployments
    decoded = all(deployment.decode for deployment in deployments)
    phase = Phase.DECODE if decoded else Phase.PREFILL
    first = deployments[0]
    baselines = [deployment for deployment in deployments if deployment.is_baseline]
    best = max(baselines, key=lambda baseline: phase_of(baseline, phase).tps, default=None)
    rows = tuple(
        Row(
            number=number,
            deployment=deployment,
            phase=phase_of(deployment, phase),
            latency_s=latency_of(deployment, phase),
            against_first=gain(deployment, first, phase),
            against_best=gain(deployment, best, phase) if best else None,
        )
        for number, deployment in enumerate(deployments, start=1)
    )
    best_row = next((row for row in rows if row.deployment is best), None)
    return Comparison(phase, rows, best_row)


def gain(deployment: DeploymentResult, other: DeploymentResult, phase: Phase) -> Gain:
    """What `deployment` gains over `other`."""
    tps, other_tps = phase_of(deployment, phase).tps, phase_of(other, phase).tps
    latency_s, other_s = latency_of(deployment, phase).median, latency_of(other, phase).median
    return Gain(tps - other_tps, tps / other_tps, latency_s - other_s, other_s / latency_s)


def phase_of(deployment: DeploymentResult, phase: Phase) -> PhaseResult:
    """Its prefill or its decode.

    Raises:
        ValueError: it decoded nothing.
    """
    result = deployment.prefill if phase is Phase.PREFILL else deployment.decode
    if result is None:
        raise ValueError(f"{deployment.name} decoded nothing")
    return result


def latency_of(deployment: DeploymentResult, phase: Phase) -> Quantiles:
    """Its TTFT or its TPOT.

    Raises:
        ValueError: it decoded nothing.
    """
    if phase is Phase.PREFILL:
        return deployment.prefill.ttft_s
    if deployment.decode is None:
        raise ValueError(f"{deployment.name} decoded nothing")
    return deployment.decode.tpot_s
