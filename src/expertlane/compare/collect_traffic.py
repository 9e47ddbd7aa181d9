"""From the metrics of traffic to its section of the results."""

from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from expertlane.metrics import FanOut, TrafficMetrics, by_link
from expertlane.results.traffic import (
    FanOutResult,
    HottestExpertResult,
    HottestLayerResult,
    HottestRankResult,
    TrafficBytes,
    TrafficResult,
)
from expertlane.spec.names import Link, Stage, Traffic


def traffic_bytes(
    sent_bytes: npt.NDArray[np.int64], ranks_per_node: int
) -> dict[str, TrafficBytes]:
    """By link, from [num_kinds_of_traffic, source, destination]."""
    sent = by_link(sent_bytes, ranks_per_node)
    return {
        link.label: TrafficBytes(**{kind.label: int(sent[kind, link]) for kind in Traffic})
        for link in Link
    }


def traffic_result(seen: TrafficMetrics, ranks_per_node: int) -> TrafficResult:
    """One phase of one deployment."""
    matrices = seen.sent_bytes.sum(axis=0)
    payload_of_step = seen.sent_bytes_of_step[:, Traffic.PAYLOAD]
    return TrafficResult(
        sent_bytes={kind.label: tuple(map(_counts, matrices[kind])) for kind in Traffic},
        by_stage={
            stage.label: traffic_bytes(seen.sent_bytes[stage], ranks_per_node)
            for stage in Stage
            if seen.sent_bytes[stage].any()
        },
        payload_bytes_of_step={link.label: _counts(payload_of_step[:, link]) for link in Link},
        payload_error=seen.payload_error,
        fan_out=None if seen.fan_out is None else _fan_out(seen.fan_out),
        receiver=None if seen.receiver is None else HottestRankResult(**asdict(seen.receiver)),
        busiest=None if seen.busiest is None else HottestRankResult(**asdict(seen.busiest)),
        expert=None if seen.expert is None else HottestExpertResult(**asdict(seen.expert)),
        layer=None if seen.layer is None else HottestLayerResult(**asdict(seen.layer)),
        num_last_arrivals=_counts(seen.last.num_last),
        num_meetings=_counts(seen.last.num_meetings),
    )


def _fan_out(fan_out: FanOut) -> FanOutResult:
    return FanOutResult(
        experts_per_token=fan_out.experts_per_token,
        ranks_per_token=fan_out.ranks_per_token,
        nodes_per_token=fan_out.nodes_per_token,
        tokens_by_ranks_reached=_counts(fan_out.tokens_by_ranks_reached),
        tokens_by_nodes_reached=_counts(fan_out.tokens_by_nodes_reached),
        num_remote_rank_copies=fan_out.num_remote_rank_copies,
        num_remote_node_copies=fan_out.num_remote_node_copies,
    )


def _counts(values: npt.NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(map(int, values))
