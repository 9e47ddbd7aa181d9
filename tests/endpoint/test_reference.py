"""The reference against an ordinary forward of transformers' whole model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from endpoint.whole import whole_logprobs
from engine.model.families import FAMILIES, VOCAB_SIZE, make_model
from engine.model.quantised import COMPRESSED, save_compressed, save_fp8, save_mxfp4
from expertlane.endpoint.reference import CheckpointReference
from expertlane.errors import UserError
from expertlane.progress import Progress

LENGTHS = (21, 1, 7, 22, 40, 2)


def drawn(lengths=LENGTHS, seed=0, vocab_size=VOCAB_SIZE):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, size=n).tolist() for n in lengths]


def float32_of(reference, prompts):
    return reference.score_in(prompts, ("float32",), Progress())["float32"]


def scored(folder, prompts, number_type="float32"):
    return CheckpointReference(folder).score_in(prompts, (number_type,), Progress())[number_type]


def check_is(folder: Path, plain: Path, bound: float = 1e-6) -> None:
    """The reference on a checkpoint is transformers on one that stands for the same."""
    prompts = drawn()
    for prompt, one in zip(prompts, scored(folder, prompts), strict=True):
        expected = whole_logprobs(plain, prompt)
        np.testing.assert_allclose(one.logprobs, expected, atol=bound, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_transformers(checkpoints, family: str) -> None:
    folder, prompts = checkpoints.folder(family), drawn()
    reference = CheckpointReference(folder)
    assert reference.vocab_size == VOCAB_SIZE
    assert reference.num_experts == (8,) * len(reference.moe_layers)
    for prompt, one in zip(prompts, float32_of(reference, prompts), strict=True):
        assert one.token_ids.tolist() == prompt
        np.testing.assert_allclose(one.logprobs, whole_logprobs(folder, prompt), atol=1e-6, rtol=0)
        assert one.topk_ids is not None
        assert one.router_margins is not None
        assert one.topk_ids.shape[:2] == (len(reference.moe_layers), len(prompt))
        assert one.router_margins.shape == one.topk_ids.shape[:2]
        assert (one.router_margins >= 0).all()


@pytest.mark.smoke(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_transformers(checkpoints, family: str) -> None:
    folder, prompts = checkpoints.folder(family), drawn()
    for prompt, one in zip(prompts, scored(folder, prompts, "bfloat16"), strict=True):
        expected = whole_logprobs(folder, prompt, torch.bfloat16)
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-6, rtol=0)


def test_prompts_of_one_length_run_together(checkpoints) -> None:
    folder, prompts = checkpoints.folder("qwen3_moe"), drawn([9] * 5 + [4] * 3)
    together = scored(folder, prompts)
    for prompt, one in zip(prompts, together, strict=True):
        assert one.token_ids.tolist() == prompt
        np.testing.assert_allclose(one.logprobs, whole_logprobs(folder, prompt), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_chosen_experts_and_margins(checkpoints, family: str) -> None:
    """Of families that choose by a softmax alone, from the logits that transformers gives out."""
    from endpoint.whole import whole_router_logits

    folder, prompts = checkpoints.folder(family), drawn()
    for prompt, one in zip(prompts, scored(folder, prompts), strict=True):
        for layer, logits in enumerate(whole_router_logits(folder, prompt)):
            scores = logits.softmax(-1)
            k = one.topk_ids.shape[-1]
            best = scores.topk(k + 1)
            chosen = np.sort(best.indices[:, :k].numpy())
            np.testing.assert_array_equal(np.sort(one.topk_ids[layer]), chosen)
            margin = (best.values[:, -2] - best.values[:, -1]).numpy()
            np.testing.assert_allclose(one.router_margins[layer], margin, atol=1e-6)


def test_choices_of_groups(checkpoints) -> None:
    """A margin is no larger than that of the groups: DeepSeek-V3 takes the best 2 of 4."""
    reference = CheckpointReference(checkpoints.folder("deepseek_v3"))
    assert reference.moe_layers == (2, 3)
    for one in float32_of(reference, drawn()):
        groups = [len(set(chosen // 2)) for chosen in one.topk_ids.reshape(-1, 3)]
        assert max(groups) <= 2
        assert np.isfinite(one.router_margins).all()


def test_float8_is_read(checkpoints, tmp_path) -> None:
    for family in ("deepseek_v3", "qwen3_moe"):
        stored, plain = tmp_path / family / "fp8", tmp_path / family / "plain"
        save_fp8(checkpoints.folder(family), stored, plain, (12, 20))
        check_is(stored, plain)


@pytest.mark.smoke(3)
@pytest.mark.parametrize("scheme", COMPRESSED.values(), ids=COMPRESSED)
def test_compressed_tensors_are_read(checkpoints, tmp_path, scheme) -> None:
    stored, plain = tmp_path / "stored", tmp_path / "plain"
    save_compressed(checkpoints.folder("glm4_moe"), stored, plain, scheme)
    check_is(stored, plain)


def test_mxfp4_is_read(checkpoints, tmp_path) -> None:
    stored, plain = tmp_path / "stored", tmp_path / "plain"
    save_mxfp4(checkpoints.folder("gpt_oss"), stored, plain)
    check_is(stored, plain)


def test_many_files(checkpoints, tmp_path) -> None:
    make_model("deepseek_v2").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    check_is(tmp_path, checkpoints.folder("deepseek_v2"))


def test_no_prompts_and_one_token(checkpoints) -> None:
    reference = CheckpointReference(checkpoints.folder("mixtral"))
    assert float32_of(reference, []) == []
    (one,) = float32_of(reference, [[5]])
    assert one.logprobs.shape == (0,)
    assert one.topk_ids.shape == (4, 1, 2)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "has 0 tokens"),
        ([1] * 257, "takes 1 to 256"),
        ([VOCAB_SIZE], "0 to 96"),
        ([-1], "0 to"),
    ],
)
def test_prompts_that_are_refused(checkpoints, prompt, said: str) -> None:
    reference = CheckpointReference(checkpoints.folder("mixtral"))
    with pytest.raises(UserError, match=said):
        float32_of(reference, [[1, 2], prompt])


def _copy(source: Path, folder: Path, tensors=None, config=None) -> Path:
    shutil.copytree(source, folder)
    changed = load_file(folder / "model.safetensors") | (tensors or {})
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    return folder


EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        ({"model.layers.1.self_attn.k_proj.weight": None}, {}, "k_proj.weight is missing"),
        ({"lm_head.weight": None}, {}, "lm_head.weight is missing"),
        ({"model.layers.1.self_attn.k_proj.weight": torch.ones(3, 3)}, {}, "asks for"),
        ({EXPERT: None}, {}, "7 tensors"),
        ({EXPERT: torch.ones(40, 64)}, {}, "too large"),
        ({EXPERT: torch.ones(32, 64, dtype=torch.int8)}, {}, "is I8"),
        ({}, {"num_experts": 9}, "asks for 9"),
        ({}, {"model_type": "of_their_own", "auto_map": {"AutoConfig": "x.Y"}}, "config.json"),
        ({}, {"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_checkpoints_that_are_refused(checkpoints, tmp_path, tensors, config, said: str) -> None:
    folder = _copy(checkpoints.folder("olmoe"), tmp_path / "copy", tensors, config)
    with pytest.raises(UserError, match=said) as raised:
        float32_of(CheckpointReference(folder), drawn())
    assert "\n" not in str(raised.value)


def test_pickled_weights_are_refused(checkpoints, tmp_path) -> None:
    folder = _copy(checkpoints.folder("olmoe"), tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        CheckpointReference(folder)


def test_code_of_a_checkpoint_is_not_run(checkpoints, tmp_path) -> None:
    """Not even where its configuration asks for it, of a family that transformers knows."""
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    folder = _copy(checkpoints.folder("olmoe"), tmp_path / "copy", config={"auto_map": code})
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    check_is(folder, checkpoints.folder("olmoe"))
    assert not ran.exists()


def test_layers_that_hand_on_more_are_refused(tmp_path) -> None:
    """Of GLM-5's sparse attention, some layers use what the indexer of another has chosen."""
    config = transformers.GlmMoeDsaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
    )
    transformers.GlmMoeDsaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="hand on more"):
        float32_of(CheckpointReference(tmp_path), [[1, 2, 3]])


def added_memory(folder: Path, *sizes: int) -> dict[str, int]:
    script = Path(__file__).with_name("sparse.py")
    command = [sys.executable, str(script), str(folder), *map(str, sizes)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=True)
    return json.loads(ran.stdout)


@pytest.mark.full  # a process of its own, seconds
def test_one_layer_is_in_memory(tmp_path) -> None:
    found = added_memory(tmp_path, 512, 512, 32, 5)
    assert found["layer"] < found["added"] < 2 * found["layer"]
