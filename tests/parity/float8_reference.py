"""transformers with float8 matrices as if their inputs were in float8, and runs that it judges.

Rounding is no continuous function: an input that differs in its last bit may be rounded the other
way. The reference says how near its inputs come to that, and seeds are such that it is nowhere.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distributed.running import Run, deployment, run_deployment
from engine.model.families import load_model, save_checkpoint
from engine.model.quantised import COMPRESSED, save_compressed, save_fp8
from expertlane.spec.from_hf import read_model
from expertlane.spec.workload import Workload
from parity.reference import ReferenceRun, rounded_to_float8

WORKLOAD = Workload(num_sequences=2, prompt_len=1, output_len=2, seed=7)
MARGIN = 3.5e-7  # of the largest of 128 inputs; float32 moves them by less
COMMON = {
    "num_hidden_layers": 1,
    "hidden_size": 136,
    "num_attention_heads": 4,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 2,
}
# Inputs of one group and a half, of two groups that layouts part, and of less than one.
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "deepseek_v3": (
        7,
        {
            "num_key_value_heads": 4,
            "v_head_dim": 64,
            "first_k_dense_replace": 0,
            "n_routed_experts": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "qwen3_moe": (
        144,
        {
            "head_dim": 64,
            "num_experts": 2,
            "decoder_sparse_step": 1,
        },
    ),
}
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


class Case(NamedTuple):
    """A checkpoint, what transformers makes of its numbers, and that with inputs rounded."""

    folder: Path
    exact: ReferenceRun
    rounded: ReferenceRun


def case_of(family: str, root: Path) -> Case:
    """DeepSeek-V3 has blocks of 128, Qwen3 a scale a row.

    Args:
        root: an empty folder.
    """
    seed, sizes = SIZES[family]
    source = save_checkpoint(family, root / "source", seed, **COMMON | sizes)
    stored, plain = root / "stored", root / "plain"
    if family == "deepseek_v3":
        save_fp8(source, stored, plain, (128, 128))
    else:
        save_compressed(source, stored, plain, COMPRESSED["float8 by channel"])
    prompts = WORKLOAD.prompt_token_ids(read_model(stored, family).vocab_size)
    exact = generate(plain, prompts, WORKLOAD.output_len, nullcontext())
    mode = RoundedInputs(load_model(plain), stored)
    rounded = generate(plain, prompts, WORKLOAD.output_len, mode)
    print(f"{family}: {mode.num_products} products, margin {mode.margin:.1e}")
    assert mode.margin > MARGIN
    return Case(stored, exact, rounded)


def run(
    pools: Any, case: Case, layout: str, forced: npt.NDArray[np.int64], dtype: str = "float32"
) -> Run:
    """A case on ranks, its inputs rounded."""
    made = deployment(layout, activations="float8")
    pool = pools.pool(made.layout.world_size, dtype)
    return run_deployment(
        *(pool, read_model(case.folder, "model"), made, WORKLOAD),
        forced=forced,
        return_logits=True,
        checkpoint=case.folder,
    )
