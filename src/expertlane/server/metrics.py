"""The server's metrics, under the names and in the buckets that dashboards for vLLM query.

Counts are kept as plain numbers, since one observation for each token must cost little, and become
metrics of prometheus-client when they are asked for.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, count
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from expertlane.engine.engine import Engine
from expertlane.engine.rank_watch import RankWatch
from expertlane.schedule.drive import FinishedStep
from expertlane.schedule.request import Chunk, FinishReason, Limits, RequestOutput
from expertlane.server.own_metrics import OwnMetrics

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
        others: other collectors of metrics.
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
        self._labels = {"model_name": model_name, "engine": "0"}
        self._limits = limits
        self._scheduler = engine.scheduler
        self.others: list[Collector] = []
        self.own = OwnMetrics({"model_name": model_name}, engine, watch)
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
        """Answers with a status of 500 or more."""
        return sum(number for (_, _, status), number in self._responses.items() if status == "5xx")

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
        num_blocks = limits.num_blocks * len(tables)
        num_used = sum(table.blocks.num_used for table in tables)
        for name, text, value in (
            ("num_requests_running", "Requests that hold blocks", scheduler.num_running),
            ("num_requests_waiting", "Requests that wait for blocks", scheduler.num_waiting),
            ("kv_cache_usage_perc", "Share of cache blocks in use", num_used / num_blocks),
        ):
            yield self._gauge(name, text, value)
        for name, text, total in (
            ("prompt_tokens", "Prompt tokens of ended requests", self._num_prompt_tokens),
            (
                "prompt_tokens_cached",
                "Of these, found in the prefix cache",
                self._num_cached_tokens,
            ),
            ("generation_tokens", "Output tokens", self.num_generation_tokens),
            (
                "num_preemptions",
                "Preemptions: requests lost their blocks",
                scheduler.num_preemptions,
            ),
            (
                "prefix_cache_queries",
                "Tokens looked up in the prefix cache",
                sum(table.num_queried for table in tables),
            ),
            ("prefix_cache_hits", "Of these, found there", scheduler.num_cached_tokens),
        ):
            yield self._counter(name, text, total)
        ended = CounterMetricFamily(
            "vllm:request_success", "Requests that ended", labels=[*self._labels, "finished_reason"]
        )
        for reason, number in self._ended.items():
            ended.add_metric([*self._labels.values(), reason], number)
        yield ended
        yield from self._of_vllm_alone()
        yield self._cache_config()
        for name, histogram in self._histograms.items():
            yield self._histogram(name, histogram)
        answers = CounterMetricFamily(
            "http_requests", "HTTP responses", labels=["method", "handler", "status"]
        )
        for labels, number in list(self._responses.items()):
            answers.add_metric(labels, number)
        yield answers
        yield from self.own.collect()
        yield from chain.from_iterable(other.collect() for other in self.others)

    def _of_vllm_alone(self) -> Iterator[Metric]:
        """Metrics that vLLM splits by a label, most of whose values are always zero here."""
        waiting = self._scheduler.num_waiting
        for name, text, label, values in (
            (
                *("num_requests_waiting_by_reason", "Waiting requests, by reason", "reason"),
                {"capacity": waiting, "deferred": 0},
            ),
            (
                *("engine_sleep_state", "1 for the state that the engine is in", "sleep_state"),
                {"awake": 1, "weights_offloaded": 0, "discard_all": 0},
            ),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=[*self._labels, label])
            for each, value in values.items():
                gauge.add_metric([*self._labels.values(), each], value)
            yield gauge
        sources = CounterMetricFamily(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens of ended requests, by where their keys and values came from",
            labels=[*self._labels, "source"],
        )
        for source, total in (
            ("local_compute", self._num_prompt_tokens - self._num_cached_tokens),
            ("local_cache_hit", self._num_cached_tokens),
            ("external_kv_transfer", 0),
        ):
            sources.add_metric([*self._labels.values(), source], total)
        yield sources

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=[*self._labels])
        family.add_metric([*self._labels.values()], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=[*self._labels])
        family.add_metric([*self._labels.values()], value)
        return family

    def _cache_config(self) -> Metric:
        limits = self._limits
        facts = {
            "block_size": limits.block_size,
            "num_gpu_blocks": limits.num_blocks,
            "enable_prefix_caching": limits.prefix_caching,
        }
        labels = self._labels | {name: str(value) for name, value in facts.items()}
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Size of a rank's KV cache", labels=[*labels]
        )
        family.add_metric([*labels.values()], 1)
        return family

    def _histogram(self, name: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(f"vllm:{name}", histogram.text, labels=[*self._labels])
        bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
        totals = accumulate(histogram.counts)
        buckets = list(zip(bounds, totals, strict=True))
        family.add_metric([*self._labels.values()], buckets, histogram.sum)
        return family


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
