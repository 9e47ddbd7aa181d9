import pytest
import torch

from engine.model.quantised import fp8_meaning, mxfp4_meaning
from expertlane.engine.model.checkpoint import with_block_scales
from expertlane.engine.ops.mxfp4 import Mxfp4Weight


def _random_fp8(rows, columns):
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(rows, columns, generator=generator) * 20).to(torch.float8_e4m3fn)


def test_fp8_by_hand():
    weight = torch.tensor([[1.0, -2.0, 0.5], [4.0, 0.0, 448.0], [3.0, 1.5, -1.0]])
    scales = torch.tensor([[2.0, 10.0], [0.5, 100.0]])
    stored = weight.to(torch.float8_e4m3fn)
    values = with_block_scales(stored, scales, (2, 2), (0, 0), torch.float32).widened()
    expected = [[2.0, -4.0, 5.0], [8.0, 0.0, 4480.0], [1.5, 0.75, -100.0]]
    assert values.tolist() == expected


@pytest.mark.parametrize("block_size", [(128, 128), (16, 48), (1, 1), (300, 300)])
def test_fp8_whole_matrices(block_size):
    weight = _random_fp8(200, 150)
    num_blocks = [-(-n // b) for n, b in zip(weight.shape, block_size, strict=True)]
    scales = torch.rand(num_blocks, generator=torch.Generator().manual_seed(1))
    values = with_block_scales(weight, scales, block_size, (0, 0), torch.float32).widened()
    assert torch.equal(values, fp8_meaning(weight, scales, block_size))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (range(0, 200), range(0, 150)),
        (range(127, 129), range(31, 33)),
        (range(128, 200), range(64, 96)),
        (range(130, 140), range(140, 150)),
        (range(199, 200), range(0, 1)),
    ],
)
def test_fp8_slices_are_slices_of_the_whole(rows, columns):
    weight, block_size = _random_fp8(200, 150), (128, 32)
    scales = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    touched = scales[
        rows.start // 128 : (rows.stop - 1) // 128 + 1,
        columns.start // 32 : (columns.stop - 1) // 32 + 1,
    ]
    part = weight[rows.start : rows.stop, columns.start : columns.stop]
    first = (rows.start, columns.start)
    values = with_block_scales(part, touched, block_size, first, torch.bfloat16).widened()
    whole = fp8_meaning(weight, scales, block_size).bfloat16()
    assert torch.equal(values, whole[rows.start : rows.stop, columns.start : columns.stop])


def dequantize_mxfp4(blocks, scales, dtype):
    return Mxfp4Weight(blocks.flatten(1), scales, dtype).widened()


def test_mxfp4_by_hand():
    blocks = torch.zeros(1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, :8] = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])
    blocks[0, 1, 15] = 0xF0
    scales = torch.tensor([[127, 129]], dtype=torch.uint8)
    values = dequantize_mxfp4(blocks, scales, torch.float32)[0].tolist()
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert values[:16] == positive + [-value for value in positive]
    assert values[16:63] == [0.0] * 47
    assert values[63] == -24.0


@pytest.mark.parametrize("num_rows", [0, 1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_against_one_value_at_a_time(num_rows, dtype):
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(256, (num_rows, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(90, 160, (num_rows, 3), dtype=torch.uint8, generator=generator)
    values = dequantize_mxfp4(blocks, scales, dtype)
    assert values.shape == (num_rows, 96)
    assert torch.equal(values, mxfp4_meaning(blocks, scales).view(num_rows, 96).to(dtype))


def test_mxfp4_in_several_blocks_of_rows(monkeypatch):
    monkeypatch.setattr("expertlane.engine.ops.mxfp4._VALUES_AT_A_TIME", 100)
    blocks = torch.randint(256, (10, 1, 16), dtype=torch.uint8)
    scales = torch.full((10, 1), 127, dtype=torch.uint8)
    assert torch.equal(
        dequantize_mxfp4(blocks, scales, torch.float32), mxfp4_meaning(blocks, scales)
    )
