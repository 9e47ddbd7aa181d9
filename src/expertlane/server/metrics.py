"""The server's metrics, under the names and in the buckets that dashboards for vLLM query.

Counts are kept as plain numbers, since one observation for each token must cost little, and become
metrics of prometheus-client when they are asked for.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, count, starmap
from typing import Any, Literal

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from expertlane.engine.elastic.rebalancing import Rebalancer
from expertlane.engine.elastic.recovery import Recovery
from expertlane.engine.engine import Engine
from expertlane.engine.rank_watch import RankWatch
from expertlane.schedule.request import Chunk, FinishReason, Limits, RequestOutput
from expertlane.schedule.running import RunningTable
from expertlane.schedule.scheduler import FinishedStep
from expertlane.server.health import PROBES
from expertlane.spec.names import Link, Stage

WAITING = "waiting"  # label of time spent waiting for other ranks, like the names of stages
IMBALANCE_S = 30.0  # over which it is taken
_PREFIX = "expertlane:"


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_CHOICES = (1, 2, 5, 10, 20)
_RECENT = 1000  # requests whose times are kept one by one
_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.ERROR: "error",
    FinishReason.GRAMMAR: "error",
}


Kind = Literal["counter", "gauge"]
# One number, or several by the value of one label, or by the values of several.
Values = float | Mapping[Any, float]


# By name: what a metric says, its values, and the labels that tell its samples apart.
Rows = Mapping[str, tuple[str, Values] | tuple[str, Values, *tuple[str, ...]]]
_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


@dataclass(frozen=True)
class Families:
    """Factory of metrics of prometheus-client with common labels.

    Attributes:
        prefix: beginning of their names.
        common: labels with their values, the same in all samples.
    """

    prefix: str
    common: Mapping[str, str]

    def of(self, kind: Kind, rows: Rows) -> Iterator[Metric]:
        """A metric for each row."""
        for name, (text, values, *labels) in rows.items():
            names = [*self.common, *labels]
            found: CounterMetricFamily | GaugeMetricFamily
            found = _FAMILIES[kind](f"{self.prefix}{name}", text, labels=names)
            for key, value in (values if isinstance(values, Mapping) else {(): values}).items():
                own = key if isinstance(key, tuple) else (key,)
                found.add_metric([*self.common.values(), *map(str, own)], value)
            yield found


class Histogram:
    """Observations by bucket, and their sum."""

    def __init__(self, text: str, bounds: Sequence[float]) -> None:
        self.text = text
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value; a bucket's bound belongs to it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics(Collector):
    """The metrics of one server, with their own registry; used in one thread, but for `on_step`.

    Args:
        engine: its counts are read whenever metrics are collected.
        watch: totals of the ranks; None where there are none.

    Attributes:
        own: the metrics that vLLM does not have.
        others: functions that give further metrics.
        recent_ttft, recent_tpot: the latest requests' times to first token, and per output token:
            when each was observed, on `time.perf_counter`, and its seconds.
        num_generation_tokens: output tokens since the start.
    """

    def __init__(
        self,
        model_name: str,
        limits: Limits,
        engine: Engine[Any],
        watch: RankWatch | None = None,
    ) -> None:
        self._families = Families("vllm:", {"model_name": model_name, "engine": "0"})
        self._limits = limits
        self._scheduler = engine.scheduler
        self.others: list[Callable[[], Iterable[Metric]]] = []
        self.own = OwnMetrics(model_name, engine, watch)
        self.recent_ttft, self.recent_tpot = (
            deque[tuple[float, float]](maxlen=_RECENT) for _ in "12"
        )
        self._num_prompt_tokens = self.num_generation_tokens = self._num_cached_tokens = 0
        self._num_seen: dict[str, int] = {}  # tokens of requests that are not finished
        self._ended = dict.fromkeys(_REASONS.values(), 0)
        self._responses: Counter[tuple[str, str, str]] = Counter()
        tokens = _one_two_five(limits.max_model_len)
        named = {
            "time_to_first_token_seconds": ("time to first token", _TTFT_S),
            "inter_token_latency_seconds": ("time between tokens", _TOKEN_S),
            "request_time_per_output_token_seconds": ("mean time per output token", _TOKEN_S),
            "e2e_request_latency_seconds": ("time from arrival to last token", _REQUEST_S),
            "request_queue_time_seconds": ("time until a request's first step", _REQUEST_S),
            "request_inference_time_seconds": ("time from first step to last token", _REQUEST_S),
            "request_prefill_time_seconds": ("time from first step to first token", _REQUEST_S),
            "request_decode_time_seconds": ("time from first token to last", _REQUEST_S),
            "request_prompt_tokens": ("prompt tokens of a request", tokens),
            "request_generation_tokens": ("output tokens of a request", tokens),
            "request_prefill_kv_computed_tokens": (
                *("prompt tokens of a request that the prefix cache did not have", tokens),
            ),
            "request_params_max_tokens": ("max_tokens of a request", tokens),
            "request_params_n": ("n of a request", _CHOICES),
            "iteration_tokens_total": ("tokens of an engine step", _STEP_TOKENS),
        }
        self._histograms = {name: Histogram(*each) for name, each in named.items()}
        self._ttft = self._histograms["time_to_first_token_seconds"]
        self._itl = self._histograms["inter_token_latency_seconds"]
        self._step_tokens = self._histograms["iteration_tokens_total"]
        # The name of earlier versions, which dashboards still ask for.
        self._histograms["time_per_output_token_seconds"] = self._itl
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def on_step(self, step: FinishedStep) -> None:
        """Count a committed step; called in the engine's thread, which alone changes its counts."""
        self._step_tokens.observe(sum(batch.num_tokens for batch in step.plan.batches))
        self.own.on_step(step)

    def on_chunk(self, output: RequestOutput, chunk: Chunk) -> None:
        """Count a request's chunk; a hot path."""
        if chunk.token_id is not None:
            self.num_generation_tokens += 1
            index, times = self._num_seen.get(chunk.request_id, 0), output.token_times_s
            if index:
                self._itl.observe(times[index] - times[index - 1])
            else:
                self._ttft.observe(times[0])
                self.recent_ttft.append((output.arrival_s + times[0], times[0]))
            self._num_seen[chunk.request_id] = index + 1
        if chunk.finish_reason is not None:
            self._end(output, chunk.finish_reason)

    def on_request(self, num_choices: int, max_tokens: int) -> None:
        """Count a request, by its number of choices and its `max_tokens`."""
        self._histograms["request_params_n"].observe(num_choices)
        self._histograms["request_params_max_tokens"].observe(max_tokens)

    def on_response(self, method: str, path: str, status: int) -> None:
        """Count an answer."""
        self._responses[method, path, f"{status // 100}xx"] += 1

    @property
    def num_failures(self) -> int:
        """Answers with a status of 500 or more, but for those to probes."""
        return sum(
            number
            for (_, path, status), number in self._responses.items()
            if status == "5xx" and path not in PROBES
        )

    def _end(self, output: RequestOutput, reason: FinishReason) -> None:
        """Count a request that has ended, and its times."""
        self._num_seen.pop(output.request_id, None)
        self._ended[_REASONS[reason]] += 1
        self._num_prompt_tokens += len(output.prompt_token_ids)
        self._num_cached_tokens += output.num_cached_tokens
        times = output.token_times_s
        histograms = self._histograms
        histograms["request_prompt_tokens"].observe(len(output.prompt_token_ids))
        histograms["request_generation_tokens"].observe(len(times))
        num_computed = len(output.prompt_token_ids) - output.num_cached_tokens
        histograms["request_prefill_kv_computed_tokens"].observe(num_computed)
        if not times or reason is FinishReason.CANCELLED:
            return
        began_s = output.scheduled_s or 0.0
        for name, seconds in {
            "e2e_request_latency_seconds": times[-1],
            "request_queue_time_seconds": began_s,
            "request_inference_time_seconds": times[-1] - began_s,
            "request_prefill_time_seconds": times[0] - began_s,
            "request_decode_time_seconds": times[-1] - times[0],
        }.items():
            histograms[name].observe(seconds)
        if output.tpot_s is not None:
            histograms["request_time_per_output_token_seconds"].observe(output.tpot_s)
            self.recent_tpot.append((output.arrival_s + times[-1], output.tpot_s))

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry) + self.own.text_of_experts()

    def collect(self) -> Iterator[Metric]:
        """All metrics; for the registry."""
        scheduler, limits = self._scheduler, self._limits
        tables = list(chain.from_iterable(scheduler.tables))
        num_used = sum(table.blocks.num_used for table in tables)
        num_prompt, num_cached = self._num_prompt_tokens, self._num_cached_tokens
        facts = {
            "block_size": limits.block_size,
            "num_gpu_blocks": limits.num_blocks,
            "enable_prefix_caching": limits.prefix_caching,
        }
        as_label = {tuple(map(str, facts.values())): 1}
        yield from self._families.of(
            "gauge",
            {
                "num_requests_running": ("Requests that hold blocks", scheduler.num_running),
                "num_requests_waiting": ("Requests that wait for blocks", scheduler.num_waiting),
                "kv_cache_usage_perc": (
                    *("Share of cache blocks in use", num_used / (limits.num_blocks * len(tables))),
                ),
                # vLLM splits these by a label, most of whose values are always zero here.
                "num_requests_waiting_by_reason": (
                    "Waiting requests, by reason",
                    *({"capacity": scheduler.num_waiting, "deferred": 0}, "reason"),
                ),
                "engine_sleep_state": (
                    "1 for the state that the engine is in",
                    *({"awake": 1, "weights_offloaded": 0, "discard_all": 0}, "sleep_state"),
                ),
                "cache_config_info": ("Size of a rank's KV cache", as_label, *facts),
            },
        )
        by_source = {
            "local_compute": num_prompt - num_cached,
            "local_cache_hit": num_cached,
            "external_kv_transfer": 0,
        }
        yield from self._families.of(
            "counter",
            {
                "prompt_tokens": ("Prompt tokens of ended requests", num_prompt),
                "prompt_tokens_cached": ("Of these, found in the prefix cache", num_cached),
                "prompt_tokens_by_source": (
                    "Prompt tokens of ended requests, by where their keys and values came from",
                    *(by_source, "source"),
                ),
                "generation_tokens": ("Output tokens", self.num_generation_tokens),
                "num_preemptions": (
                    *("Preemptions: requests lost their blocks", scheduler.num_preemptions),
                ),
                "prefix_cache_queries": (
                    "Tokens looked up in the prefix cache",
                    sum(table.num_queried for table in tables),
                ),
                "prefix_cache_hits": ("Of these, found there", scheduler.num_cached_tokens),
                "request_success": ("Requests that ended", self._ended, "finished_reason"),
            },
        )
        yield from starmap(self._histogram, self._histograms.items())
        http = "HTTP responses", dict(self._responses), "method", "handler", "status"
        yield from Families("", {}).of("counter", {"http_requests": http})
        yield from self.own.collect()
        yield from chain.from_iterable(other() for other in self.others)

    def _histogram(self, name: str, histogram: Histogram) -> Metric:
        prefix, labels = self._families.prefix, self._families.common
        found = HistogramMetricFamily(f"{prefix}{name}", histogram.text, labels=[*labels])
        bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        found.add_metric([*labels.values()], buckets, histogram.sum)
        return found


