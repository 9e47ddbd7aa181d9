"""Mistakes of every command: one line that names what is wrong, exit code 2, nothing started."""

import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

import example_pages
from cli.screen import refused
from expertlane.balance.holding import ModelPlacement, write_placement
from expertlane.balance.placement import Placement
from expertlane.balance.trace import RoutingTrace, write_trace
from expertlane.results.file import write

# A command line, and the words that the line on standard error holds. By command.
BENCH = {
    "no/such/model/here": "model no/such/model/here",
    "paper-tiny --layout tp=1 --layout tp=3": "layout tp=3",
    "paper-tiny --batch 1 --rate 1": "--batch --rate",
    "paper-tiny --batch 1,0": "--batch 1,0 1",
    "paper-tiny --batch 1,": "--batch 1",
    "paper-tiny --batch 1000000000000000": "--batch 1000000000000000",
    "paper-tiny --rate nan": "--rate nan 0.001",
    "paper-tiny --rate fast": "--rate fast 0.001",
    "paper-tiny --rate 1e-300": "--rate 1e-300 0.001",
    "paper-tiny --num-requests 0": "--num-requests 0",
    "paper-tiny --num-requests 4 --batch 1,8": "--num-requests 4 --batch 8",
    "paper-tiny --prompt-len 9:8": "--prompt-len 9:8",
    "paper-tiny --output-len 1:2:3": "--output-len 1:2:3",
    "paper-tiny --output-len :2": "--output-len :2",
    "paper-tiny --prompt-len 1:60 --output-len 6": "60 6 tokens 65 positions 64",
    "paper-tiny --placement even": "--placement even round_robin",
    "paper-tiny --placement even.json --layout dp=2,ep=2 --layout tp=1": "even.json 2 ranks 1",
    "paper-tiny --placement even.json --num-redundant-experts 2": "even.json 2",
    "paper-tiny --placement short.json": "short.json 3 layers 4 lacks layer",
    "paper-tiny --placement text.json": "text.json JSON",
    "paper-tiny --layout dp=2,ep=2 --layout tp=1 --num-redundant-experts 3": "19 experts 1 rank 16",
    "paper-tiny --layout dp=4,ep=4 --ranks-per-node 3 --dispatch hierarchical": "ep=4 dispatch",
    "paper-tiny --num-micro-batches 0": "--num-micro-batches 0",
    "paper-tiny --seed 18446744073709551616": "--seed 18446744073709551616",
    "paper-tiny --timeout-s 1e300": "--timeout-s 1e+300 0",
    "paper-tiny --price 1e300": "--price 1e+300 0",
}
GENERATE = {
    "no/such/model/here --token-ids 1": "no/such/model/here",
    "paper-tiny --token-ids 1 --layout tp2": "tp2 unknown",
    "paper-tiny --token-ids 1 --layout tp=3": "tp=3 divide",
    "paper-tiny --token-ids 1 --temperature nan": "--temperature nan",
    "paper-tiny --token-ids 1 --dtype float7": "--dtype float7 float32 bfloat16 float16",
    "paper-tiny --token-ids 1 --stop ''": "--stop empty string",
    "paper-tiny --token-ids 1 --stop a": "--stop tokenizer",
    "paper-tiny --token-ids 1 --stop-token-id 257": "--stop-token-id 257 tokens 256",
    "paper-tiny --token-ids 1 --stop-token-id -1": "--stop-token-id -1",
    "paper-tiny Hi": "tokenizer --token-ids",
    "paper-tiny --token-ids 1,,2": "--token-ids 1,,2",
    "paper-tiny --token-ids ''": "--token-ids",
    "paper-tiny --file none": "none No such file",
    "paper-tiny --token-ids 1 --logprobs 1": "--logprobs --json",
    "paper-tiny --token-ids 1 --system a": "--system --chat",
    "paper-tiny --token-ids 1 --regex a": "--regex tokenizer",
    "paper-tiny --token-ids 1 --compact-json": "--compact-json --json-schema",
    "paper-tiny --token-ids 1 --regex a --json-schema b": "--json-schema --regex",
    "paper-tiny --token-ids 1 --chat": "--chat reads",
    "paper-tiny --chat": "paper-tiny tokenizer chat",
}
PLAN = {
    "paper-tiny --cluster h999x16": "h999",
    "paper-tiny --cluster h100": "h100 PROFILExCOUNT",
    "paper-tiny --cluster h100x0": "h100x0 PROFILExCOUNT",
    "paper-tiny --cluster h100x999999": "4,096",
    "paper-tiny --cluster a100x4 --dtype float8": "A100 float8 --dtype a100x4 float16 bfloat16",
    "paper-tiny --framework TRT": "TRT mean trt list",
    "paper-tiny --framework trt-llm": "trt-llm mean trt dynamo-trt",
    "paper-tiny --cluster H200x8": "H200 mean h200 .toml",
    "Paper-Tiny": "Paper-Tiny folder mean paper-tiny",
    "paper-tiny --slo tpot.mean=0ms": "limit 0",
    "paper-tiny --slo tpot.mean=1s,tpot.mean=2s": "--slo tpot.mean twice",
    "paper-tiny --engine vlm": "vlm vllm sglang trtllm expertlane",
    "paper-tiny --framework sglang --engine trtllm": "--engine trtllm --framework sglang",
    "paper-tiny --engine expertlane --mtp 2 --mtp-acceptance 0.8": "--mtp expertlane drafts",
    "paper-tiny --prompt-len x": "--prompt-len x",
    "paper-tiny --output-len 1": "--output-len 1 2 simulate",
    "paper-tiny --batch 4,8": "--batch 4,8",
    "paper-tiny --rate 2,5": "--rate 2,5 simulate",
    "paper-tiny --rate 5 --batch 2": "--batch --rate exclude",
    "paper-tiny --num-requests 5": "--num-requests simulate",
    "paper-tiny --requests x.csv --prompt-len 2": "--prompt-len --requests exclude",
    "paper-tiny --prompt-len 9999": "positions paper-tiny 64 --output-len",
    "paper-tiny --skew -1": "--skew -1.0 0 10",
    "paper-tiny --routing-trace none.npz": "none.npz",
    "./nowhere": "nowhere",
    "./empty": "config.json",
}
SIMULATE = {
    "--cluster z9x16": "z9 h100",
    "--cluster h100": "PROFILExCOUNT h100x16",
    "--cluster h100x8 --prompt-len 8 --output-len 8": "dp=16,ep=16 16 h100x8",
    "--cluster a100x16 --dtype float8": "float8 bfloat16",
    "--prefill-layout tp=2 --prompt-len 8 --output-len 8": "tp=2 dp=16,ep=16 18 h100x16",
    "--layout dp=16,ep=3": "ep=3 valid",
    "--layout dp=8,ep=8 --dispatch hierarchical --prompt-len 8 --output-len 8": "ep=8 one node",
    "--rate 2 --batch 4": "--batch --rate",
    "--batch 9 --num-requests 8": "--num-requests 8 --batch 9",
    "--slo ttft.p95=5": "--slo ttft.p95=5 ms",
    "--requests none.csv": "--requests none.csv",
    "--requests x --prompt-len 8": "--prompt-len --requests",
    "--dispatch auto": "--dispatch auto",
    "--overlap auto": "--overlap auto",
    "--prompt-len 60 --output-len 8": "67 positions 64",
    "--mtp 1": "--mtp 1 not given",
    "--mtp-acceptance 0.5": "--mtp 0",
    "--mtp 1 --mtp-acceptance 1.5": "--mtp-acceptance 1.5 0 1",
    "--mtp 99 --mtp-acceptance 0.5": "99 drafts 0 16",
    "--routing-trace no.npz": "no.npz",
    "--block-size 0": "--block-size 0 1 65,536",
    "--max-num-seqs 0": "--max-num-seqs 0 1 1,048,576",
    "--num-redundant-experts 999 --prompt-len 8 --output-len 8": "240 redundant",
}
COMPARE = {
    "--experts-per-token two": "--experts-per-token two 1 4,096 2,1",
    "--experts-per-token ''": "--experts-per-token 1 4,096 2,1",
    "--experts-per-token 1,1": "--experts-per-token 1,1 twice",
    "--experts-per-token 2,17": "--experts-per-token 17 num_experts_per_tok 16 experts",
    "--timeout-s nan": "--timeout-s nan 0 1,000,000",
    "--clock wall --links a100": "--links --clock wall",
    "--clock wall --link-scale 3": "--link-scale --clock wall",
    "--links none --link-scale 3": "--link-scale --links",
    "--only 'EP 17'": "--only EP 17 1: EP 16",
    "--only '8,EP 16'": "--only EP 16 twice",
    "--only ,": "--only 1: EP 16",
    "--resume --compute h100": "--resume --compute",
    "--repeat 0": "--repeat 0 1 1,000",
    "none.toml": "none.toml No such file",
    "--model none": "model none folder",
    "--model empty": "model config.json",
    "--out text.json/here": "text.json/here folder",
    "--cluster h100x16": "--cluster --project",
    "--skew 2": "--skew --project",
    "--project --cluster h100": "h100 PROFILExCOUNT h100x16 COUNT 1 1,000,000 a100 b200 TOML",
    "--project --cluster h100x8": "TP 8 × PP 2 16 h100x8 h100x16",
    "--project --skew nan": "--skew nan 0 10",
    "--tok-p": "--tok-p try",
}
BALANCE = {
    "none.npz --ep 4": "none.npz No such file",
    "text.json --ep 4": "text.json JSON",
    "trace.npz --ep 0": "--ep 0 1 1,024",
    "trace.npz --ep 4 --ranks-per-node 3": "--ranks-per-node 3 divide --ep 4",
    "trace.npz --ep 4 --num-redundant-experts 5000": "--num-redundant-experts 5000 0 4,096",
    "trace.npz --ep 2 --num-redundant-experts 17": "--num-redundant-experts 17 --ep 2 ranks rank",
    "trace.npz --ep 8 --placement even.json": "even.json 2 ranks 8",
    "other.npz --ep 2 --placement even.json": "even.json any 16 experts layer 8",
    "trace.npz --ep 2 --placement short.json": "short.json 3 layers any 4 lacks layer",
    "trace.npz --ep 2 --placement text.json": "text.json JSON 1",
    "trace.npz --ep 2 --placement even.json --num-redundant-experts 4": "4 even.json",
    "trace.npz --ep 4 --placement linear --no-coactivation": "--no-coactivation --placement",
    "trace.npz --ep 2 --placement even.json --out new": "--out even.json",
}
OTHERS = {
    "calibrate --ranks 0": "--ranks 0 1 1,024",
    "calibrate my/laptop": "NAME my/laptop 64 digits",
    "calibrate folder": "folder.toml folder",
    "calibrate --full --json": "--full --json",
    "list layouts paper --cluster h100x9999": "4,096",
    "list layouts paper --cluster none": "PROFILExCOUNT",
    "list layouts paper --cluster h100x8 --max-model-len 0": "--max-model-len 0",
    "list layouts paper": "--cluster",
    "diff a none": "none No such file",
    "diff a p": "a bench p plan",
    "diff a a --threshold -1": "--threshold -1.0 0 1,000",
    "report a --out a/results.json/below": "a/results.json folder",
    "serve paper-tiny --port 65536": "--port 65536 0 65,535",
    "serve paper-tiny --host no.such.host.invalid": "--host no.such.host.invalid",
    "serve paper-tiny --api-key ''": "--api-key 1 API",
    "serve paper-tiny --api-key-file /dev/null/none": "--api-key-file",
    "serve paper-tiny --layout dp=3,ep=2": "layout",
    "serve paper-tiny --reconnect-s 5": "--reconnect-s --journal DIR",
    "serve paper-tiny --log-prompts": "--log-prompts --log-format",
}
BY_COMMAND = {
    "bench": BENCH,
    "generate": GENERATE,
    "plan": PLAN,
    "simulate paper-tiny --layout dp=16,ep=16 --cluster h100x16": SIMULATE,
    "compare": COMPARE,
    "balance": BALANCE,
}
ALL = {
    f"{command} {line}": words for command, of in BY_COMMAND.items() for line, words in of.items()
}


