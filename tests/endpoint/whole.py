"""What transformers' whole model says of a prompt."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers


def whole_logprobs(folder: Path, prompt: list[int], dtype: torch.dtype = torch.float32) -> Any:
    """[len - 1], of an ordinary forward of the whole model.

    Attention is that which transformers takes by itself; the sums of experts are the plain ones.
    """
    with torch.inference_mode():
        logits = _model(folder, dtype)(torch.tensor([prompt]), use_cache=False).logits[0, :-1]
    logprobs = logits.float().log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0].double().numpy()


def whole_router_logits(folder: Path, prompt: list[int]) -> tuple[torch.Tensor, ...]:
    """Of each layer with experts, [len, num_experts]; of families whose model gives them out."""
    with torch.inference_mode():
        out = _model(folder, torch.float32)(
            torch.tensor([prompt]), use_cache=False, output_router_logits=True
        )
    return tuple(out.router_logits)


@cache
def _model(folder: Path, dtype: torch.dtype) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = transformers.AutoModelForCausalLM
    if "text_config" in config.to_dict():
        kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
