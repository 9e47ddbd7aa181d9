"""Metrics of a journal for `/metrics`."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from expertlane.server.journal.keeper import JournalKeeper

_PREFIX = "expertlane:journal_"


class JournalMetrics(Collector):
    """The metrics of one server's journal."""

    def __init__(self, keeper: JournalKeeper) -> None:
        self._keeper = keeper
        self._labels = {"model_name": keeper.model_name}

    def collect(self) -> Iterator[Metric]:
        """All metrics; called by the registry."""
        keeper, file = self._keeper, self._keeper.file
        for name, text, total in (
            ("bytes", "Bytes written to the journal", file.num_bytes),
            ("records", "Records written to the journal", file.num_records),
            ("write_seconds", "Time of these writes, encoding included", file.write_s),
            ("files", "Files begun: at the start, and when one has grown", file.num_files),
            ("resumed", "Requests of an earlier process that continued", keeper.num_resumed),
            (
                *("reconnects", "Connections to a request that was there already"),
                keeper.num_reconnects,
            ),
            (
                *("abandoned", "Requests ended because no client came back"),
                keeper.num_abandoned,
            ),
        ):
            counter = CounterMetricFamily(f"{_PREFIX}{name}", text, labels=[*self._labels])
            counter.add_metric([*self._labels.values()], total)
            yield counter
        num_finished = sum(kept.is_over for kept in keeper.requests.values())
        gauge = GaugeMetricFamily(
            f"{_PREFIX}requests", "Requests in the journal", labels=[*self._labels, "state"]
        )
        for state, number in (
            ("unfinished", len(keeper.requests) - num_finished),
            ("finished", num_finished),
        ):
            gauge.add_metric([*self._labels.values(), state], number)
        yield gauge
        size = GaugeMetricFamily(
            f"{_PREFIX}file_bytes", "Size of the current file", labels=[*self._labels]
        )
        size.add_metric([*self._labels.values()], file.size)
        yield size
