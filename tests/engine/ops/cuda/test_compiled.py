"""What torch compiles against the same operations called one by one, and writes to the cache.

Without a GPU torch compiles for the CPU.
"""

import pytest
import torch

pytest.importorskip("triton")

from engine.ops.cuda.near import DEVICE, random
from expertlane.engine.ops.cuda import compiled
from expertlane.engine.ops.cuda.compiled import write
from expertlane.engine.ops.kv_cache import KVCache
from expertlane.engine.ops.products import Activation
from expertlane.engine.ops.torch_backend import TorchBackend

OPS = TorchBackend()
BFLOAT16 = torch.bfloat16


def angles(num_tokens: int, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return random(torch.float32, num_tokens, 1, dim), random(
        torch.float32, num_tokens, 1, dim, seed=1
    )


def test_queries_and_keys_are_normed_then_rotated_by_their_positions():
    query_key, norms = random(BFLOAT16, 5, 3, 8), random(torch.float32, 3, 8)
    positions, (cos, sin) = torch.tensor([4, 0, 0, 2, 6], device=DEVICE), angles(7)
    for weight in (norms, None):
        normed = query_key if weight is None else OPS.rms_norm_heads_(query_key, weight, 1e-5)
        expected = OPS.rotate_(normed, cos[positions], sin[positions], interleave=True)
        given = query_key, positions, cos, sin, weight, 1e-5
        torch.testing.assert_close(compiled.norm_and_rotate(*given, interleave=True), expected)


@pytest.mark.parametrize("dims", [(8, 8), (36, 0)], ids=["values", "a latent"])
@pytest.mark.parametrize("is_float8", [False, True])
def test_keys_and_values_are_stored_as_the_cache_stores_them(dims, is_float8):
    ours, theirs = (KVCache(6, 4, 2, *dims, BFLOAT16, DEVICE, is_float8=is_float8) for _ in "ab")
    key, value = random(BFLOAT16, 5, 3, sum(dims))[:, 1:].split([*dims], dim=2)
    slots = torch.tensor([3, 21, 0, 7, 8], device=DEVICE)
    write(ours, slots, key, value)
    read = theirs.write(slots, key, value)
    for mine, other in zip(ours._tensors, theirs._tensors, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(theirs.keys_at(slots), read[0])


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("function", "given", "named"),
    [
        (compiled.rms_norm, lambda x: (x, torch.ones(24), 1e-5), {}),
        (compiled.add_rms_norm, lambda x: (x, x.flip(0), torch.ones(24), 1e-5), {}),
        (compiled.activate, lambda x: (x, Activation("silu", 0.7)), {"is_gated": True}),
        (compiled.activate, lambda x: (x, Activation("gelu")), {"is_gated": False}),
        (compiled.rotate, lambda x: (x.view(-1, 3, 8), *angles(len(x))), {"interleave": False}),
        (
            compiled.norm_and_rotate,
            lambda x: (x.view(-1, 3, 8), torch.arange(len(x)), *angles(9), torch.ones(3, 8), 1e-5),
            {"interleave": True},
        ),
        (compiled.gather_sum, lambda x: (x, torch.tensor([[0, -1], [4, 1]]), torch.rand(2, 2)), {}),
        (compiled.inputs_to_float8, lambda x: (x,), {}),
    ],
)
def test_what_torch_compiles_gives_what_it_gives_one_by_one(function, given, named):
    """To the bit, in bfloat16 too; other numbers of rows compile nothing anew."""
    counters = torch._dynamo.utils.counters["stats"]
    num_compiled = []
    with torch.inference_mode(), torch.device(DEVICE):
        for num_rows in (5, 9, 7):
            x = random(BFLOAT16, num_rows, 24)
            arguments = given(x)
            torch.testing.assert_close(
                function.kernel(*arguments, **named), function._function(*arguments, **named)
            )
            num_compiled.append(counters["unique_graphs"])
    assert num_compiled[0] == num_compiled[-1] > 0
