"""Servers of an experiment's deployments: at given places, on GPUs and on cores."""

import json
from dataclasses import replace

import pytest

from expertlane.cost.memory import held_kv_bytes
from expertlane.cost.step.operation import NumberTypes
from expertlane.planner.engines import ENGINES, Row, deployed_pool, longest_request
from expertlane.planner.server_start import Place, ServeTarget, server_start
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload
from planner.test_commands import GATHERED, parsed

MODEL, LOAD = PRESETS["paper-tiny"], Workload(8, 64, 32)
FLOAT32 = NumberTypes.all_of("float32")
HERE = Place(("127.0.0.1",), port=8123, listens="127.0.0.1")
ON_CORES = replace(HERE, kind="cpu", cores=(0, 1, 2, 3))


def pool_of(engine, layout, options=None, *, kind="cuda", model=MODEL, load=LOAD, kv_tokens=None):
    deployment = Deployment("mine", Layout.parse(layout), options or Options())
    return deployed_pool(ENGINES[engine], deployment, model, load, 8, kind, kv_tokens=kv_tokens)


def start_of(engine, layout, options=None, place=HERE, types=FLOAT32, kv_tokens=None):
    pool = pool_of(engine, layout, options, kind=place.kind, kv_tokens=kv_tokens)
    assert not isinstance(pool, Row), pool
    one, _ = pool.servers(ENGINES[engine])
    target = ServeTarget("/there/mine")
    return server_start(
        ENGINES[engine], one, target, types, longest_request(LOAD.load, MODEL), place
    )


def given_to(start):
    """The options that the engine's recorded parser takes, and the variables."""
    (node,) = start.nodes
    return parsed(start.lines[0]), dict(node.environment)


def test_sizes_are_those_of_a_plan():
    pool = pool_of("vllm", "dp=2,tp=2", GATHERED)
    assert pool.rank_seqs == Layout.parse("dp=2,tp=2").places_of_rank(8, 8) == 5
    assert pool.step_tokens == 8192
    alone = pool_of("vllm", "tp=2")
    assert alone.rank_seqs == 8  # all at once
    options, _ = given_to(start_of("vllm", "dp=2,tp=2", GATHERED))
    assert (options["max_num_seqs"], options["max_model_len"]) == (5, "96")
    assert (options["host"], options["port"]) == ("127.0.0.1", 8123)


def test_a_deployment_that_an_engine_does_not_run_is_its_row():
    for options, words in (
        (Options(), "all-gather where it computes prompts and decodes"),
        (replace(GATHERED, weights="int8"), "rounds no weights to int8"),
        (replace(GATHERED, rebalance_steps=100), "moves experts only by its own balancer"),
    ):
        row = pool_of("vllm", "dp=4,ep=4", options)
        assert isinstance(row, Row)
        assert words in row.says
        assert not isinstance(pool_of("expertlane", "dp=4,ep=4", options), Row)
    assert isinstance(pool_of("trtllm", "tp=2", kind="cpu"), Row)
    assert "on CPUs" in pool_of("sglang", "dp=4,ep=4", kind="cpu").says


def test_what_is_auto_becomes_what_the_engine_runs():
    options = Options(dispatch="auto", overlap="auto")
    given_options, _ = given_to(start_of("vllm", "dp=4,ep=4", options))
    assert given_options["all2all_backend"] == "allgather_reducescatter"
    assert "enable_dbo" not in given_options
    (node,) = start_of("expertlane", "dp=4,ep=4", options).nodes  # it chooses by itself
    assert node.argv[node.argv.index("--dispatch") + 1] == "auto"
    assert node.argv[node.argv.index("--overlap") + 1] == "auto"


