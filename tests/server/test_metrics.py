"""What `/metrics` says: the names that dashboards query, and the numbers that clients saw."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from engine.ranks.processes import wait_until
from expertlane.server.metrics import Histogram

GAUGES = {
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "engine_sleep_state",
    "cache_config_info",
}
COUNTERS = {
    "prompt_tokens",
    "prompt_tokens_cached",
    "prompt_tokens_by_source",
    "generation_tokens",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "request_success",
}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "time_per_output_token_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_prefill_kv_computed_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "iteration_tokens_total",
}


def scrape(server):
    """Values by name, and names by type."""
    text = httpx.get(f"{server.url}/metrics").text
    values, types = {}, {}
    for family in text_string_to_metric_families(text):
        types.setdefault(family.type, set()).add(family.name)
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            values[sample.name, *sorted(labels.values())] = sample.value
    return values, types


def test_the_names_are_those_of_dashboards(stub_server):
    _, types = scrape(stub_server())
    assert {f"vllm:{name}" for name in GAUGES} <= types["gauge"]
    assert {f"vllm:{name}" for name in COUNTERS} <= types["counter"]
    assert {f"vllm:{name}" for name in HISTOGRAMS} == types["histogram"]


def test_the_numbers_are_those_of_the_clients(stub_server):
    server = stub_server()
    used = [
        server.ask(prompt=[1, 2, 3], max_tokens=5).json()["usage"],
        server.ask(prompt=[[4], [5, 6]], max_tokens=7, n=2).json()["usage"],
    ]
    assert wait_until(lambda: server.engine.is_idle)
    values, _ = scrape(server)
    num_prompt = 3 + 2 * (1 + 2)
    num_output = sum(each["completion_tokens"] for each in used)
    assert values["vllm:prompt_tokens_total",] == num_prompt
    assert values["vllm:generation_tokens_total",] == num_output == 5 + 4 * 7
    assert values["vllm:request_success_total", "length"] == 5
    assert values["vllm:time_to_first_token_seconds_count",] == 5
    assert values["vllm:inter_token_latency_seconds_count",] == num_output - 5
    assert values["vllm:request_generation_tokens_sum",] == num_output
    assert values["vllm:request_params_n_sum",] == 1 + 2 + 2
    assert values["vllm:e2e_request_latency_seconds_bucket", "+Inf"] == 5
    assert values["vllm:request_queue_time_seconds_count",] == 5
    assert values["vllm:num_requests_running",] == 0
    assert values["vllm:kv_cache_usage_perc",] == 0
    assert values["http_requests_total", "/v1/completions", "2xx", "POST"] == 2


def test_prompt_tokens_by_source(stub_server):
    server = stub_server()
    for _ in range(2):
        server.ask(prompt=list(range(10)), max_tokens=2)  # two full blocks of four are shared
    assert wait_until(lambda: server.engine.is_idle)
    values, _ = scrape(server)
    assert values["vllm:prompt_tokens_cached_total",] == 8
    assert values["vllm:prompt_tokens_by_source_total", "local_compute"] == 12
    assert values["vllm:prompt_tokens_by_source_total", "local_cache_hit"] == 8
    assert values["vllm:request_prefill_kv_computed_tokens_sum",] == 12


def test_dummy_steps_are_those_of_ranks_without_a_token(stub_server):
    server = stub_server(layout="dp=3")
    server.ask(prompt=[1, 2], max_tokens=6)
    assert wait_until(lambda: server.engine.is_idle)
    values, _ = scrape(server)
    counts = [values["expertlane:dummy_steps_total", "0", str(dp)] for dp in range(3)]
    steps = [values.get(("expertlane:steps_total", "0", each), 0) for each in ("decode", "prefill")]
    assert sorted(counts) == [0, 6, 6]
    assert steps == [5, 1]


def test_running_and_waiting_requests(stub_server):
    server = stub_server(max_num_seqs=1)
    server.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        posted = pool.submit(server.ask, prompt=[[1, 2], [3, 4]], max_tokens=9)
        assert wait_until(lambda: server.engine.scheduler.num_waiting == 1)
        values, _ = scrape(server)
        load = httpx.get(f"{server.url}/load").json()
        server.gate.set()
        posted.result()
    assert values["vllm:num_requests_running",] == 1
    assert values["vllm:num_requests_waiting",] == 1
    assert values["vllm:kv_cache_usage_perc",] > 0
    assert load == {"server_load": 1}


def test_real_ranks_have_times(served):
    served.client.completions.create(model="tiny", prompt="a", max_tokens=4)
    values, _ = scrape(served.server)
    assert values["vllm:request_prefill_time_seconds_sum",] > 0
    assert values["vllm:e2e_request_latency_seconds_sum",] == pytest.approx(
        values["vllm:request_queue_time_seconds_sum",]
        + values["vllm:request_inference_time_seconds_sum",],
        rel=1e-3,
    )


@given(st.lists(st.floats(0, 10, allow_nan=False)))
def test_a_value_is_in_the_first_bucket_that_holds_it(values):
    bounds = [0.5, 1.0, 4.0]
    histogram = Histogram("", bounds)
    for value in values:
        histogram.observe(value)
    for i, bound in enumerate(bounds):
        assert sum(histogram.counts[: i + 1]) == sum(value <= bound for value in values)
    assert sum(histogram.counts) == len(values)
    assert histogram.sum == pytest.approx(sum(values))
