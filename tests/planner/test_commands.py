"""The command lines of engines: their parsers take them, and they enforce the plan."""

import json
import shlex
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.screen import tells
from expertlane.cli.app import app
from expertlane.cost.step.operation import NumberTypes
from expertlane.planner.candidates import Candidate
from expertlane.planner.commands import Serving, engine_commands
from expertlane.planner.engines import ENGINES, ServedPool, longest_request
from expertlane.planner.server_start import ServeTarget
from expertlane.spec.deployment import DISPATCH_FORMS, Options
from expertlane.spec.hf_config import Quantization
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload
from planner.serving_options import Parser, of_installed, recorded, words_of

FP8, MXFP4 = Quantization("fp8", "float8"), Quantization("mxfp4", "mxfp4")
TARGET, TYPES = ServeTarget("/there/mine"), NumberTypes.asked("bfloat16")
MODEL = PRESETS["paper"].with_overrides(name="many", num_experts=256, num_attention_heads=128)
PARSERS = {
    package: Parser(package) for package in ("vllm", "sglang", "vllm-router", "sglang-router")
}
FORMS = tuple(DISPATCH_FORMS)
GATHERED = Options(dispatch="all_gather")
ROTATING = Options(num_micro_batches=2, micro_batch_schedule="rotating")


def pool_of(candidate, role, rank_seqs):
    sizes = {"rank_seqs": rank_seqs, "step_tokens": 8192, "devices_per_host": 8}
    return ServedPool(candidate, MODEL, role, **sizes)


def served(layout, options=None, *, drafts=0, role="both", num_seqs=512):
    candidate = Candidate(Layout.parse(layout), options or Options(), drafts)
    places = candidate.layout.places_of_rank(num_seqs, num_seqs + 1)
    return pool_of(candidate, role, places)


def commands(engine, *pools, types=TYPES, target=TARGET, max_len=4096):
    return engine_commands(Serving(ENGINES[engine], pools, target, types, max_len))


def parsed(line):
    """As the recorded parser takes it: the options that were given."""
    package, words = words_of(line)
    taken = vars(PARSERS[package].parse_args(words))
    return {name: value for name, value in taken.items() if value not in (None, False)}


def one(engine, *args, types=TYPES, target=TARGET, **kwargs):
    """The options of the first node of the only pool."""
    made = commands(engine, served(*args, **kwargs), types=types, target=target)
    return parsed(made[0].lines[0])


@pytest.mark.parametrize(
    ("weights", "stored", "words", "note"),
    [
        ("bfloat16", None, "--dtype bfloat16", ""),
        ("float8", None, "--quantization fp8", ""),
        ("float8", FP8, "", ""),
        ("bfloat16", FP8, "--dtype bfloat16", "stored fp8 not bfloat16"),
        ("bfloat16", MXFP4, "--dtype bfloat16", "stored mxfp4 not bfloat16"),
        ("float8", MXFP4, "", "stored mxfp4 not float8"),
        ("mxfp4", MXFP4, "", ""),
        ("nvfp4", None, "", "checkpoint nvfp4"),
    ],
)
def test_types_of_weights(weights, stored, words, note):
    target = ServeTarget("/there/mine", stored)
    for engine in ("vllm", "sglang"):
        (made,) = commands(engine, served("tp=4"), types=NumberTypes.asked(weights), target=target)
        (line,) = made.lines
        assert "/there/mine" in line
        assert words in line
        assert ("--dtype" in line) == ("--dtype" in words)
        assert ("--quantization" in line) == ("--quantization" in words)
        assert bool(made.note) == bool(note)
        assert tells(made.note, note)


PREFILL_APART = Options(dispatch="all_to_all", prefill_dispatch="hierarchical")