def test_on_cores_vllm_has_a_cache_for_all_and_cores_for_each_rank():
    options, environment = given_to(start_of("vllm", "tp=2", place=ON_CORES))
    assert not options.keys() & {"gpu_memory_utilization", "max_cudagraph_capture_size"}
    assert options["dtype"] == "float32"
    assert environment == {"VLLM_CPU_OMP_THREADS_BIND": "0,1|2,3"}
    of_position = MODEL.num_hidden_layers * held_kv_bytes(MODEL, FLOAT32, 2)
    # 8 requests of 96 tokens in blocks of 128, and a block that vLLM keeps for itself.
    assert int(options["kv_cache_memory_bytes"]) == 9 * 128 * of_position
    _, environment = given_to(start_of("vllm", "tp=4", place=replace(ON_CORES, cores=(5,))))
    assert environment == {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    _, environment = given_to(start_of("vllm", "tp=4", place=replace(ON_CORES, cores=())))
    assert environment == {}


def test_on_cores_sglang_is_told_so():
    options, environment = given_to(start_of("sglang", "tp=2", place=ON_CORES))
    assert options["device"] == "cpu"
    assert "cuda_graph_max_bs_decode" not in options
    assert environment == {"SGLANG_CPU_OMP_THREADS_BIND": "0,1|2,3"}


def test_devices_and_shifted_ports_of_a_second_server():
    place = replace(HERE, port=8001, offset=1, devices=(4, 5, 6, 7))
    options, environment = given_to(start_of("vllm", "dp=4,ep=4", GATHERED, place))
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    assert (options["port"], options["data_parallel_rpc_port"]) == (8001, 29551)
    options, _ = given_to(start_of("sglang", "dp=4,ep=4", GATHERED, place))
    first, _ = given_to(start_of("sglang", "dp=4,ep=4", GATHERED))
    # It takes further ports after that one: the first server's begin at 8123 + 233.
    assert options["dist_init_addr"] == "127.0.0.1:29516"
    assert "dist_init_addr" not in first


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("vllm", ("-m", "vllm.entrypoints.openai.api_server", "--model", "/there/mine")),
        ("sglang", ("-m", "sglang.launch_server", "--model-path", "/there/mine")),
        ("expertlane", ("-m", "expertlane", "serve", "/there/mine")),
    ],
)
def test_an_interpreter_of_its_own(engine, words):
    (node,) = start_of(engine, "tp=2", place=replace(HERE, python="/env/bin/python")).nodes
    assert node.argv[: 1 + len(words)] == ("/env/bin/python", *words)
    (node,) = start_of("trtllm", "tp=2", place=replace(HERE, python="/env/bin/python")).nodes
    assert node.argv[0] == "/env/bin/trtllm-serve"


def test_caches_of_prefixes_and_graphs_can_be_off():
    options = replace(GATHERED, cuda_graphs=False)
    place = replace(HERE, caches_prefixes=False)
    for engine, prefixes, graphs in (
        ("vllm", "--no-enable-prefix-caching", "--enforce-eager"),
        ("sglang", "--disable-radix-cache", "--disable-cuda-graph"),
        ("expertlane", "--no-prefix-caching", "--cuda-graphs"),
    ):
        (node,) = start_of(engine, "tp=2", options, place).nodes
        assert {prefixes, graphs} <= set(node.argv)
        (node,) = start_of(engine, "tp=2").nodes
        assert not {prefixes, graphs} & set(node.argv)
    text = start_of("trtllm", "tp=2", options, place).files["trtllm.yaml"]
    assert '"enable_block_reuse": false' in text
    assert "cuda_graph_config" not in text


# One KV budget for all engines


def test_a_budget_becomes_each_engines_own_option():
    """512 tokens of all ranks: 256 of each of two data-parallel ranks."""
    options, _ = given_to(start_of("sglang", "dp=2,tp=2", kv_tokens=512))
    assert options["max_total_tokens"] == "256"
    config = json.loads(start_of("trtllm", "dp=2", kv_tokens=512).files["trtllm.yaml"])
    assert config["kv_cache_config"]["max_tokens"] == 256
    (node,) = start_of("expertlane", "dp=2,tp=2", kv_tokens=512).nodes
    assert node.argv[node.argv.index("--num-blocks") + 1] == "16"
    # Bytes of a rank, with one block that is vLLM's own.
    of_token = MODEL.num_hidden_layers * held_kv_bytes(MODEL, FLOAT32, 2)
    for place, num_tokens in ((HERE, 256 + 16), (ON_CORES, 256 + 128)):
        start = start_of("vllm", "dp=2,tp=2", GATHERED, place, kv_tokens=512)
        options, _ = given_to(start)
        assert int(options["kv_cache_memory_bytes"]) == num_tokens * of_token


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm", "expertlane"])
def test_without_a_budget_on_gpus_an_engine_chooses(engine):
    start = start_of(engine, "tp=2")
    text = " ".join([*start.lines, *start.files.values()])
    assert not any(
        option in text
        for option in (
            "--kv-cache-memory-bytes",
            "--max-total-tokens",
            'max_tokens":',
            "--num-blocks",
        )
    )
