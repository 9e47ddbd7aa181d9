"""A server's `/metrics` page: series in Prometheus's text format, and their names by engine.

`prometheus-client` reads such pages too. But only the extra `serve` installs it, it stops at the
first line that it cannot parse, and it builds every series: 136 ms of CPU time for vLLM with 16
data-parallel ranks (5,969 lines), in which the client can neither send nor time a request. Here one
regular expression finds the wanted lines in 2 ms (1 December 2026, two busy cores of an Intel
Xeon).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from typing import Any

import msgspec

from expertlane.results.engine_record import EngineCounts

MOST_PAGE_BYTES = 32 * 2**20
_MOST_SERIES = 100_000
_MOST_COUNT = 2**53  # above it floats do not hold every whole number
_MOST_RANKS = 1024
_MOST_LABEL = 40

Labels = tuple[tuple[str, str], ...]
Series = dict[str, dict[Labels, float]]

_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]++|\\.)*+)"')
_ESCAPED = re.compile(r"\\(.)")
_ESCAPES = {"n": "\n"}


def _lines(names: Iterable[str]) -> re.Pattern[bytes]:
    """An expression for the sample lines of metrics: name, labels, value.

    A timestamp or an exemplar may follow.
    """
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(
        rf'\n({either})(?:\{{((?:[^"\n}}]++|"(?:[^"\\\n]++|\\.)*+")*+)\}})?[ \t]+(\S+)'.encode()
    )


def series(page: bytes, lines: re.Pattern[bytes]) -> Series:
    """The series of a page, by name and labels; values that are not finite are left out.

    Args:
        page: the body of the answer.
        lines: an expression of `_lines`. If a series occurs twice, the last line counts.
    """
    found: Series = {}
    for match in islice(lines.finditer(b"\n" + page), _MOST_SERIES):
        name, labels, value = match.groups(default=b"")
        try:
            number = float(value)
        except ValueError:
            continue
        if math.isfinite(number):
            found.setdefault(name.decode(), {})[_labels(labels)] = number
    return found


def _labels(text: bytes) -> Labels:
    pairs = _LABEL.findall(text.decode("utf-8", "replace"))
    return tuple(sorted((name, _ESCAPED.sub(_unescaped, value)) for name, value in pairs))


def _unescaped(match: re.Match[str]) -> str:
    return _ESCAPES.get(match[1], match[1])


@dataclass(frozen=True)
class Metric:
    """The metric of an engine that has one of our counts or gauges.

    Attributes:
        names: its names in the engine's versions; the first one on the page counts.
        only: by label, the values for which a series counts; empty for all series.
    """

    names: tuple[str, ...] = ()
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def by_rank(self, found: Series, rank: tuple[str, ...], *, is_gauge: bool) -> dict[str, float]:
        """The metric's value by data-parallel rank.

        A rank's series are summed for counters. For gauges the largest counts, since the ranks of a
        tensor-parallel group report the same one.

        Args:
            found: the page's series.
            rank: labels that identify a data-parallel rank.
        """
        name = next((each for each in self.names if each in found), None)
        values: dict[str, list[float]] = {}
        for labels, value in found.get(name or "", {}).items():
            own = dict(labels)
            if all(own.get(label) in allowed for label, allowed in self.only.items()):
                key = "/".join(own[label][:_MOST_LABEL] for label in rank if label in own)
                values.setdefault(key, []).append(value)
        return {key: max(each) if is_gauge else sum(each) for key, each in values.items()}


def _called(*names: str, **only: str) -> Metric:
    return Metric(names, {label: frozenset(words.split()) for label, words in only.items()})


_WHOLE = "stop length repetition"  # finish reasons of completed requests


@dataclass(frozen=True)
class Names:
    """The names of an engine's metrics.

    Attributes:
        marks: prefix of its metrics, by which a page is recognised.
        rank: labels that identify a data-parallel rank.
        counters, gauges: metrics, by field of `EngineCounts` and of `Gauges`.
    """

    engine: str
    marks: str
    rank: tuple[str, ...]
    counters: Mapping[str, Metric]
    gauges: Mapping[str, Metric]


_OF_VLLM = {
    "num_requests": _called("vllm:request_success_total", finished_reason=_WHOLE),
    "num_aborted": _called("vllm:request_success_total", finished_reason="abort error"),
    "num_prompt_tokens": _called("vllm:prompt_tokens_total"),
    "num_output_tokens": _called("vllm:generation_tokens_total"),
    "num_cached_tokens": _called(
        "vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"
    ),
    "num_preemptions": _called("vllm:num_preemptions_total"),
}

# A page may also have another engine's names, so the first engine whose prefix is there counts.
NAMES = (
    # server/metrics.py; vLLM's names for what it has, with the label engine="0" for all ranks.
    Names(
        "expertlane",
        "expertlane:",
        ("replica", "dp_rank"),
        _OF_VLLM,
        {
            "num_running": _called("expertlane:requests_running"),
            "num_waiting": _called("vllm:num_requests_waiting"),
            "kv_usage": _called("expertlane:kv_cache_usage_ratio"),
        },
    ),
    # vllm/v1/metrics/loggers.py, class PrometheusStatLogger (0.32); docs.vllm.ai/usage/metrics.
    # Before 0.9 the cache's names began with gpu_.
    Names(
        "vllm",
        "vllm:",
        ("engine",),
        _OF_VLLM,
        {
            "num_running": _called("vllm:num_requests_running"),
            "num_waiting": _called("vllm:num_requests_waiting"),
            "kv_usage": _called("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        },
    ),
    # python/sglang/srt/observability/metrics_collector.py: requests and tokens are counted where
    # they are tokenized, for all ranks, when a request ends (class TokenizerMetricsCollector); the
    # rest by each scheduler. docs.sglang.io/references/production_metrics; needs --enable-metrics.
    Names(
        "sglang",
        "sglang:",
        ("dp_rank",),
        {
            "num_requests": _called("sglang:num_requests_total"),
            "num_aborted": _called("sglang:num_aborted_requests_total"),
            "num_prompt_tokens": _called("sglang:prompt_tokens_total"),
            "num_output_tokens": _called("sglang:generation_tokens_total"),
            "num_cached_tokens": _called("sglang:cached_tokens_total"),
            "num_preemptions": _called("sglang:num_retracted_requests_total"),
        },
        {
            "num_running": _called("sglang:num_running_reqs"),
            "num_waiting": _called("sglang:num_queue_reqs"),
            "kv_usage": _called("sglang:token_usage"),
        },
    ),
    # tensorrt_llm/metrics/collector.py, class MetricsCollector, at /prometheus/metrics; needs
    # return_perf_metrics, and enable_iter_perf_stats for the gauges. It has no label for ranks.
    Names(
        "trtllm",
        "trtllm_",
        (),
        {
            "num_requests": _called("trtllm_request_success_total", finished_reason="stop length"),
            "num_aborted": _called(
                "trtllm_request_success_total", finished_reason="cancelled timeout"
            ),
            "num_prompt_tokens": _called("trtllm_prompt_tokens_total"),
            "num_output_tokens": _called("trtllm_generation_tokens_total"),
            "num_cached_tokens": _called("trtllm_prompt_cached_tokens_total"),
        },
        {
            "num_running": _called("trtllm_num_requests_running"),
            "num_waiting": _called("trtllm_num_requests_waiting"),
            "kv_usage": _called("trtllm_kv_cache_utilization"),
        },
    ),
)

# vllm/config/cache.py: metrics_info, a series for each data-parallel rank.
_CACHES = "vllm:cache_config_info"
_CACHE_TOKENS = _called("sglang:max_total_num_tokens")

_EXPRESSIONS = {
    each.engine: _lines(
        [_CACHES, *_CACHE_TOKENS.names]
        + [
            name
            for part in (each.counters, each.gauges)
            for one in part.values()
            for name in one.names
        ]
    )
    for each in NAMES
}


@dataclass(frozen=True)
class Gauges:
    """A data-parallel rank's gauges at one time, as in `RankGauges`; None for those it lacks."""

    num_running: float | None = None
    num_waiting: float | None = None
    kv_usage: float | None = None


