"""What number types make of weights and inputs."""

import numpy as np
import pytest
import torch

from endpoint.test_reference import drawn, scored
from expertlane.endpoint.reference import CheckpointReference
from expertlane.endpoint.rounding import (
    NUMBER_TYPES,
    RoundedInputs,
    rows_to_float8,
    to_float8,
    to_int8,
    to_nvfp4,
)
from expertlane.errors import UserError
from expertlane.progress import Progress
from parity.reference import rounded_to_int8
from parity.test_narrow_families import _save_rounded as save_rounded

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
def test_int8_is_that_of_our_server(columns: int) -> None:
    weight = matrix(5, columns)
    weight[2] = 0
    np.testing.assert_array_equal(to_int8(weight).numpy(), rounded_to_int8(weight.numpy()))


@pytest.mark.parametrize("rounded", [to_int8, to_float8, rows_to_float8, to_nvfp4])
@pytest.mark.parametrize("columns", [1, 16, 40, 130])
def test_rounding_is_near_and_settled(rounded, columns: int) -> None:
    weight = matrix(6, columns)
    weight[3] = 0
    out = rounded(weight)
    assert out.shape == weight.shape
    assert (out[3] == 0).all()
    bound = 0.25 if rounded is to_nvfp4 else 0.07
    assert (out - weight).abs().max() <= bound * weight.abs().max()
    assert columns == 1 or not torch.equal(out, weight)
    torch.testing.assert_close(rounded(out), out, rtol=1e-5, atol=1e-6)


def test_nvfp4_has_eight_magnitudes_a_group() -> None:
    out = to_nvfp4(matrix(1, 16))
    ratios = (out / out.abs().max() * 6).abs()
    assert all(min(abs(float(ratio) - level) for level in E2M1) < 1e-5 for ratio in ratios[0])


def test_inputs_of_chosen_matrices_are_rounded() -> None:
    stack, other, x = matrix(4, 8).view(2, 2, 8), matrix(2, 8), matrix(3, 8)
    with RoundedInputs(lambda x: x * 0, [stack]):
        assert (torch.nn.functional.linear(x, stack[torch.tensor(1)]) == 0).all()
        assert (torch.nn.functional.linear(x, other) != 0).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "granitemoe"])
def test_int8_of_a_checkpoint(checkpoints, tmp_path, family: str) -> None:
    """Which matrices are rounded: those that are rounded in a copy stored in full."""
    folder, plain = checkpoints.folder(family), tmp_path / "plain"
    save_rounded(folder, plain)
    prompts = drawn()
    for one, other in zip(scored(folder, prompts, "int8"), scored(plain, prompts), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.smoke(2)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm4_moe", "deepseek_v2"])
def test_one_pass_is_as_good_as_several(checkpoints, family: str) -> None:
    reference, prompts = CheckpointReference(checkpoints.folder(family)), drawn()
    together = reference.score_in(prompts, tuple(NUMBER_TYPES), Progress())
    assert list(together) == list(NUMBER_TYPES)
    plain = np.concatenate([one.logprobs for one in together["float32"]])
    moved = {}
    for name, of_type in together.items():
        (apart,) = reference.score_in(prompts, (name,), Progress()).values()
        for one, other in zip(of_type, apart, strict=True):
            np.testing.assert_array_equal(one.logprobs, other.logprobs)
        moved[name] = np.abs(np.concatenate([one.logprobs for one in of_type]) - plain).mean()
    assert moved.pop("float32") == 0
    assert moved["float16"] < moved["bfloat16"]
    assert 0 < moved["int8"] < moved["float8"] < moved["nvfp4"]


def test_a_number_type_that_is_not_known(checkpoints) -> None:
    reference = CheckpointReference(checkpoints.folder("mixtral"))
    with pytest.raises(UserError, match="'int3' is not known; known: float32, bfloat16"):
        reference.score_in([[1, 2]], ("float32", "int3"), Progress())
