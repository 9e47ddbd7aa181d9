"""Pages of metrics, of every engine and of none."""

import math
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.openmetrics import exposition
from prometheus_client.parser import text_string_to_metric_families

from expertlane.client.prometheus import MOST_PAGE_BYTES, Gauges, _lines, read_page, series
from expertlane.results.engine_record import EngineCounts

# As vLLM 0.32 gives them with --data-parallel-size 2, cut.
VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a"} 3.0
vllm:num_requests_running{engine="1",model_name="a"} 1.0
vllm:num_requests_waiting{engine="0",model_name="a"} 2.0
vllm:num_requests_waiting{engine="1",model_name="a"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="a",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="a"} 0.5
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0",model_name="a"} 16.0
vllm:prefix_cache_hits_created{engine="0",model_name="a"} 1.7e+09
vllm:num_preemptions_total{engine="0",model_name="a"} 4.0
vllm:prompt_tokens_total{engine="0",model_name="a"} 1.234e+03
vllm:prompt_tokens_total{engine="1",model_name="a"} 66.0
vllm:generation_tokens_total{engine="0",model_name="a"} 100.0
vllm:generation_tokens_total{engine="1",model_name="a"} 7.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="a"} 1.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="a"} 20.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="a"} 3.0
vllm:request_success_total{engine="1",finished_reason="length",model_name="a"} 5.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="a"} 9.0
"""
SGLANG = """\
sglang:num_running_reqs{dp_rank="0",model_name="a",priority="",tp_rank="0"} 4.0
sglang:num_running_reqs{dp_rank="0",model_name="a",priority="1",tp_rank="0"} 1.0
sglang:num_running_reqs{dp_rank="0",model_name="a",priority="",tp_rank="1"} 4.0
sglang:num_running_reqs{dp_rank="1",model_name="a",priority="",tp_rank="2"} 2.0
sglang:num_queue_reqs{dp_rank="0",model_name="a",tp_rank="0"} 1.0
sglang:token_usage{dp_rank="0",model_name="a",tp_rank="0"} 0.75
sglang:prompt_tokens_total{is_streaming="true",model_name="a"} 300.0
sglang:prompt_tokens_total{is_streaming="false",model_name="a"} 4.0
sglang:generation_tokens_total{is_streaming="true",model_name="a"} 90.0
sglang:num_requests_total{is_streaming="true",model_name="a"} 12.0
sglang:cached_tokens_total{cache_source="device",model_name="a"} 8.0
sglang:cached_tokens_total{cache_source="host",model_name="a"} 2.0
sglang:num_retracted_requests_total{dp_rank="0",model_name="a",tp_rank="0"} 1.0
"""
TRTLLM = """\
trtllm_request_success_total{engine_type="pytorch",finished_reason="length",model_name="a"} 9.0
trtllm_request_success_total{engine_type="pytorch",finished_reason="cancelled",model_name="a"} 1.0
trtllm_prompt_tokens_total{engine_type="pytorch",model_name="a"} 99.0
trtllm_generation_tokens_total{engine_type="pytorch",model_name="a"} 45.0
trtllm_num_requests_running{engine_type="pytorch",model_name="a"} 2.0
trtllm_kv_cache_utilization{engine_type="pytorch",model_name="a"} 0.125
"""
OWN = """\
vllm:prompt_tokens_total{engine="0",model_name="a"} 40.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="a"} 2.0
vllm:num_requests_running{engine="0",model_name="a"} 3.0
vllm:num_requests_waiting{engine="0",model_name="a"} 1.0
expertlane:requests_running{dp_rank="0",model_name="a",replica="0"} 2.0
expertlane:requests_running{dp_rank="1",model_name="a",replica="0"} 1.0
"""


def test_vllm_tells_its_data_parallel_ranks_apart():
    found = read_page(VLLM.encode())
    assert found.engine == "vllm"
    assert found.counts == {
        "0": EngineCounts(21, 3, 1234, 100, 16, 4),
        "1": EngineCounts(5, None, 66, 7),
    }
    assert found.gauges == {"0": Gauges(3, 2, 0.25), "1": Gauges(1, 0, 0.5)}
    assert found.total == EngineCounts(26, 3, 1300, 107, 16, 4)


def test_sglang_counts_for_all_ranks_and_repeats_gauges_within_one():
    found = read_page(SGLANG.encode())
    assert found.engine == "sglang"
    assert found.total == EngineCounts(12, None, 304, 90, 10, 1)
    assert found.gauges == {"0": Gauges(4, 1, 0.75), "1": Gauges(2)}


def test_tensorrt_llm_in_both_its_forms():
    found = read_page(TRTLLM.encode())
    assert (found.engine, found.total) == ("trtllm", EngineCounts(9, 1, 99, 45))
    assert found.gauges == {"": Gauges(2, None, 0.125)}
    listed = b"""[{"iter": 1}, {"numActiveRequests": 3, "numQueuedRequests": 5,
        "kvCacheStats": {"usedNumBlocks": 2, "maxNumBlocks": 8}}]"""
    found = read_page(listed)
    assert (found.engine, found.counts, found.gauges) == ("trtllm", {}, {"": Gauges(3, 5, 0.25)})
    assert read_page(b'[{"numActiveRequests": true}]').gauges == {"": Gauges()}


def test_our_own_has_names_of_vllm_and_ranks_of_its_own():
    found = read_page(OWN.encode())
    assert found.engine == "expertlane"
    assert found.total == EngineCounts(2, None, 40)
    assert found.gauges == {"": Gauges(None, 1), "0/0": Gauges(2), "0/1": Gauges(1)}


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"not metrics",
        b"<html>vllm:num_requests_running 3</html>",
        b"process_cpu_seconds_total 3\n",
        b"vllm:unknown 3\n",
        b"[]",
        b"[1]",
        b'["a"]',
        b"[[[",
        b"[" * 100_000,
        b'{"numActiveRequests": 1}',
        b"vllm:prompt_tokens_total NaN\nvllm:generation_tokens_total +Inf\n",
        b"vllm:prompt_tokens_total -1\n",
        b"vllm:prompt_tokens_total 1e99\n",
        b'vllm:prompt_tokens_total{engine="0" 3\n',
        b"vllm:prompt_tokens_total{engine=\xff} x\n",
        b"#" * (MOST_PAGE_BYTES + 1),
        b"".join(b'vllm:prompt_tokens_total{engine="%d"} 1\n' % rank for rank in range(2000)),
    ],
)
def test_pages_that_tell_nothing(page):
    assert read_page(page) is None


def test_garbage_between_lines_is_passed_over():
    torn = VLLM.replace("# TYPE", 'vllm:prompt_tokens_total{engine="2",x\n# TYPE')
    assert read_page(torn.encode()) == read_page(VLLM.encode())
    twice = VLLM + 'vllm:prompt_tokens_total{model_name="a",engine="1"} 67\n'
    assert read_page(twice.encode()).counts["1"].num_prompt_tokens == 67


def test_a_label_of_any_text_is_cut():
    label = "<script>" + "x" * 99
    page = f'vllm:prompt_tokens_total{{engine="{label}"}} 3\n'
    assert list(read_page(page.encode()).counts) == [label[:40]]


def test_openmetrics_with_exemplars_and_timestamps():
    page = (
        'vllm:generation_tokens_total{engine="0"} 5 1700000000.5 # {trace_id="a b"} 1 1.5\n'
        'vllm:prompt_tokens_total{engine="0",} 7 # {} 1\n# EOF\n'
    )
    assert read_page(page.encode()).total == EngineCounts(None, None, 7, 5)


NAMES = st.sampled_from(["one", "one:two", "one_two", "other"])
LABELS = st.dictionaries(
    st.text(string.ascii_letters, min_size=1, max_size=5).map("l_{}".format),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=9),
    max_size=3,
)
VALUES = st.floats() | st.integers(-(2**60), 2**60).map(float)


@given(st.dictionaries(NAMES, st.tuples(LABELS, VALUES), min_size=1), st.booleans(), st.data())
def test_what_prometheus_client_writes_and_reads(families, is_open, data):
    """The same series as its parser finds, of the names that are wanted."""
    registry = CollectorRegistry()
    for name, (labels, value) in families.items():
        gauge = Gauge(name, "a\nb", labels, registry=registry)
        (gauge.labels(**labels) if labels else gauge).set(value)
    page = exposition.generate_latest(registry) if is_open else generate_latest(registry)
    wanted = data.draw(st.sets(st.sampled_from(sorted(families)), min_size=1))
    theirs = {}
    for family in text_string_to_metric_families(page.decode().removesuffix("# EOF\n")):
        for sample in family.samples:
            if sample.name in wanted and math.isfinite(sample.value):
                labels = tuple(sorted(sample.labels.items()))
                theirs.setdefault(sample.name, {})[labels] = sample.value
    assert series(page, _lines(wanted)) == theirs


@given(st.binary(max_size=300))
def test_any_bytes_are_read(page):
    read_page(page)
    read_page(VLLM.encode() + page)


@given(st.text('vllm:prompt_tokens_total{}"\\=,engine 0123\n', max_size=200))
def test_any_torn_line_is_read(text):
    read_page(f"vllm:prompt_tokens_total{{{text}".encode())


def test_a_long_torn_line_takes_no_time():
    """An expression that went back would take for ever."""
    torn = 'vllm:prompt_tokens_total{a="' + "\\\\a," * 200_000
    assert read_page(f"{torn}\n{torn}".encode()) is None


def test_counts_since_an_earlier_moment():
    before, after = EngineCounts(1, None, 10, 5), EngineCounts(3, 2, 10, 9)
    assert after.since(before) == EngineCounts(2, 2, 0, 4)
    assert before.since(after) is None  # started anew
    assert EngineCounts().since(EngineCounts(1)) == EngineCounts()
    assert EngineCounts.total([]) == EngineCounts()


CACHE = 'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{}",engine="{}"{}}} 1.0'
RUNNING = 'vllm:num_requests_running{{engine="{}"}} 1'


@pytest.mark.parametrize(
    ("lines", "num_tokens"),
    [
        ([CACHE.format(8, 0, ""), CACHE.format(8, 1, "")], 256),
        # Of layers of several kinds vLLM counts tokens itself.
        ([CACHE.format(8, 0, ',kv_cache_size_tokens="96"')], 96),
        ([CACHE.format("None", 0, "")], None),
        ([CACHE.format("9" * 5000, 0, "")], 2**53),
        ([], None),
    ],
)
def test_tokens_of_all_caches_of_vllm(lines, num_tokens):
    page = "\n".join([RUNNING.format(0), RUNNING.format(1), *lines])
    assert read_page(page.encode()).kv_tokens == num_tokens


def test_tokens_of_caches_of_other_engines():
    """SGLang repeats a rank's gauge; expertlane tells one rank's size."""
    gauge = 'sglang:max_total_num_tokens{{dp_rank="{}",tp_rank="{}"}} 100'
    lines = [gauge.format(dp, tp) for dp in (0, 1) for tp in (0, 1)]
    page = "\n".join(['sglang:num_running_reqs{dp_rank="0"} 1', *lines])
    assert read_page(page.encode()).kv_tokens == 200
    usage = 'expertlane:kv_cache_usage_ratio{{replica="0",dp_rank="{}"}} 0.5'
    waiting = 'vllm:num_requests_waiting{engine="0"} 0'  # of all ranks together
    page = "\n".join([*map(usage.format, range(2)), waiting, CACHE.format(8, 0, "")])
    assert read_page(page.encode()).kv_tokens == 256
