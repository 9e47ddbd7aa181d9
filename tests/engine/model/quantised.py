"""Quantised copies of tiny checkpoints, with the plain checkpoint that each stands for.

The plain one holds the numbers that the quantised one means, worked out here in the plainest way,
so that transformers can run them.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP8_MAX = 448.0


def save_fp8(source: Path, quantised: Path, plain: Path, block_size: tuple[int, int]) -> None:
    """Block-scaled FP8, as DeepSeek-V3 has it: the matrices of the layers but not the routers."""
    stored, meant = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".layers." in name and name.endswith("_proj.weight") and tensor.dim() == 2:
            weight, scales = _to_fp8(tensor, block_size)
            stored[name], stored[f"{name}_scale_inv"] = weight, scales
            meant[name] = fp8_meaning(weight, scales, block_size)
        else:
            stored[name] = meant[name] = tensor
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block_size)}
    _save(source, quantised, stored, {"quantization_config": method})
    _save(source, plain, meant, {})


def _to_fp8(weight: Tensor, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rows, columns = (range(0, n, b) for n, b in zip(weight.shape, block_size, strict=True))
    scales = torch.empty(len(rows), len(columns))
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            block = (slice(row, row + block_size[0]), slice(column, column + block_size[1]))
            scales[i, j] = weight[block].abs().max() / _FP8_MAX
            out[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return out, scales


def fp8_meaning(weight: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Every value times the scale of its block, float32."""
    of_value = scales.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
    return weight.float() * of_value[: weight.shape[0], : weight.shape[1]]


# Format, strategy, what its arguments add, rows and columns that share a scale.
Scheme = tuple[str, str, dict[str, Any], tuple[int | None, int | None]]
COMPRESSED: dict[str, Scheme] = {
    "int8 by channel": ("int-quantized", "channel", {}, (1, None)),
    "int8 by group": ("int-quantized", "group", {"group_size": 12}, (1, 12)),
    "packed by channel": ("pack-quantized", "channel", {"actorder": None}, (1, None)),
    "packed by group": ("pack-quantized", "group", {"group_size": 5}, (1, 5)),
    "float8 by tensor": ("float-quantized", "tensor", {}, (None, None)),
    "float8 by channel": ("float-quantized", "channel", {}, (1, None)),
    "float8 by block": ("float-quantized", "block", {"block_structure": [16, 12]}, (16, 12)),
}


def save_compressed(source: Path, quantised: Path, plain: Path, scheme: Scheme) -> None:
    """As compressed-tensors has it: all matrices of the layers but routers."""
    fmt, strategy, more, block = scheme
    stored, meant = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".layers." not in name or not name.endswith("_proj.weight") or tensor.dim() != 2:
            stored[name] = meant[name] = tensor
            continue
        rows, columns = tensor.shape
        size = (block[0] or rows, block[1] or columns)
        if fmt == "float-quantized":
            values, scales = _to_fp8(tensor, size)
        else:
            values, scales = _to_int8(tensor, size)
        scales = scales.bfloat16()
        meant[name] = fp8_meaning(values, scales.float(), size)
        stored[f"{name}_scale"] = scales.flatten() if strategy == "tensor" else scales
        if fmt == "pack-quantized":
            stored[f"{name}_packed"] = _to_int32(values)
            stored[f"{name}_shape"] = torch.tensor([rows, columns])
        else:
            stored[name] = values
    weights = {
        **{"num_bits": 8, "type": "float" if fmt.startswith("float") else "int"},
        **{"symmetric": True, "strategy": strategy, "group_size": None, "dynamic": False},
    }
    group = {"targets": ["Linear"], "weights": weights | more, "input_activations": None}
    method = {"quant_method": "compressed-tensors", "format": fmt, "ignore": ["lm_head"]}
    method["config_groups"] = {"group_0": group}
    _save(source, quantised, stored, {"quantization_config": method})
    _save(source, plain, meant, {})


def _to_int8(weight: Tensor, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """With -128 where a magnitude is half a step above what 127 stands for."""
    blocks = [weight[:, at : at + block_size[1]] for at in range(0, weight.shape[1], block_size[1])]
    scales = torch.stack([2 * block.abs().amax(1) / 255 for block in blocks], dim=1)
    of_value = scales.repeat_interleave(block_size[1], 1)[:, : weight.shape[1]]
    return (weight / of_value).round().clamp(-128, 127).to(torch.int8), scales


def _to_int32(values: Tensor) -> Tensor:
    """Four values plus 128 as one int32, the first in its lowest bits; zeros at the end of rows."""
    rows, columns = values.shape
    unsigned = torch.zeros(rows, -(-columns // 4) * 4, dtype=torch.int64)
    unsigned[:, :columns] = values.long() + 128
    factors = torch.tensor([1, 1 << 8, 1 << 16, 1 << 24])
    return (unsigned.unflatten(1, (-1, 4)) * factors).sum(-1).to(torch.int32)


def save_mxfp4(source: Path, quantised: Path, plain: Path) -> None:
    """GPT-OSS's form: experts as blocks of 32 values along the input features."""
    stored, meant = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):  # [num_experts, in, out]
            blocks, scales = _to_mxfp4(tensor.transpose(1, 2))
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
            meaning = mxfp4_meaning(blocks.flatten(0, 1), scales.flatten(0, 1))
            meant[name] = (
                meaning.view(len(blocks), -1, tensor.shape[1]).transpose(1, 2).contiguous()
            )
        else:
            stored[name] = meant[name] = tensor
    _save(source, quantised, stored, {"quantization_config": {"quant_method": "mxfp4"}})
    _save(source, plain, meant, {})


def _to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[num_experts, out, in / 32, 16] and [num_experts, out, in / 32], uint8."""
    groups = weight.unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2  # 6 is the largest: 4 · 1.5
    scaled = groups / exponents.exp2()[..., None]
    nearest = (scaled.abs()[..., None] - torch.tensor(FP4_VALUES)).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def mxfp4_meaning(blocks: Tensor, scales: Tensor) -> Tensor:
    """[num_rows, num_blocks, 16] and [num_rows, num_blocks] as [num_rows, 32 · num_blocks]."""
    rows = []
    for block_row, scale_row in zip(blocks.tolist(), scales.tolist(), strict=True):
        row: list[float] = []
        for block, scale in zip(block_row, scale_row, strict=True):
            for byte in block:
                for code in (byte % 16, byte // 16):
                    sign = -1.0 if code >= 8 else 1.0
                    row.append(math.ldexp(sign * FP4_VALUES[code % 8], scale - 127))
        rows.append(row)
    return torch.tensor(rows)


def _save(source: Path, folder: Path, tensors: dict[str, Tensor], extra: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | extra))