@pytest.mark.parametrize(
    ("options", "role", "vllm", "sglang"),
    [
        (Options(), "both", None, "auto"),
        (PREFILL_APART, "both", None, "auto"),
        (GATHERED, "both", "allgather_reducescatter", None),
        (Options(), "prefill", "deepep_high_throughput", "normal"),
        (Options(dispatch="hierarchical"), "prefill", "deepep_high_throughput", "normal"),
        (Options(), "decode", "deepep_low_latency", "low_latency"),
        (GATHERED, "decode", "allgather_reducescatter", None),
    ],
)
def test_kernels_of_each_phase(options, role, vllm, sglang):
    pool = served("dp=16,ep=16", options, role=role)
    assert ENGINES["vllm"].runs(pool.candidate, MODEL, role) == (vllm is not None)
    if vllm is not None:
        given = parsed(commands("vllm", pool)[0].lines[0])
        assert given["all2all_backend"] == vllm
        assert ("kv_transfer_config" in given) == (role != "both")
    given = parsed(commands("sglang", pool)[0].lines[0])
    assert given.get("deepep_mode") == sglang
    assert given.get("disaggregation_mode") == (None if role == "both" else role)


def test_limits_are_those_of_the_plan():
    layout = "replicas=2,dp=8,ep=8"
    vllm, sglang = one("vllm", layout, GATHERED), one("sglang", layout)
    assert (vllm["max_num_seqs"], sglang["max_running_requests"]) == (32, 256)  # a rank; all ranks
    assert (vllm["max_num_batched_tokens"], sglang["chunked_prefill_size"]) == ("8192", 65536)
    assert (vllm["max_model_len"], sglang["context_length"]) == ("4096", "4096")
    assert sglang["cuda_graph_max_bs_decode"] == 32
    few = one("vllm", "dp=4,ep=4", GATHERED, num_seqs=5)
    assert few["max_num_seqs"] == 2
    assert "max_cudagraph_capture_size" not in few
    many = one("vllm", "tp=8", num_seqs=4000, drafts=1)
    assert many["max_cudagraph_capture_size"] == 8000
    decode = one("vllm", "dp=8,ep=8", role="decode", drafts=1)
    assert (decode["max_num_seqs"], decode["max_num_batched_tokens"]) == (64, "128")


def test_a_longest_request_is_above_the_mean_and_within_the_model():
    paper = PRESETS["paper"]
    assert longest_request(Workload(8, 1000, 1000).load, MODEL) == 3072
    small = paper.with_overrides(max_position_embeddings=2100)
    assert longest_request(Workload(8, 1000, 1000).load, small) == 2100
    exact = paper.with_overrides(max_position_embeddings=1999)  # the last token is never read
    assert longest_request(Workload(8, 1000, 1000).load, exact) == 2000


def test_attention_data_parallelism_and_drafts():
    vllm = one("vllm", "dp=4,tp=2,ep=8", GATHERED, drafts=3)
    sglang = one("sglang", "dp=4,tp=2,ep=8", drafts=3)
    assert (vllm["tensor_parallel_size"], vllm["data_parallel_size"]) == (2, 4)
    assert vllm["speculative_config"] == '{"method": "mtp", "num_speculative_tokens": 3}'
    assert (sglang["tp_size"], sglang["attn_dp_size"], sglang["ep_size"]) == (8, 4, 8)
    assert (sglang["speculative_num_steps"], sglang["speculative_num_draft_tokens"]) == (3, 4)


def test_context_parallelism():
    assert one("vllm", "tp=8,dcp=8")["decode_context_parallel_size"] == 8
    assert one("sglang", "tp=8,dcp=8")["dcp_size"] == 8


def test_redundant_experts():
    options = replace(GATHERED, num_redundant_experts=8)
    vllm, sglang = (one(engine, "dp=8,ep=8", options) for engine in ("vllm", "sglang"))
    assert vllm["enable_eplb"]
    assert vllm["eplb_config"] == '{"num_redundant_experts": 8}'
    assert sglang["enable_eplb"]
    assert sglang["ep_num_redundant_experts"] == 8
    (trtllm,) = commands("trtllm", served("dp=8,ep=8", options))
    assert '"num_slots": 264' in trtllm.lines[0]


def test_low_latency_buffers_hold_a_decode_step():
    variable = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
    for num_seqs, buffer in ((512, 128), (8 * 200, 256), (8 * 2000, 1024)):
        (made,) = commands("sglang", served("dp=8,ep=8", num_seqs=num_seqs))
        assert made.lines[0].startswith(f"{variable}={buffer} python -m sglang.launch_server ")
        assert ("1,024 tokens" in made.note) == (num_seqs > 8 * 1024)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "expertlane"])
