"""The metrics page of a server: series of Prometheus's text forms, and what engines call them.

`prometheus-client` reads such pages too, but comes with the extra `serve` alone, stops at the
first line that it does not understand, and builds every series: of vLLM with 16 data-parallel ranks
(5,969 lines) 136 ms of CPU time, in which no request is sent or timed. Here one expression finds
the lines that are wanted, in 2 ms, and passes over all others (1 December 2026, two busy cores of
an Intel Xeon).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec

from expertlane.results.engine_record import EngineCounts

MOST_PAGE_BYTES = 32 * 2**20
_MOST_SERIES = 100_000
_MOST_COUNT = 2**53  # beyond, a float does not count
_MOST_RANKS = 1024
_MOST_LABEL = 40

Labels = tuple[tuple[str, str], ...]
Series = dict[str, dict[Labels, float]]

_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]++|\\.)*+)"')
_ESCAPED = re.compile(r"\\(.)")
_ESCAPES = {"n": "\n"}


def _lines(names: Iterable[str]) -> re.Pattern[bytes]:
    """Finds the lines of metrics: name, labels, value; a timestamp or exemplar may follow."""
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(
        rf'\n({either})(?:\{{((?:[^"\n}}]++|"(?:[^"\\\n]++|\\.)*+")*+)\}})?[ \t]+(\S+)'.encode()
    )


def series(page: bytes, lines: re.Pattern[bytes]) -> Series:
    """The series of a page that an expression of `_lines` finds, by name and labels.

    A line that is no sample is passed over; of two of a series the last counts. Values that are no
    finite numbers are left out.
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
    """A number by the names that an engine's versions give it; the first that is there counts.

    Attributes:
        only: values of a label by which series count; empty for all.
    """

    names: tuple[str, ...] = ()
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def by_rank(self, found: Series, rank: tuple[str, ...], *, is_gauge: bool) -> dict[str, float]:
        """The number by the values of the labels that tell data-parallel ranks apart.

        Counters of a rank are summed. Of gauges the largest counts: ranks of a tensor-parallel
        group repeat each other's.
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


_WHOLE = "stop length repetition"  # reasons for which a request ends that was answered


@dataclass(frozen=True)
class Names:
    """Names of an engine's metrics.

    Attributes:
        marks: beginning of names by which its page is known.
        rank: labels that tell data-parallel ranks apart.
        counters, gauges: by the names of fields of `EngineCounts` and `Gauges`.
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

# An engine's page may have names of another, so the first whose mark is there counts.
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
    # return_perf_metrics, and enable_iter_perf_stats for the gauges. It tells no ranks apart.
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

_EXPRESSIONS = {
    each.engine: _lines(
        name for part in (each.counters, each.gauges) for one in part.values() for name in one.names
    )
    for each in NAMES
}


@dataclass(frozen=True)
class Gauges:
    """A data-parallel rank at a moment; None where it is not told; as in `RankGauges`."""

    num_running: float | None = None
    num_waiting: float | None = None
    kv_usage: float | None = None


@dataclass(frozen=True)
class Page:
    """What a page of metrics tells.

    Attributes:
        engine: whose names it has.
        counts: since the server's start, by data-parallel rank; under "" where counters tell none
            apart.
        gauges: at this moment, by data-parallel rank.
    """

    engine: str
    counts: dict[str, EngineCounts]
    gauges: dict[str, Gauges]

    @property
    def total(self) -> EngineCounts:
        """Counts of all ranks."""
        return EngineCounts.total(self.counts.values())


def read_page(page: bytes) -> Page | None:
    """Read a page in Prometheus's text form or OpenMetrics', or TensorRT-LLM's list of iterations.

    None where no engine is known by its names, or the page is larger than `MOST_PAGE_BYTES`.
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
    )


def _by_number(item: tuple[str, Any]) -> tuple[int, str]:
    return len(item[0]), item[0]


def _iterations(page: bytes) -> Page | None:
    """The latest of TensorRT-LLM's iterations: gauges alone.

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
