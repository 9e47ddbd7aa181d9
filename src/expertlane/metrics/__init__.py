"""From finished steps to what a user asks for: speed, where the time goes, and what limits it."""

from expertlane.metrics.bottleneck import Bottleneck, find_bottleneck
from expertlane.metrics.critical_path import CriticalPath, critical_path
from expertlane.metrics.latency import Latency, latency
from expertlane.metrics.stage_time import StageTime, hidden_communication, stage_time
from expertlane.metrics.stragglers import LastArrivals, last_arrivals
from expertlane.metrics.summary import (
    DeploymentMetrics,
    PhaseMetrics,
    Utilisation,
    summarise,
    summarise_phase,
)
from expertlane.metrics.traffic import (
    FanOut,
    HottestExpert,
    HottestLayer,
    HottestRank,
    TrafficMetrics,
    by_link,
    sent_matrix,
    summarise_traffic,
)
from expertlane.results.step_record import MachinePeak

__all__ = [
    "Bottleneck",
    "CriticalPath",
    "DeploymentMetrics",
    "FanOut",
    "HottestExpert",
    "HottestLayer",
    "HottestRank",
    "LastArrivals",
    "Latency",
    "MachinePeak",
    "PhaseMetrics",
    "StageTime",
    "TrafficMetrics",
    "Utilisation",
    "by_link",
    "critical_path",
    "find_bottleneck",
    "hidden_communication",
    "last_arrivals",
    "latency",
    "sent_matrix",
    "stage_time",
    "summarise",
    "summarise_phase",
    "summarise_traffic",
]