def test_every_node_has_its_line(engine):
    (made,) = commands(engine, served("dp=32,ep=32", GATHERED))
    assert len(made.lines) == 4
    assert all(f"--node-rank {node}" in line for node, line in enumerate(made.lines))
    assert all("HOST0" in line for line in made.lines)
    assert len({line.replace(" --headless", "") for line in made.lines}) == 4
    if engine == "vllm":
        first, *others = map(parsed, made.lines)
        assert "headless" not in first
        assert all(each["headless"] for each in others)
        assert first["nnodes"] == 4
    if engine == "expertlane":
        assert made.lines[1].startswith(
            "torchrun --nnodes 4 --nproc-per-node 1 --master-addr HOST0"
        )


def test_tensorrt_llm_is_started_once_over_all_nodes():
    (made,) = commands("trtllm", served("dp=16,ep=16", GATHERED))
    (line,) = made.lines
    assert "mpirun -n 16 trtllm-llmapi-launch trtllm-serve /there/mine" in line
    words = shlex.split(line)
    config = json.loads(words[words.index("echo") + 1])
    assert config["enable_attention_dp"] is True
    assert (config["moe_expert_parallel_size"], config["max_batch_size"]) == (16, 32)
    assert made.label == "TensorRT-LLM (unverified)"


def test_replicas_get_a_router():
    server, router = commands("vllm", served("replicas=6,tp=4"))
    assert server.label == "vLLM, start 6 (options of 0.33.0)"
    assert tells(server.note, "2 servers devices 4K CUDA_VISIBLE_DEVICES --port 8000")
    prefill = served("replicas=4,dp=2", role="prefill")
    first, *_ = commands("vllm", prefill, served("tp=8", role="decode"))
    assert tells(first.note, "4 --data-parallel-rpc-port VLLM_NIXL_SIDE_CHANNEL_PORT")
    urls = parsed(router.lines[0])["worker_urls"]
    hosts = [f"http://HOST{host}:{port}" for host in range(3) for port in (8000, 8001)]
    assert urls == hosts
    assert router.label == "vLLM router (options of 0.1.17)"
    _, router = commands("sglang", served("replicas=2,tp=16"))
    assert parsed(router.lines[0])["worker_urls"] == ["http://HOST0:8000", "http://HOST2:8000"]
    (alone,) = commands("expertlane", served("replicas=2,tp=4"))
    assert "--layout replicas=2,tp=4 " in alone.lines[0]
    _, router = commands("trtllm", served("replicas=2,tp=4"))
    assert router.lines == ()
    assert "load balancer" in router.note


def test_disaggregated_pools_get_a_router_that_knows_both():
    pools = (
        served("replicas=2,dp=4,ep=4", role="prefill"),
        served("dp=16,ep=16", role="decode"),
    )
    for engine in ("vllm", "sglang"):
        prefill, decode, router = commands(engine, *pools)
        assert [prefill.role, decode.role, router.role] == ["prefill", "decode", "router"]
        assert (prefill.num_servers, len(decode.lines)) == (2, 2)
        given = parsed(router.lines[0])
        assert given["decode"] == [["http://HOST1:8000"]] or given["decode"] == [
            "http://HOST1:8000"
        ]
        first, second = given["prefill"]
        assert [first[0], second[0]] == ["http://HOST0:8000", "http://HOST0:8001"]
        if engine == "sglang":
            assert [first[1], second[1]] == ["8998", "8999"]
            assert parsed(prefill.lines[0])["disaggregation_bootstrap_port"] == 8998
        else:
            assert decode.lines[1].startswith("VLLM_NIXL_SIDE_CHANNEL_HOST=HOST2 ")
    *_, router = commands("trtllm", *pools)
    config = json.loads(shlex.split(router.lines[0])[1])
    assert config["context_servers"]["urls"] == ["HOST0:8000", "HOST0:8001"]


