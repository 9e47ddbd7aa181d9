"""transformers' classes of published configurations on the meta device."""

import copy
import re
from collections import Counter
from typing import Any

import torch
import transformers

from expertlane.spec.hf_config import FAMILIES, family_of, language_model_of


def their_config(config: dict[str, Any]) -> transformers.PretrainedConfig:
    """The configuration of the language model's class of transformers."""
    family = family_of(config)
    text = copy.deepcopy(language_model_of(config))
    for key in ("model_type", "architectures", "auto_map", "quantization_config"):
        text.pop(key, None)
    if text.get("rope_scaling") is None:
        text.pop("rope_scaling", None)
    of_text = {"qwen3_5_moe", "qwen3_vl_moe", "llama4", "minimax_m3_vl"}
    name = f"{family}_text" if family in of_text else FAMILIES[family].like or family
    return transformers.AutoConfig.for_model(name, **text)


def reference(config: dict[str, Any]) -> torch.nn.Module:
    """The language model's class of transformers, on the meta device."""
    family, made = family_of(config), their_config(config)
    if family == "step3p5":  # likewise
        vision = {"width": 16, "layers": 1, "heads": 1}
        whole = transformers.Step3p7Config(text_config=copy.deepcopy(config), vision_config=vision)
        with torch.device("meta"):
            model = transformers.Step3p7ForConditionalGeneration(whole)
        del model.model.vision_model, model.model.multi_modal_projector
        return model
    if family == "qwen3_vl_moe":  # has no class of its own for the language model with its head
        whole = transformers.Qwen3VLMoeConfig(text_config=made.to_dict())
        with torch.device("meta"):
            model = transformers.Qwen3VLMoeForConditionalGeneration(whole)
        del model.model.visual
        return model
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(made)


def num_by_layer(model: torch.nn.Module, *, is_tied: bool) -> Counter[int | None]:
    """Values of all stored tensors, by layer; None outside layers. A tied head is none."""
    found: Counter[int | None] = Counter()
    for name, tensor in model.state_dict().items():
        if is_tied and name == "lm_head.weight":
            continue
        num, layer = tensor.numel(), re.search(r"\blayers\.(\d+)\.", name)
        if model.config.model_type == "longcat_flash" and name.endswith("experts.gate_up_proj"):
            # Rows of experts that compute nothing, which no checkpoint has.
            num = num // tensor.shape[0] * model.config.n_routed_experts
        found[int(layer[1]) if layer else None] += num
    return found