def _one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 and so on, up to `most`."""
    found: list[int] = []
    for exponent in count():
        for mantissa in (1, 2, 5):
            bound = mantissa * 10**exponent
            if bound > most:
                return found
            found.append(bound)
    return found


class OwnMetrics:
    """The metrics of one server under expertlane's own names.

    Args:
        watch: totals of the ranks; None where there are no ranks to be watched.
    """

    def __init__(self, model_name: str, engine: Engine[Any], watch: RankWatch | None) -> None:
        self._labels, self.watch = {"model_name": model_name}, watch
        self._families = Families(_PREFIX, self._labels)
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
        if self.watch.rebalancer is not None:
            yield from self._of_rebalancer(self.watch.rebalancer)

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
        tables, per_rank = self._tables(), ("replica", "dp_rank")
        dummies = {place: self.num_dummy_steps[place] for place in tables}
        running = {place: table.num_running for place, table in tables.items()}
        used = {
            place: table.blocks.num_used / (table.blocks.num_used + table.blocks.num_free)
            for place, table in tables.items()
        }
        words = "Steps that a data-parallel rank took part in without a token of its own"
        yield from self._families.of(
            "counter",
            {
                "steps": ("Steps of a replica", dict(self._num_steps), "replica", "phase"),
                "dummy_steps": (words, dummies, *per_rank),
            },
        )
        yield from self._families.of(
            "gauge",
            {
                "requests_running": ("Requests that hold blocks of a rank", running, *per_rank),
                "kv_cache_usage_ratio": ("Share of a rank's cache blocks in use", used, *per_rank),
            },
        )

    def _of_recovery(self, recovery: Recovery) -> Iterator[Metric]:
        serving, number = len(recovery.members.dp_ranks), len(recovery.whole.dp_ranks)
        yield from self._families.of(
            "counter",
            {
                "recoveries": ("Recoveries: lost ranks were replaced", recovery.num_recoveries),
                "growths": (
                    "Ends of a smaller layout after a loss: all ranks serve again",
                    recovery.num_growths,
                ),
                "layout_changes": (
                    *("Changes of the layout while requests ran", recovery.num_scalings),
                ),
                "recovered_requests": (
                    "Requests computed again because their KV cache was lost with a rank",
                    self._scheduler.num_recovered,
                ),
            },
        )
        yield from self._families.of(
            "gauge",
            {
                "dp_ranks_serving": ("Data-parallel ranks, of all replicas, that serve", serving),
                "dp_ranks_all": (
                    *("Data-parallel ranks, of all replicas, when none is lost", number),
                ),
            },
        )

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
        text = f"Tokens of a layer's fullest rank over the mean, in the last {IMBALANCE_S:.0f} s"
        yield from self._families.of(
            "gauge", {"imbalance": (text, watch.imbalance(IMBALANCE_S), "layer")}
        )
        sent = zip(Link, reading.link_bytes.tolist(), strict=True)
        by_link = {link.label: number for link, number in sent}
        by_part = {"overlapped": reading.overlapped_s, "exposed": reading.exposed_s}
        text = "Time of dispatch, combine and TP collectives: overlapped with computing, or exposed"
        yield from self._families.of(
            "counter",
            {
                "link_bytes": ("Bytes that ranks sent each other", by_link, "link"),
                "transfer_seconds": (text, by_part, "part"),
            },
        )

    def _of_rebalancer(self, rebalancer: Rebalancer) -> Iterator[Metric]:
        decisions = list(rebalancer.decisions)
        moved = [each.decision for each in decisions if each.switched is not None]
        by_outcome = {"moved": len(moved), "stayed": len(decisions) - len(moved)}
        yield from self._families.of(
            "counter",
            {
                "rebalance_decisions": ("Decisions of the rebalancer", by_outcome, "outcome"),
                "rebalance_bytes": ("Weights moved", sum(each.num_bytes for each in moved)),
                "rebalance_cost_seconds": (
                    "Time to move them, as estimated from a timed move",
                    sum(each.cost_s for each in moved),
                ),
                "rebalance_expected_gain_seconds": (
                    "Predicted savings of these moves, within the window that was decided for",
                    sum(each.gain_s for each in moved),
                ),
                "rebalance_paid_seconds": (
                    *("Time by which moves have delayed steps", rebalancer.paid_s),
                ),
            },
        )
        text = (
            "Time saved so far in the fullest ranks' experts, against the placement before; may "
            "fall"
        )
        yield from self._families.of(
            "gauge", {"rebalance_saved_seconds": (text, rebalancer.saved_s)}
        )


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
