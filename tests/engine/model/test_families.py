"""The checkpoints that parity is tested with: do they test anything?"""

import re
from collections import defaultdict

import pytest
import torch

from engine.model.families import FAMILIES, VOCAB_SIZE, load_model, make_model, run_greedy
from expertlane.spec.from_hf import from_hf


def _token_ids(num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


def _logits(model, token_ids):
    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0]


@pytest.mark.smoke(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_tensor_matters(family):
    model, token_ids = make_model(family), _token_ids(72)
    logits = _logits(model, token_ids)
    assert 0.8 < logits.std() < 1.2
    kinds = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith("model.visual."):  # which texts do not see
            kinds[re.sub(r"\.\d+\.", ".N.", name)].append(tensor.data)
    for kind, tensors in kinds.items():
        for tensor in tensors:
            tensor.copy_(tensor.flip(-1))
        change = (_logits(model, token_ids) - logits).abs().max() / logits.abs().max()
        assert change > 0.05, kind
        for tensor in tensors:
            tensor.copy_(tensor.flip(-1))
    assert torch.equal(_logits(model, token_ids), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_worked_out_from_the_config_are_transformers_own(family):
    theirs = make_model(family)
    model = from_hf(theirs.config.to_dict())
    scaling = model.rope_scaling
    factor = 1.0 if scaling is None else scaling.attention_factor
    text = getattr(theirs.model, "language_model", theirs.model)
    assert text.rotary_emb.attention_scaling == pytest.approx(factor, rel=1e-12)
    assert 2 * len(text.rotary_emb.inv_freq) == model.rotary_dim
    attention = text.layers[1].self_attn
    assert attention.scaling == pytest.approx(model.softmax_scale, rel=1e-12)
    if model.latent is not None:
        assert attention.kv_a_layernorm.variance_epsilon == model.latent.norm_eps


@pytest.mark.smoke(8)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_runs(checkpoints, family):
    prompt = _token_ids(30)
    run = run_greedy(checkpoints.folder(family), prompt, 6)
    assert run.logits.shape == (6, VOCAB_SIZE)
    assert run.token_ids == run.logits.argmax(-1).tolist()
    # What was saved is what was made; and all steps in one go give the same logits.
    whole = _logits(make_model(family), prompt + run.token_ids[:-1])[-6:]
    torch.testing.assert_close(run.logits, whole, rtol=0, atol=2e-5)


def test_the_end_of_a_sequence_ends_nothing(checkpoints):
    folder = checkpoints.folder("mixtral")
    first = run_greedy(folder, [3, 4], 1).token_ids[0]
    model = load_model(folder)
    eos = model.config.eos_token_id
    model.config.eos_token_id = first
    assert len(run_greedy(folder, [3, 4], 5).token_ids) == 5
    model.config.eos_token_id = eos


def test_windows_are_shorter_than_the_prompts():
    token_ids = _token_ids(40)
    for family in ("mixtral", "qwen2_moe", "gpt_oss"):
        windowed, wider = make_model(family), make_model(family, sliding_window=200)
        change = _logits(windowed, token_ids) - _logits(wider, token_ids)
        assert change[:8].abs().max() < 1e-5
        assert change[-1].abs().max() > 0.05