@dataclass(frozen=True)
class Page:
    """The counts and gauges of a metrics page.

    Attributes:
        engine: the engine whose metric names it has.
        counts: since the server's start, by data-parallel rank; under "" if counters have no label
            for ranks.
        gauges: current values, by data-parallel rank.
        kv_tokens: tokens that the KV caches of all ranks hold; None if it does not tell.
    """

    engine: str
    counts: dict[str, EngineCounts]
    gauges: dict[str, Gauges]
    kv_tokens: int | None = None

    @property
    def total(self) -> EngineCounts:
        """Counts of all ranks."""
        return EngineCounts.total(self.counts.values())


def read_page(page: bytes) -> Page | None:
    """Read a page in Prometheus's or OpenMetrics' text format, or TensorRT-LLM's JSON.

    Returns:
        None if the page has no known engine's metrics, or is larger than `MOST_PAGE_BYTES`.
    """
    if len(page) > MOST_PAGE_BYTES:
        return None
    if page.lstrip()[:1] == b"[":
        return _iterations(page)
    for names in NAMES:
        if f"\n{names.marks}".encode() in page or page.startswith(names.marks.encode()):
            return _page(names, series(page, _EXPRESSIONS[names.engine]))
    return None


def _page(names: Names, found: Series) -> Page | None:
    counts: dict[str, dict[str, int]] = {}
    gauges: dict[str, dict[str, float]] = {}
    for name, metric in names.counters.items():
        for rank, value in metric.by_rank(found, names.rank, is_gauge=False).items():
            if 0 <= value <= _MOST_COUNT:
                counts.setdefault(rank, {})[name] = round(value)
    for name, metric in names.gauges.items():
        for rank, value in metric.by_rank(found, names.rank, is_gauge=True).items():
            if 0 <= value <= _MOST_COUNT:
                gauges.setdefault(rank, {})[name] = value
    if (not counts and not gauges) or max(len(counts), len(gauges)) > _MOST_RANKS:
        return None
    return Page(
        names.engine,
        {rank: EngineCounts(**each) for rank, each in sorted(counts.items(), key=_by_number)},
        {rank: Gauges(**each) for rank, each in sorted(gauges.items(), key=_by_number)},
        _kv_tokens(names, found, sum("kv_usage" in each for each in gauges.values())),
    )


