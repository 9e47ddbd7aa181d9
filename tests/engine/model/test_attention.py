"""Attention over the cache against softmax written out, sequence by sequence."""

import math

import pytest
import torch

from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.collectives import interleave
from expertlane.engine.comm.mesh import Meshes, ParallelMesh
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.model.attention import Attention, RotaryEmbedding, _rotated_last
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.ops.kv_cache import KVCache
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from schedule.handmade import BLOCK_SIZE, paged_batch

CPU = torch.device("cpu")
MODEL = PRESETS["paper-tiny"].with_overrides(
    hidden_size=6, num_attention_heads=2, head_dim=4, max_position_embeddings=16
)
NUM_SLOTS, MAX_LEN = 4, 8


class Given:
    """A weight source of two matrices: queries, keys and values together, and the output."""

    dtype, device, num_bytes = torch.float32, CPU, 0

    def __init__(self, query_key_value, output):
        parts = query_key_value.chunk(3)
        names = ("query", "key", "value")
        self._tensors = dict(zip(names, parts, strict=True)) | {"output": output}

    def take(self, name, part=None, dtype=None):
        return self._tensors[name.rsplit(".", 1)[-1]]

    matrix = take

    def once(self, layer, key, make, *, holds=True):
        return make()


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 6, generator=generator), torch.randn(6, 8, generator=generator)


@pytest.fixture
def attend(weights):
    """Feed parts (slot, num_computed, x [num_scheduled, 6]) as one batch; the outputs by part."""
    rotary = RotaryEmbedding(MODEL, CPU)
    recorder = Recorder(0, 1, 1, ProgressBoard(1).reporter(0), HostClock(), world_size=1)
    mesh = ParallelMesh(Layout(), Meshes(), 0, 1, recorder)
    attention = Attention(MODEL, 0, Given(*weights), mesh, rotary)
    num_blocks = NUM_SLOTS * MAX_LEN // BLOCK_SIZE
    cache = KVCache(num_blocks, BLOCK_SIZE, *attention.cache_dims, torch.float32, CPU)
    cache.keys.fill_(1e3)  # nothing that was not written may matter
    cache.values.fill_(1e3)

    def run(*parts):
        lengths = [len(x) for _, _, x in parts]
        batch = paged_batch(
            [(seq, slot, num, len(x)) for seq, (slot, num, x) in enumerate(parts)],
            num_slots=NUM_SLOTS,
            max_len=MAX_LEN,
        )
        layout = Layout()
        forward_batch = ForwardBatch(
            batch, [batch.num_tokens], layout, layout.coordinates(0), CPU, BLOCK_SIZE
        )
        x = torch.cat([torch.empty(0, 6), *(x for _, _, x in parts)])
        return interleave([attention.forward(x, forward_batch, cache)])[0].split(lengths)

    return run


def rotate(vector, position):
    turned = vector.clone()
    for i in range(2):
        angle = position * MODEL.rope_theta ** (-2 * i / 4)
        turned[i] = vector[i] * math.cos(angle) - vector[i + 2] * math.sin(angle)
        turned[i + 2] = vector[i + 2] * math.cos(angle) + vector[i] * math.sin(angle)
    return turned


def expected(weights, x):
    """Causal attention of one whole sequence x [len, 6], position by position."""
    query_key_value, output = weights
    projected = (x @ query_key_value.T).view(len(x), 3, 2, 4)
    rows = []
    for position in range(len(x)):
        heads = []
        for head in range(2):
            query = rotate(projected[position, 0, head], position)
            keys = [rotate(projected[p, 1, head], p) for p in range(position + 1)]
            weight = torch.stack([query @ key / 2 for key in keys]).softmax(0)
            heads.append(weight @ projected[: position + 1, 2, head])
        rows.append(output @ torch.cat(heads))
    return torch.stack(rows)


def sequence(seed, length):
    return torch.randn(length, 6, generator=torch.Generator().manual_seed(seed))


def test_a_prompt_at_once(attend, weights):
    x = sequence(1, 5)
    (out,) = attend((0, 0, x))
    torch.testing.assert_close(out, expected(weights, x))


def test_one_token(attend, weights):
    x = sequence(1, 1)
    (out,) = attend((3, 0, x))
    torch.testing.assert_close(out, expected(weights, x))


@pytest.mark.parametrize("cuts", [[1, 7], [4, 4], [7, 1], [3, 2, 3], [1] * 8])
def test_a_prompt_in_chunks(attend, weights, cuts):
    x = sequence(2, 8)
    start, parts = 0, []
    for length in cuts:
        parts += attend((1, start, x[start : start + length]))
        start += length
    torch.testing.assert_close(torch.cat(parts), expected(weights, x))


def test_a_batch_of_prefills_a_chunk_and_a_decode_step(attend, weights):
    a, b, c, d = (sequence(seed, 6) for seed in range(4))
    attend((0, 0, a[:3]), (2, 0, b[:5]))
    of_c, of_a, of_b, of_d = attend((1, 0, c), (0, 3, a[3:]), (2, 5, b[5:]), (3, 0, d))
    torch.testing.assert_close(of_c, expected(weights, c))
    torch.testing.assert_close(of_d, expected(weights, d))
    torch.testing.assert_close(of_a, expected(weights, a)[3:])
    torch.testing.assert_close(of_b, expected(weights, b)[5:])


def test_a_slot_is_used_again(attend, weights):
    attend((0, 0, sequence(1, 8)))
    x = sequence(2, 3)
    (out,) = attend((0, 0, x))
    torch.testing.assert_close(out, expected(weights, x))


def test_no_token(attend):
    assert attend() == ()


def test_what_is_rotated_comes_last():
    """Two heads of six values, of which the first two are rotated."""
    order = [2, 3, 4, 5, 0, 1, 8, 9, 10, 11, 6, 7]
    assert _rotated_last(torch.arange(12), 6, 2).tolist() == order
    rows = torch.arange(12)[:, None].expand(12, 3)
    assert _rotated_last(rows.contiguous(), 6, 2)[:, 1].tolist() == order
    assert _rotated_last(torch.empty(0, 3), 6, 2).shape == (0, 3)
    assert _rotated_last(rows, 6, 6) is rows
