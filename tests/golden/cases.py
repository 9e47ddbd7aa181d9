"""The commands whose results are kept, and the files that they are given."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).parent
# Of paper-small with hidden 256, heads of 16, experts of 1,024: 16 prompts of 48 tokens, 17 greedy
# tokens each.
TRACE = HERE / "routing.npz"
PLACEMENT = HERE / "placement.json"  # what `expertlane balance` made of it, as in its case
CPU_PROFILE = HERE / "cpu.toml"  # of `expertlane calibrate --ep 2 --dtype float32`

# Sizes as published with Mixtral 8x22B.
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32768,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}
# Sizes as published with DeepSeek-V3.
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
_LONG = """name = "{name}"
[model]
checkpoint = "{name}"
[workload]
num_sequences = 256
prompt_len = 2000
output_len = 64
[cluster]
ranks_per_node = 8
"""
MIXTRAL_DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "TP 8": {"layout": "tp=8"},
    "rotating": {
        "layout": "tp=4,pp=2",
        "num_micro_batches": 2,
        "micro_batch_schedule": "rotating",
    },
    "overlap": {"layout": "dp=8,ep=8", "overlap": True},
    "copies": {"layout": "dp=8,ep=8", "num_redundant_experts": 8, "placement": "round_robin"},
    "gather": {"layout": "dp=2,tp=4,ep=4", "dispatch": "all_gather", "payload": "float8"},
    "two": {"layout": "replicas=2,dp=4,ep=4"},
}
DEEPSEEK_DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "TP 8": {"layout": "tp=8,pp=2", "num_micro_batches": 2},
    "EP 16": {"layout": "dp=16,ep=16"},
    "auto": {"layout": "dp=16,ep=16", "dispatch": "auto", "overlap": "auto"},
    "nodes": {
        "layout": "dp=8,tp=2,ep=16",
        "dispatch": "hierarchical",
        "overlap": True,
        "payload": "float8",
        "num_redundant_experts": 32,
    },
}
# Every dispatch form, overlap, copies and pipelines on four ranks, small enough for seconds.
TINY_DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "stages": {"layout": "tp=2,pp=2", "num_micro_batches": 2},
    "rotating": {
        "layout": "dp=2,pp=2,ep=2",
        "num_micro_batches": 2,
        "micro_batch_schedule": "rotating",
    },
    "overlap": {"layout": "dp=4,ep=4", "overlap": True},
    "nodes": {"layout": "dp=4,ep=4", "dispatch": "hierarchical", "num_redundant_experts": 4},
    "gather": {"layout": "dp=2,tp=2,ep=2", "dispatch": "all_gather", "payload": "bfloat16"},
    "round": {
        "layout": "dp=4,ep=4",
        "placement": "round_robin",
        "num_redundant_experts": 8,
        "payload": "float8",
    },
    "two": {"layout": "replicas=2,tp=2,ep=2"},
}
_TINY = """name = "{name}"
[model]
{model}
[workload]
num_sequences = 13
prompt_len = 12
output_len = 7
seed = 1
[cluster]
ranks_per_node = 2
"""
# The skewed experiment with less work and nothing that moves experts.
_SKEWED = """name = "skewed"
[model]
preset = "paper-small"
num_experts_per_tok = 2
[model.routing]
router_bias = true
router_skew = 1.0
[workload]
num_sequences = 128
prompt_len = 4
output_len = 9
seed = 1
[cluster]
ranks_per_node = 8
"""
SKEWED_DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "EP 16": {"layout": "dp=16,ep=16"},
    "copies": {"layout": "dp=16,ep=16", "num_redundant_experts": 16},
    "nodes": {
        "layout": "dp=16,ep=16",
        "num_redundant_experts": 16,
        "dispatch": "hierarchical",
    },
    "moved": {
        "layout": "dp=16,ep=16",
        "num_redundant_experts": 16,
        "rebalance_steps": 4,
    },
}


@dataclass(frozen=True)
class Case:
    """A command line without `--out`.

    Attributes:
        source: "published" for plans of published models, of which the answer alone is kept.
        is_quick: whether `make test` runs it.
    """

    name: str
    arguments: str
    source: Literal["measured", "projected", "published"] = "projected"
    is_quick: bool = False

    @property
    def command(self) -> str:
        """Its first word."""
        return self.arguments.split()[0]


def _routed(arguments: str) -> str:
    """With uniform routing unless it says which."""
    says = "--skew" in arguments or "--routing-trace" in arguments
    return arguments if says else f"{arguments} --skew 0"


def _simulate(name: str, arguments: str, is_quick: bool = False) -> Case:
    return Case(f"simulate {name}", f"simulate {_routed(arguments)}", is_quick=is_quick)


def _plan(name: str, arguments: str, is_quick: bool = False) -> Case:
    return Case(f"plan {name}", f"plan {_routed(arguments)}", is_quick=is_quick)


_LOAD = "--batch 64 --num-requests 64 --prompt-len 512 --output-len 32"
_DRAWN = "--prompt-len 64:1024 --output-len 8:64"

PROJECTED = (
    Case("compare paper", "compare paper --project --skew 1 --experts-per-token 2,1"),
    Case("compare mixtral", "compare mixtral.toml --project --cluster a100x8 --skew 0.6"),
    Case("compare deepseek", "compare deepseek.toml --project --cluster b200x16 --skew 0.5"),
    _plan("paper h100x16", "paper --cluster h100x16"),
    _plan("paper h100x16 traced", "paper --cluster h100x16 --routing-trace routing.npz"),
    _plan(
        "paper b200x8",
        "paper --cluster b200x8 --skew 0.8 --dtype float8 --execution eager --slo tpot.mean=20ms",
    ),
    _plan("mixtral h100x16", "./mixtral --cluster h100x16 --slo ttft.mean=400ms"),
    _plan("mixtral b200x8", "./mixtral --cluster b200x8 --skew 0.6"),
    _plan(
        "deepseek h100x16",
        "./deepseek --cluster h100x16 --batch 512 --prompt-len 2000 --output-len 500",
    ),
    _plan("deepseek b200x8", "./deepseek --cluster b200x8 --kv-dtype float8 --slo tpot.mean=30ms"),
    _plan(
        "paper-small cpu",
        "paper-small --cluster cpu.tomlx2 --batch 16 --prompt-len 64 --output-len 32",
    ),
    _plan(
        "paper h100x8 prefixes",
        "paper --cluster h100x8 --batch 64 --prompt-len 1000 --output-len 100 "
        "--prefix-len 800 --num-prefixes 4",
    ),
    _simulate(
        "deepseek prefixes in two pools",
        "./deepseek --layout dp=16,ep=16 --prefill-layout dp=2,tp=8,ep=16 --cluster h100x32 "
        "--dtype float8 --batch 64 --prompt-len 1000:2000 --output-len 50:100 "
        "--prefix-len 900 --num-prefixes 30",
    ),
    _simulate("paper EP 16", f"paper --layout dp=16,ep=16 --cluster h100x16 {_LOAD}"),
    _simulate(
        "paper traced",
        "paper --layout dp=16,ep=16 --cluster h100x16 --routing-trace routing.npz "
        f"--overlap on --num-redundant-experts 8 {_LOAD}",
        is_quick=True,
    ),
    _simulate(
        "paper placed",
        "paper --layout dp=16,ep=16 --cluster h100x16 --routing-trace routing.npz "
        f"--placement placement.json --dispatch hierarchical {_LOAD}",
    ),
    _simulate(
        "paper rotating",
        "paper --layout tp=8,pp=2 --cluster h100x16 --num-micro-batches 4 "
        f"--micro-batch-schedule rotating {_LOAD}",
    ),
    _simulate(
        "paper drained",
        "paper --layout tp=4,pp=2 --cluster b200x8 --num-micro-batches 2 --overlap on "
        f"--seed 3 {_LOAD}",
    ),
    _simulate(
        "paper literal",
        f"paper --layout dp=2,tp=8,ep=2 --cluster h200x16 --execution eager {_LOAD}",
    ),
    _simulate(
        "paper gathered, in waves",
        "paper --layout dp=4,tp=2,ep=8 --cluster b200x8 --dispatch all_gather "
        "--routing-trace routing.npz --batch 96 --num-requests 200 --prompt-len 4000:12000 "
        "--output-len 8:64 --max-num-seqs 8 --max-num-batched-tokens 4096 --block-size 32",
    ),
    _simulate("mixtral TP 8", f"./mixtral --layout tp=8 --cluster h100x8 --dtype float8 {_LOAD}"),
    _simulate(
        "mixtral arrivals",
        "./mixtral --layout dp=8,tp=2,ep=16 --cluster a100x16 --rate 20 --num-requests 60 "
        f"{_DRAWN} --skew 0.6 --num-redundant-experts 8 --placement round_robin --seed 5",
    ),
    _simulate(
        "mixtral narrow",
        "./mixtral --layout dp=4,tp=2,ep=8 --cluster b200x8 --dispatch all_gather "
        f"--payload float8 --overlap on {_LOAD}",
    ),
    _simulate(
        "deepseek drafts",
        "./deepseek --layout dp=16,ep=16 --cluster h100x16 --dispatch hierarchical --overlap on "
        f"--mtp 2 --mtp-acceptance 0.7 --batch 64 --num-requests 64 {_DRAWN}",
    ),
    _simulate(
        "deepseek two pools",
        "./deepseek --layout dp=8,tp=2,ep=16 --prefill-layout dp=2,tp=8,ep=16 --cluster h100x32 "
        f"--payload float8 --skew 0.8 --num-redundant-experts 32 --rate 10 "
        f"--num-requests 40 {_DRAWN}",
    ),
    _simulate(
        "deepseek TP 8",
        f"./deepseek --layout tp=8 --cluster b200x8 --kv-dtype float8 {_LOAD}",
    ),
    _simulate(
        "paper-small cpu",
        "paper-small --layout dp=2,ep=2 --cluster cpu.tomlx2 --batch 8 --num-requests 8 "
        "--prompt-len 16:64 --output-len 4:16",
        is_quick=True,
    ),
    Case("balance", "balance routing.npz --ep 16 --ranks-per-node 8 --num-redundant-experts 16"),
)
MEASURED = (
    Case(
        "compare paper-small",
        "compare paper-small --dtype float32 --clock wall --repeat 2",
        "measured",
    ),
    Case(
        "compare skewed", "compare skewed.toml --dtype float32 --clock wall --repeat 2", "measured"
    ),
    Case(
        "compare tiny",
        "compare tiny.toml --dtype float32 --clock wall --repeat 2",
        "measured",
    ),
    Case(
        "compare checkpoint",
        "compare checkpoint.toml --dtype float32 --clock wall --repeat 2",
        "measured",
    ),
)
# Published models that are planned on both clusters, and what is asked besides.
PUBLISHED_MODELS = {
    "qwen3-next-80b-a3b": "",
    "qwen3.5-397b-a17b": "",
    "deepseek-v3.2": "",
    "deepseek-v4-flash": "",
    "glm-5": " --dtype float8",
    "glm-5.2": " --dtype float8",
    "minimax-m3": "",
    "kimi-linear-48b-a3b": "",
    "granite-4.0-h-small": "",
    "nemotron-3-nano-30b-a3b": "",
    "nemotron-3-super-120b-a12b": "",
    "llama-4-maverick-17b-128e": "",
    "llama-4-scout-17b-16e": "",
    "deepseek-r1": "",
    "gpt-oss-120b": "",
}
PUBLISHED = tuple(
    Case(
        f"plan {name} {cluster}",
        f"plan ./{name} --cluster {cluster}{asked}",
        "published",
    )
    for name, asked in PUBLISHED_MODELS.items()
    for cluster in ("h200x8", "gb200x72")
)
CASES = PROJECTED + MEASURED + PUBLISHED


def prepare(folder: Path) -> None:
    """Put into `folder` what the commands name."""
    for path in (TRACE, PLACEMENT, CPU_PROFILE):
        shutil.copy(path, folder)
    for name, config, deployments in (
        ("mixtral", MIXTRAL, MIXTRAL_DEPLOYMENTS),
        ("deepseek", DEEPSEEK, DEEPSEEK_DEPLOYMENTS),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        _write_experiment(folder / f"{name}.toml", _LONG.format(name=name), deployments)
    for name in PUBLISHED_MODELS:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(_published(name)))
    tiny = _TINY.format(name="tiny", model='preset = "paper-tiny"')
    _write_experiment(folder / "tiny.toml", tiny, TINY_DEPLOYMENTS)
    drawn = _TINY.format(name="checkpoint", model='checkpoint = "drawn"')
    _write_experiment(folder / "checkpoint.toml", drawn, TINY_DEPLOYMENTS)
    _write_experiment(folder / "skewed.toml", _SKEWED, SKEWED_DEPLOYMENTS)


def _write_experiment(path: Path, head: str, deployments: dict[str, dict[str, Any]]) -> None:
    tables = [
        "\n[[deployments]]\n"
        + "".join(
            f"{key} = {json.dumps(value)}\n" for key, value in ({"name": name} | each).items()
        )
        for name, each in deployments.items()
    ]
    path.write_text(head + "".join(tables), encoding="utf-8")


def _published(name: str) -> dict[str, Any]:
    """A config.json as its authors published it; DeepSeek-R1's is DeepSeek-V3's."""
    of_name: dict[str, dict[str, Any]] = {}
    for file in ("published.json", "published_mixers.json"):
        of_name |= json.loads((HERE.parent / "spec" / file).read_text(encoding="utf-8"))
    if name == "gpt-oss-120b":
        smaller = of_name["gpt-oss-20b"]
        types = {"layer_types": smaller["layer_types"][:2] * 18}
        return smaller | types | {"num_hidden_layers": 36, "num_local_experts": 128}
    return of_name["deepseek-v3" if name == "deepseek-r1" else name]