def test_the_own_command_is_one_of_the_own_parser():
    options = replace(
        ROTATING,
        overlap=True,
        dispatch="hierarchical",
        prefill_dispatch="all_to_all",
        payload="float8",
        num_redundant_experts=4,
    )
    types = replace(NumberTypes.asked("bfloat16"), kv="float8")
    (made,) = commands("expertlane", served("pp=2,dp=2,tp=2,ep=4", options), types=types)
    program, command, *words = shlex.split(made.lines[0])
    assert (program, command) == ("expertlane", "serve")
    # A model that does not exist ends it once its options are taken.
    result = CliRunner().invoke(app, [command, "./nowhere", *words[1:]])
    assert result.exit_code != 0
    assert "nowhere" in str(result.exception)


def test_what_was_checked_is_said():
    (made,) = commands("vllm", served("dp=8,ep=8", role="decode"))
    assert made.label == f"vLLM decode pool (options of {ENGINES['vllm'].version})"
    for name in ("vllm", "sglang"):
        engine = ENGINES[name]
        assert recorded(name)["version"] == engine.version
        assert recorded(engine.router.package)["version"] == engine.router.version


@st.composite
def pools(draw, role):
    """Any pool that a plan may have."""
    dp, tp = draw(st.sampled_from((1, 2, 8))), draw(st.sampled_from((1, 2, 4)))
    ep = draw(st.sampled_from([n for n in (1, 2, dp * tp) if dp * tp % n == 0]))
    dcp = draw(st.sampled_from([n for n in (1, 2, 4) if tp % n == 0]))
    options = replace(
        draw(st.sampled_from((Options(), ROTATING))),
        overlap=draw(st.booleans()),
        dispatch=draw(st.sampled_from(FORMS)),
        prefill_dispatch=draw(st.sampled_from((None, *FORMS))),
        num_redundant_experts=draw(st.sampled_from((0, ep))),
    )
    layout = Layout(draw(st.sampled_from((1, 3))), draw(st.sampled_from((1, 2))), dp, tp, ep, dcp)
    candidate = Candidate(layout, options, draw(st.sampled_from((0, 1, 3))))
    return pool_of(candidate, role, draw(st.integers(1, 2500)))


@given(
    st.one_of(st.tuples(pools("both")), st.tuples(pools("prefill"), pools("decode"))),
    st.sampled_from((None, FP8, MXFP4)),
    st.sampled_from(("bfloat16", "float8", "mxfp4")),
    st.sampled_from(("vllm", "sglang")),
)
def test_parsers_take_whatever_is_written(some, stored, weights, name):
    engine, candidates = ENGINES[name], [each.candidate for each in some]
    runs = engine.runs(candidates[0], MODEL) if len(some) == 1 else engine.joins(*candidates, MODEL)
    if not runs:
        return
    types, target = NumberTypes.asked(weights), ServeTarget("org/model", stored)
    made = engine_commands(Serving(engine, some, target, types, 4096))
    assert (len(made) > len(some)) == (sum(each.layout.replicas for each in some) > 1)
    for each in made:
        assert each.lines
        assert all(map(parsed, each.lines))


def drawn_plan(place: int) -> dict[str, Any]:
    """One of many small plans: clusters, loads, types, drafts."""
    prompt_len, output_len = ((700, 100), (16, 100), (100, 50))[place % 3]
    more = ({}, {"mtp": 2, "mtp_acceptance": 0.8}, {"dtype": "bfloat16"})[place % 3]
    return more | {
        "cluster": ("h100x4", "h100x8", "h200x16", "b200x8", "h100x2")[place % 5],
        "batch": str((1, 16, 64, 200)[place % 4]),
        "prompt_len": str(prompt_len),
        "output_len": str(output_len),
    }


@pytest.mark.parametrize("package", list(PARSERS))
def test_the_record_is_the_installed_parser(package):
    if find_spec(package.replace("-", "_")) is None:
        pytest.skip(f"{package} is not installed; its parser is as in serving_options.json")
    now, then = of_installed(package), recorded(package)
    if now["version"] != then["version"]:
        pytest.skip(f"{package} is {now['version']}; recorded was {then['version']}")
    assert now == then
