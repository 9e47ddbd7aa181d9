"""What is mutated: real experiments, profiles, results, configurations, placements, traces."""

import io
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

import example_pages
import example_plan
import example_projection
import example_results
import example_simulation
from cli.small_checkpoint import MIXTRAL
from expertlane.cost.laws import shipped_profiles
from expertlane.results.file import to_json
from expertlane.spec.experiment import shipped_experiments

_DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "routed_scaling_factor": 2.5,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "eos_token_id": [0, 1],
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
_GPT_OSS = MIXTRAL | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "head_dim": 16,
    "sliding_window": 16,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
CONFIGS: tuple[dict[str, Any], ...] = (MIXTRAL, _DEEPSEEK, _GPT_OSS)
GENERATION: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1]}
INDEX: dict[str, Any] = {
    "metadata": {"total_size": 1000},
    "weight_map": {"lm_head.weight": "model-1.safetensors", "model.norm.weight": "b.safetensors"},
}
PLACEMENT: dict[str, Any] = {
    "schema_version": 1,
    "model": "paper-tiny",
    "num_experts": 16,
    "ep": 2,
    "layers": [
        {"layer": layer, "experts_of_rank": [list(range(8)), list(range(8, 16))]}
        for layer in range(4)
    ],
}


def _small(experiment: dict[str, Any]) -> dict[str, Any]:
    """A shipped experiment with a load that takes no time."""
    sizes = {"num_sequences": 16, "prompt_len": 4, "output_len": 3}
    return experiment | {
        "model": experiment["model"] | {"preset": "paper-tiny"},
        "workload": experiment["workload"] | sizes,
        "deployments": experiment["deployments"][:3],
        "scaling": experiment.get("scaling", [])[:2],
    }


def experiments() -> list[dict[str, Any]]:
    """One with a checkpoint and a placement file, and all that are shipped."""
    shipped = [tomllib.loads(path.read_text()) for path in shipped_experiments().values()]
    written: dict[str, Any] = {
        "name": "mine",
        "seed": 3,
        "model": {"checkpoint": "model", "num_experts_per_tok": 1},
        "workload": {"num_sequences": 4, "prompt_len": 8, "output_len": 3, "seed": 1},
        "cluster": {"ranks_per_node": 2},
        "deployments": [
            {"name": "one", "layout": "dp=2,ep=2", "placement_file": "four.json"},
            {"name": "two", "layout": "dp=2,ep=2", "num_redundant_experts": 2, "overlap": "auto"},
        ],
    }
    return [written, *map(_small, shipped)]


def profiles() -> list[dict[str, Any]]:
    """The shipped ones: laws of its own, and another's taken over."""
    return [tomllib.loads(shipped_profiles()[name].read_text()) for name in ("h100", "h200")]


def results() -> list[dict[str, Any]]:
    """One of each kind."""
    found = [
        example_results.results([(example_results.SMALL, 0.2)]),
        example_projection.results(example_projection.usual().deployments, {"name": "paper"}),
        example_plan.PLAN,
        example_simulation.SIMULATION,
        example_pages.serving(),
    ]
    return [json.loads(to_json(each)) for each in found]


def trace() -> bytes:
    """A routing trace of paper-tiny's sizes."""
    file = io.BytesIO()
    ids = np.argsort(np.random.default_rng(0).random((4, 24, 16)), axis=-1)[..., :2]
    np.savez_compressed(
        file,
        schema_version=np.array(1),
        model=np.array("paper-tiny"),
        num_experts=np.array(16),
        layers=np.arange(4),
        topk_ids=ids.astype(np.int16),
        step=np.repeat(np.arange(6), 4),
    )
    return file.getvalue()


def write_all(folder: Path) -> None:
    """Files that command lines name, all of them right."""
    import tomli_w

    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(MIXTRAL))
    (folder / "placement.json").write_text(json.dumps(PLACEMENT))
    two_layers = PLACEMENT | {
        "num_experts": 4,
        "layers": [{"layer": layer, "experts_of_rank": [[0, 1], [2, 3]]} for layer in range(2)],
    }
    (folder / "four.json").write_text(json.dumps(two_layers))
    (folder / "trace.npz").write_bytes(trace())
    (folder / "mine.toml").write_text(tomli_w.dumps(experiments()[0]))
    (folder / "machine.toml").write_text(tomli_w.dumps(profiles()[0]))
    (folder / "prompts.txt").write_text("Hello\n")