def trace_of(num_experts: int) -> RoutingTrace:
    ids = np.zeros((4, 6, 2), dtype=np.int16)
    ids[..., 1] = 1
    return RoutingTrace("any", num_experts, (0, 1, 2, 3), ids, np.zeros(6, dtype=np.int64))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all kinds: traces, placements, results, a text."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "text.json").write_text("{")
    for name in ("empty", "folder.toml"):
        (folder / name).mkdir()
    for name, num_experts in (("trace.npz", 16), ("other.npz", 8)):
        write_trace(trace_of(num_experts), folder / name)
    for name, num_layers in (("even.json", 4), ("short.json", 3)):
        layers = dict.fromkeys(range(num_layers), Placement.linear(16, 2))
        write_placement(ModelPlacement("any", 16, layers), folder / name)
    for name, kind in (("a", "bench"), ("p", "plan")):
        write(example_pages.KINDS[kind](), folder / name)
    return folder


@pytest.mark.parametrize(("line", "words"), (ALL | OTHERS).items(), ids=ALL | OTHERS)
def test_a_mistake_is_one_line_before_anything_runs(
    run, comparison, monkeypatch, tmp_path, kept, line, words
):
    for command in ("bench", "generate", "serve"):
        monkeypatch.setattr(f"expertlane.cli.{command}.load_model", None)
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    before = sorted(os.listdir(tmp_path))
    assert refused(run(*shlex.split(line)), words)
    assert not comparison.pools
    assert sorted(os.listdir(tmp_path)) == before