def _kv_tokens(names: Names, found: Series, num_ranks: int) -> int | None:
    sizes = [_cache_tokens(dict(labels)) for labels in found.get(_CACHES, {})]
    total = sum(sizes)
    if names.engine == "expertlane":  # one series, of a rank
        total *= num_ranks
    if not sizes:
        total = round(sum(_CACHE_TOKENS.by_rank(found, names.rank, is_gauge=True).values()))
    return total if 0 < total <= _MOST_COUNT else None


def _cache_tokens(labels: Mapping[str, str]) -> int:
    """Tokens of a rank's cache by its labels; 0 if they do not tell."""
    one = labels.get("kv_cache_size_tokens", "")
    if one.isdecimal():  # blocks say too little of layers of several kinds
        return min(int(one[:20]), _MOST_COUNT)
    sizes = [labels.get(name, "") for name in ("num_gpu_blocks", "block_size")]
    if not all(each.isdecimal() for each in sizes):
        return 0
    return min(prod(int(each[:20]) for each in sizes), _MOST_COUNT)


def _by_number(item: tuple[str, Any]) -> tuple[int, str]:
    return len(item[0]), item[0]


def _iterations(page: bytes) -> Page | None:
    """The gauges of the last iteration in TensorRT-LLM's JSON list; it has no counters.

    Source: nvidia.github.io/TensorRT-LLM/commands/trtllm-serve, "Metrics Endpoint".
    """
    try:
        found = msgspec.json.decode(page)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    last = found[-1] if isinstance(found, list) and found else None
    if not isinstance(last, dict) or "numActiveRequests" not in last:
        return None
    cache = last.get("kvCacheStats")
    cache = cache if isinstance(cache, dict) else {}
    used, most = _amount(cache.get("usedNumBlocks")), _amount(cache.get("maxNumBlocks"))
    return Page(
        "trtllm",
        {},
        {
            "": Gauges(
                _amount(last.get("numActiveRequests")),
                _amount(last.get("numQueuedRequests")),
                used / most if used is not None and most else None,
            )
        },
    )


def _amount(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= _MOST_COUNT else None
