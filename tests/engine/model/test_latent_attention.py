"""Latent attention against softmax written out over each head's keys and values, in float64."""

import numpy as np
import pytest
import torch

from engine.ops.instruction_sets import ARITHMETIC, backend_or_skip
from expertlane.cost.step.batch_sizes import takes_less_expanded
from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.collectives import interleave
from expertlane.engine.comm.mesh import Meshes, ParallelMesh
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.model import attention as module
from expertlane.engine.model import forward_batch
from expertlane.engine.model.attention import LatentAttention, RotaryEmbedding
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.weights import SeededWeights
from expertlane.engine.ops.kv_cache import KVCache
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.schedule.plan import Batch
from expertlane.spec.layout import Layout
from expertlane.spec.mixers import LatentAttention as Latent
from expertlane.spec.model import PRESETS

CPU, BLOCK_SIZE = torch.device("cpu"), 4
RANK, NOPE, ROPE, VALUE, HEADS = 32, 12, 4, 16, 3
LATENT = Latent(kv_lora_rank=RANK, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE)
MODEL = PRESETS["paper-tiny"].with_overrides(
    hidden_size=48,
    num_attention_heads=HEADS,
    num_key_value_heads=None,
    head_dim=NOPE + ROPE,
    latent=LATENT,
    max_position_embeddings=256,
)
# (computed before, new tokens): a prompt, a chunk that pays for its latents, one that does not.
PROMPT, LONG_CHUNK, SHORT_CHUNK, DECODE = (0, 9), (70, 60), (50, 3), (20, 1)
EXPANDED = {PROMPT: True, LONG_CHUNK: True, SHORT_CHUNK: False, DECODE: False}


@pytest.fixture(params=["torch", *ARITHMETIC])
def backend(request, monkeypatch):
    found = TorchBackend() if request.param == "torch" else backend_or_skip(request.param)
    monkeypatch.setattr(module, "backend_for", lambda device: found)
    return found


def attention_of(dtype):
    recorder = Recorder(0, 1, 1, ProgressBoard(1).reporter(0), HostClock(), world_size=1)
    mesh = ParallelMesh(Layout(), Meshes(), 0, 1, recorder)
    source = SeededWeights(MODEL, dtype, CPU, lambda: None)
    return LatentAttention(MODEL, 0, source, mesh, RotaryEmbedding(MODEL, CPU)), source


