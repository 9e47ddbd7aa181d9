"""From finished steps to what a user asks for: speed, where the time goes, and what limits it."""

from expertlane.metrics.bottleneck import Bottleneck, find_bottleneck
from expertlane.metrics.critical_path import CriticalPath, critical_path
from expertlane.metrics.latency import Latency, latency
from expertlane.metrics.stage_time import StageTime, hidden_communication, stage_time
from expertlane.metrics.summary import (
    DeploymentMetrics,
    PhaseMetrics,
    Utilisation,
    summarise,
    summarise_phase,
)
from expertlane.spec.machine import MachinePeak

__all__ = [
    "Bottleneck",
    "CriticalPath",
    "DeploymentMetrics",
    "Latency",
    "MachinePeak",
    "PhaseMetrics",
    "StageTime",
    "Utilisation",
    "critical_path",
    "find_bottleneck",
    "hidden_communication",
    "latency",
    "stage_time",
    "summarise",
    "summarise_phase",
]
