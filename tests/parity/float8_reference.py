"""transformers with float8 matrices as if their inputs were in float8: what a run is judged by."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.families import load_model
from parity.reference import ReferenceRun, rounded_to_float8

_IN_LATENT = "kv_b_proj"  # attention absorbs it, or expands latents by it: not by products alone


class RoundedInputs(TorchFunctionMode):
    """Rounds inputs of linear layers, each token's every 128, where the weight is stored in float8.

    Args:
        model: of transformers, which has the numbers that the checkpoint's matrices mean.
        stored: the folder of that checkpoint.

    Attributes:
        margin: how near any input has come to being rounded the other way, over the largest of its
            128.
        num_products: with inputs that were rounded.
    """

    def __init__(self, model: Any, stored: Path) -> None:
        super().__init__()
        self.margin, self.num_products = np.inf, 0
        names = {
            name
            for name, tensor in load_file(stored / "model.safetensors").items()
            if tensor.dtype is torch.float8_e4m3fn and _IN_LATENT not in name
        }
        experts = {name.split(".experts.")[0] for name in names if ".experts." in name}
        self._storages = {
            tensor.untyped_storage().data_ptr()
            for name, tensor in model.named_parameters()
            if name in names or name.split(".experts.")[0] in experts
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, *rest = args
            if weight.untyped_storage().data_ptr() in self._storages:
                args = (self._rounded(x), weight, *rest)
        return func(*args, **(kwargs or {}))

    def _rounded(self, x: Tensor) -> Tensor:
        self.num_products += 1
        groups = []
        for group in x.split(128, dim=-1):
            rows, margin = rounded_to_float8(group.numpy())
            self.margin = min(self.margin, margin) if group.numel() else self.margin
            groups.append(torch.from_numpy(rows))
        return torch.cat(groups, dim=-1)


@torch.inference_mode()
def generate(
    plain: Path, prompts: npt.NDArray[np.int64], output_len: int, mode: Any
) -> ReferenceRun:
    """Greedy, all positions anew for each token; every expert is chosen, so no margin counts.

    Args:
        plain: a checkpoint without float8.
        mode: that torch's functions run under.
    """
    model, token_ids, logits = load_model(plain), torch.as_tensor(prompts), []
    for _ in range(output_len):
        with mode:
            logits.append(model(token_ids, use_cache=False).logits[:, -1])
        token_ids = torch.cat([token_ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    tokens = token_ids[:, prompts.shape[1] :].numpy()
    margins = np.full(tokens.shape, np.inf, dtype=np.float32)
    return ReferenceRun(tokens, torch.stack(logits, dim=1).numpy(), margins)
