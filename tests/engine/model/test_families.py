"""The checkpoints that parity is tested with: do they test anything?"""

import re
from collections import defaultdict

import pytest
import torch

from engine.model.families import FAMILIES, VOCAB_SIZE, make_model


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


def test_windows_are_shorter_than_the_prompts():
    token_ids = _token_ids(40)
    for family in ("mixtral", "qwen2_moe", "gpt_oss"):
        windowed, wider = make_model(family), make_model(family, sliding_window=200)
        change = _logits(windowed, token_ids) - _logits(wider, token_ids)
        assert change[:8].abs().max() < 1e-5
        assert change[-1].abs().max() > 0.05