def run(attention, sequences, hidden, dtype, *, is_float8=False):
    """The new tokens' outputs; what is before them is computed in a step of its own.

    And what the cache holds of each sequence, [length, RANK + ROPE].
    """
    width = -(-max(sum(each) for each in sequences) // BLOCK_SIZE)
    blocks = np.random.default_rng(0).permutation(len(sequences) * width)
    sizes = len(blocks), BLOCK_SIZE, *attention.cache_dims, dtype, CPU
    cache = KVCache(*sizes, is_float8=is_float8)
    cache.keys.fill_(0x7F if is_float8 else torch.nan)  # nothing that was not written may matter
    computed, out = np.zeros(len(sequences), dtype=np.int64), []
    for step in range(2):
        new = np.array([each[step] for each in sequences])
        chosen = np.flatnonzero(new)
        batch = Batch(
            seq_ids=chosen,
            num_scheduled_tokens=new[chosen],
            num_computed_tokens=computed[chosen],
            token_ids=np.zeros(new.sum(), dtype=np.int64),
            block_tables=blocks.reshape(-1, width)[chosen].astype(np.int32),
            yields_token=np.ones(len(chosen), dtype=np.bool_),
        )
        layout = Layout()
        at = layout.coordinates(0)
        part = ForwardBatch(batch, [batch.num_tokens], layout, at, CPU, BLOCK_SIZE)
        rows = zip(hidden, computed, computed + new, strict=True)
        x = torch.cat([of_seq[start:end] for of_seq, start, end in rows])
        (out,) = interleave([attention.forward(x, part, cache)])
        computed = computed + new
    keys, _ = cache.read(torch.from_numpy(blocks.reshape(-1, width)), width * BLOCK_SIZE)
    held = [rows[0, : sum(each)] for rows, each in zip(keys, sequences, strict=True)]
    return out.split([each[1] for each in sequences]), held


def turned(x, first):
    """The last ROPE values by their positions, as pairs (i, i + ROPE / 2) or neighbours."""
    positions = torch.arange(first, first + x.shape[0], dtype=torch.float64)
    frequencies = MODEL.rope_theta ** -(torch.arange(0, ROPE, 2, dtype=torch.float64) / ROPE)
    angles = positions[:, None] * frequencies
    cos, sin = (f.view(f.shape[0], *[1] * (x.dim() - 2), -1) for f in (angles.cos(), angles.sin()))
    kept, turning = x[..., :-ROPE], x[..., -ROPE:]
    if MODEL.rope_interleave:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = turning.chunk(2, -1)
    return torch.cat([kept, a * cos - b * sin, b * cos + a * sin], dim=-1)


def expected(source, x, computed, held=None):
    """Of one sequence x [length, hidden], from position `computed` on.

    Args:
        held: [length, RANK + ROPE]; latents and rotated parts to be taken for those of x.
    """
    weights = {
        name: source.take(f"layers.0.{name}", None, torch.float64)
        for name in ("query", "kv_a", "kv_a_norm", "kv_b", "output")
    }
    x = x.double()
    length = len(x)
    query = turned((x @ weights["query"].T).view(length, HEADS, NOPE + ROPE), 0)
    latent, rotated = (x @ weights["kv_a"].T).split([RANK, ROPE], dim=1)
    latent = latent * (latent.square().mean(1, keepdim=True) + LATENT.norm_eps).rsqrt()
    latent = latent * weights["kv_a_norm"]
    rotated = turned(rotated, 0)
    if held is not None:
        error = (held - torch.cat([latent, rotated], dim=1)).abs()
        rounding = 0.07 * held.abs() + 1e-4 + 8 * torch.finfo(held.dtype).eps
        assert (error <= rounding).all()
        latent, rotated = held.double().split([RANK, ROPE], dim=1)
    of_heads = (latent @ weights["kv_b"].T).view(length, HEADS, NOPE + VALUE)
    keys = torch.cat([of_heads[..., :NOPE], rotated[:, None].expand(-1, HEADS, -1)], dim=-1)
    logits = torch.einsum("qhd,khd->hqk", query, keys) * MODEL.softmax_scale
    logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    out = torch.einsum("hqk,khd->qhd", logits.softmax(-1), of_heads[..., NOPE:])
    return (out.flatten(1) @ weights["output"].T)[computed:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sequences",
    [
        [PROMPT],
        [DECODE],
        [PROMPT, PROMPT],
        [LONG_CHUNK, PROMPT],
        [SHORT_CHUNK, PROMPT, DECODE, LONG_CHUNK],
    ],
)
def test_expanded_or_in_the_latent(backend, monkeypatch, dtype, sequences):
    monkeypatch.setattr(forward_batch, "_MOST_POSITIONS", 80)  # several rooms
    attention, source = attention_of(dtype)
    generator = torch.Generator().manual_seed(3)
    hidden = [torch.randn(sum(each), 48, generator=generator).to(dtype) for each in sequences]
    found, _ = run(attention, sequences, hidden, dtype)
    bound = 2e-6 if dtype is torch.float32 else 2e-2
    for of_seq, (computed, _), out in zip(hidden, sequences, found, strict=True):
        exact = expected(source, of_seq, computed)
        assert (out.double() - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float8_cache(backend, monkeypatch, dtype):
    """Expanded or not, tokens see the rounded latents that are in the cache."""
    monkeypatch.setattr(forward_batch, "_MOST_POSITIONS", 80)
    attention, source = attention_of(dtype)
    generator = torch.Generator().manual_seed(3)
    sequences = [SHORT_CHUNK, PROMPT, DECODE, LONG_CHUNK]
    hidden = [torch.randn(sum(each), 48, generator=generator).to(dtype) for each in sequences]
    found, held = run(attention, sequences, hidden, dtype, is_float8=True)
    bound = 2e-6 if dtype is torch.float32 else 2e-2
    for of_seq, (computed, _), out, rows in zip(hidden, sequences, found, held, strict=True):
        exact = expected(source, of_seq, computed, rows)
        assert (out.double() - exact).abs().max() <= bound * exact.abs().max()


def test_prompts_are_expanded_where_that_takes_fewer_flops():
    computed, new = (np.array(column) for column in zip(*EXPANDED, strict=True))
    assert takes_less_expanded(new, computed, LATENT).tolist() == list(EXPANDED.values())


def test_by_hand_where_both_take_the_same():
    """A chunk of n after c: 36 fewer a pair, n · c + n (n + 1) / 2; 896 more a cached position."""
    # 36 (n c + n (n + 1) / 2) > 896 c: n = 24 of c = 300 gives 270,000 and 268,800.
    assert takes_less_expanded(np.array([24, 23]), np.array([300, 300]), LATENT).tolist() == [
        True,
        False,
    ]
