"""Metrics that vLLM does not have: the ranks' time by stage, links, and tokens by expert."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from expertlane.engine.elastic.copy_switch import CopySwitch
from expertlane.engine.elastic.rebalancing import Rebalancer
from expertlane.engine.elastic.recovery import Recovery
from expertlane.engine.engine import Engine
from expertlane.engine.rank_watch import RankWatch, Reading
from expertlane.schedule.drive import FinishedStep
from expertlane.schedule.running import RunningTable
from expertlane.spec.names import Link, Phase, Stage

WAITING = "waiting"  # label of time spent waiting for other ranks, like the names of stages
IMBALANCE_S = 30.0  # over which it is taken
_PREFIX = "expertlane:"


class OwnMetrics:
    """The metrics of one server under expertlane's own names.

    Args:
        labels: labels of every metric.
        watch: totals of the ranks; None where there are no ranks to be watched.
    """

    def __init__(
        self, labels: Mapping[str, str], engine: Engine[Any], watch: RankWatch | None
    ) -> None:
        self._labels, self.watch = dict(labels), watch
        self._scheduler, self._recovery = engine.scheduler, engine.recovery
        self._num_steps: Counter[tuple[str, str]] = Counter()  # by replica and phase
        # By replica and data-parallel rank, the steps that it took part in without a token.
        self.num_dummy_steps: Counter[tuple[int, int]] = Counter()

    def on_step(self, step: FinishedStep) -> None:
        """Count a committed step; called in the engine's thread."""
        plan = step.plan
        self._num_steps[str(plan.replica), plan.phase] += 1
        for dp_rank, batches in enumerate(zip(*plan.micro_batches, strict=True)):
            if not any(batch.num_seqs for batch in batches):
                self.num_dummy_steps[plan.replica, dp_rank] += 1

    def _tables(self) -> dict[tuple[int, int], RunningTable]:
        """The tables of running sequences, by replica and data-parallel rank."""
        return {
            (replica, dp_rank): table
            for replica, of_replica in enumerate(self._scheduler.tables)
            for dp_rank, table in enumerate(of_replica)
        }

    def dummy_steps(self) -> list[int]:
        """[replicas x dp]; steps in which a data-parallel rank had no sequence."""
        return [self.num_dummy_steps[place] for place in self._tables()]

    def collect(self) -> Iterator[Metric]:
        """All metrics but those of experts, which are many; see `text_of_experts`."""
        yield from self._of_scheduler()
        if self._recovery is not None:
            yield from self._of_recovery(self._recovery)
        if self.watch is None:
            return
        yield from self._of_ranks(self.watch)
        yield from self._of_links(self.watch)
        if self.watch.rebalancer is not None:
            yield from self._of_rebalancer(self.watch.rebalancer)
        if self.watch.copy_switch is not None:
            yield from self._of_copies(self.watch.copy_switch, self.watch.readings[-1])

    def text_of_experts(self) -> bytes:
        """`expertlane:expert_tokens_total` in Prometheus's text format.

        With 61 layers of 256 experts these are 15,616 lines, which take 6 ms of CPU time here, in
        which requests wait, and 123 ms with prometheus-client.
        """
        watch = self.watch
        if watch is None or not watch.layers:
            return b""
        name = f"{_PREFIX}expert_tokens_total"
        lines = [
            f"# HELP {name} Token-expert pairs computed, of a layer's logical expert",
            f"# TYPE {name} counter",
        ]
        labels = ",".join(f'{label}="{_escaped(value)}"' for label, value in self._labels.items())
        for layer, of_layer in zip(watch.layers, watch.readings[-1].num_tokens, strict=True):
            begin = f'{name}{{{labels},layer="{layer}",expert="'
            lines += [f'{begin}{i}"}} {number}.0' for i, number in enumerate(of_layer.tolist())]
        return ("\n".join(lines) + "\n").encode()

    def _of_scheduler(self) -> Iterator[Metric]:
        steps = self._counter("steps", "Steps of a replica", "replica", "phase")
        for labels, number in list(self._num_steps.items()):
            self._add(steps, labels, number)
        yield steps
        dummy = self._counter(
            "dummy_steps",
            "Steps that a data-parallel rank took part in without a token of its own",
            *("replica", "dp_rank"),
        )
        running = self._gauge(
            "requests_running", "Requests that hold blocks of a rank", "replica", "dp_rank"
        )
        used = self._gauge(
            "kv_cache_usage_ratio", "Share of a rank's cache blocks in use", "replica", "dp_rank"
        )
        for (replica, dp_rank), table in self._tables().items():
            labels = str(replica), str(dp_rank)
            self._add(dummy, labels, self.num_dummy_steps[replica, dp_rank])
            self._add(running, labels, table.num_running)
            blocks = table.blocks
            self._add(used, labels, blocks.num_used / (blocks.num_used + blocks.num_free))
        yield from (dummy, running, used)

    def _of_recovery(self, recovery: Recovery) -> Iterator[Metric]:
        for name, text, total in (
            (
                "recoveries",
                "Recoveries: lost ranks were replaced",
                recovery.num_recoveries,
            ),
            (
                "growths",
                "Ends of a smaller layout after a loss: all ranks serve again",
                recovery.num_growths,
            ),
            (
                "layout_changes",
                "Changes of the layout while requests ran",
                recovery.num_scalings,
            ),
            (
                "recovered_requests",
                "Requests computed again because their KV cache was lost with a rank",
                self._scheduler.num_recovered,
            ),
        ):
            family = self._counter(name, text)
            self._add(family, [], total)
            yield family
        for name, text, members in (
            ("serving", "Data-parallel ranks, of all replicas, that serve", recovery.members),
            ("all", "Data-parallel ranks, of all replicas, when none is lost", recovery.whole),
        ):
            gauge = self._gauge(f"dp_ranks_{name}", text)
            self._add(gauge, [], len(members.dp_ranks))
            yield gauge

    def _of_ranks(self, watch: RankWatch) -> Iterator[Metric]:
        reading = watch.readings[-1]
        seconds = SummaryMetricFamily(
            f"{_PREFIX}rank_step_seconds",
            "Wall time of a rank by stage, without waits for other ranks; counts are its steps",
            labels=[*self._labels, "rank", "stage"],
        )
        own_s = reading.spent_s - reading.waited_s
        for rank, (process, number) in enumerate(
            zip(reading.members.numbers, reading.num_steps.tolist(), strict=True)
        ):
            times = {
                stage.name.lower(): own_s[rank, stage] for stage in Stage if stage != Stage.SETUP
            }
            times[WAITING] = reading.waited_s[rank].sum()
            for stage, total_s in times.items():
                labels = [*self._labels.values(), str(process), stage]
                seconds.add_metric(labels, number, float(total_s))
        yield seconds
        imbalance = self._gauge(
            "imbalance",
            f"Tokens of a layer's fullest rank over the mean, in the last {IMBALANCE_S:.0f} s",
            "layer",
        )
        for layer, ratio in watch.imbalance(IMBALANCE_S).items():
            self._add(imbalance, [str(layer)], ratio)
        yield imbalance

    def _of_links(self, watch: RankWatch) -> Iterator[Metric]:
        reading = watch.readings[-1]
        sent = self._counter("link_bytes", "Bytes that ranks sent each other", "link")
        for link, number in zip(Link, reading.link_bytes.tolist(), strict=True):
            self._add(sent, [link.label], number)
        yield sent
        transfers = self._counter(
            "transfer_seconds",
            "Time of dispatch, combine and TP collectives: overlapped with computing, or exposed",
            "part",
        )
        self._add(transfers, ["overlapped"], reading.overlapped_s)
        self._add(transfers, ["exposed"], reading.exposed_s)
        yield transfers

    def _of_rebalancer(self, rebalancer: Rebalancer) -> Iterator[Metric]:
        decisions = list(rebalancer.decisions)
        moved = [each for each in decisions if each.switched is not None]
        taken = self._counter("rebalance_decisions", "Decisions of the rebalancer", "outcome")
        self._add(taken, ["moved"], len(moved))
        self._add(taken, ["stayed"], len(decisions) - len(moved))
        yield taken
        for name, text, total in (
            ("bytes", "Weights moved", sum(each.decision.num_bytes for each in moved)),
            (
                "cost_seconds",
                "Time to move them, as estimated from a timed move",
                sum(each.decision.cost_s for each in moved),
            ),
            (
                "expected_gain_seconds",
                "Predicted savings of these moves, within the window that was decided for",
                sum(each.decision.gain_s for each in moved),
            ),
        ):
            family = self._counter(f"rebalance_{name}", text)
            self._add(family, [], total)
            yield family
        paid = self._counter("rebalance_paid_seconds", "Time by which moves have delayed steps")
        self._add(paid, [], rebalancer.paid_s)
        yield paid
        saved = self._gauge(
            "rebalance_saved_seconds",
            "Time saved so far in the fullest ranks' experts, against the placement before; may "
            "fall",
        )
        self._add(saved, [], rebalancer.saved_s)
        yield saved

    def _of_copies(self, switch: CopySwitch, reading: Reading) -> Iterator[Metric]:
        balanced = self._gauge("copies_balanced", "Whether copies are balanced in a phase", "phase")
        latest = switch.latest()
        for phase in Phase:
            self._add(balanced, [phase], phase in latest and latest[phase].pays)
        yield balanced
        saved = self._gauge(
            "copies_saved_seconds", "Time saved in the fullest ranks' experts by balanced copies"
        )
        self._add(saved, [], switch.saved_s(reading.num_pairs_saved))
        yield saved
        paid = self._counter("copies_paid_seconds", "CPU time of balancing copies")
        self._add(paid, [], reading.copies_s)
        yield paid

    def _counter(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"{_PREFIX}{name}", text, labels=[*self._labels, *labels])

    def _gauge(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"{_PREFIX}{name}", text, labels=[*self._labels, *labels])

    def _add(
        self,
        family: CounterMetricFamily | GaugeMetricFamily,
        labels: list[str] | tuple[str, ...],
        value: float,
    ) -> None:
        family.add_metric([*chain(self._labels.values(), labels)], value)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
