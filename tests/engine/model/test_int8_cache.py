"""int8 weights kept in a checkpoint's folder: the numbers that rounding gives, or nothing."""

import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cli.screen import telling
from engine.model.families import FAMILIES, save_checkpoint
from engine.model.quantised import save_fp8
from expertlane.engine.model import checkpoint as module
from expertlane.engine.model.checkpoint import FILE, Checkpoint, Int8Cache, write_int8_cache
from expertlane.engine.model.weights import CheckpointWeights
from expertlane.errors import UserError
from expertlane.spec.deployment import INT8_FOLDER
from expertlane.spec.tensors import HEAD, cut_dim, is_matrix, tensor_names, tensor_shape

CPU = torch.device("cpu")


def touch() -> None:
    pass


def weights_of(checkpoint, dtype, cache):
    given = checkpoint.model, dtype, CPU, touch, "int8"
    source = CheckpointWeights(*given, checkpoint=checkpoint, cache=cache)
    source._keeps_narrow = True  # whatever computes here
    return source


def matrices(checkpoint):
    names = dict.fromkeys((*tensor_names(checkpoint.model), HEAD))
    return [name for name in names if is_matrix(name)]


@pytest.fixture
def copied(checkpoints, tmp_path):
    """A family's checkpoint, in a folder of the test's own."""

    def copy(family):
        return Checkpoint(shutil.copytree(checkpoints.folder(family), tmp_path / family))

    return copy


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint with inputs of one group and of several, with its file."""
    folder = save_checkpoint("mixtral", tmp_path_factory.mktemp("written"), intermediate_size=300)
    checkpoint = Checkpoint(folder)
    write_int8_cache(checkpoint, touch)
    return checkpoint


def assert_same(found, expected):
    for each in ("values", "scales"):
        assert torch.equal(getattr(found, each), getattr(expected, each))
    assert found.values.dtype is torch.int8
    for each in ("group", "first", "dtype"):
        assert getattr(found, each) == getattr(expected, each)


@pytest.mark.smoke(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_rounding_gives(copied, monkeypatch, family):
    monkeypatch.setattr(module, "_VALUES_AT_A_TIME", 700)  # several pieces a matrix
    checkpoint = copied(family)
    assert Int8Cache.find(checkpoint) is None
    num_touched = []
    write_int8_cache(checkpoint, lambda: num_touched.append(1))
    assert len(num_touched) > len(matrices(checkpoint))
    cached, rounding = (
        weights_of(checkpoint, torch.bfloat16, cache) for cache in (Int8Cache(checkpoint), None)
    )
    for name in matrices(checkpoint):
        size = tensor_shape(checkpoint.model, name)[cut_dim(name)]
        for part in (None, range(size // 2), range(size // 3, size), range(3, 3)):
            assert_same(cached.matrix(name, part), rounding.matrix(name, part))
    assert cached.num_bytes == rounding.num_bytes


@settings(derandomize=True, deadline=None, max_examples=50)
@given(data=st.data())
def test_any_slice(written, data):
    cache = Int8Cache(written)
    name = data.draw(
        st.sampled_from(["layers.0.query", "layers.1.experts.3.up", "layers.0.experts.0.down"])
    )
    shape = tensor_shape(written.model, name)
    rows, columns = (
        range(*sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in shape
    )
    whole = cache.part(name, None, None, torch.float32).widened()
    part = cache.part(name, rows, columns, torch.float32)
    expected = whole[rows.start : rows.stop, columns.start : columns.stop]
    assert torch.equal(part.widened(), expected)


def test_others_can_read_the_file(written):
    stored = load_file(written.folder / INT8_FOLDER / FILE)
    name = "layers.0.experts.0.down"
    rounded = Int8Cache(written).part(name, None, None, torch.float32)
    assert torch.equal(stored[name], rounded.values)
    assert torch.equal(stored[f"{name}.scales"], rounded.scales)


def test_what_is_stored_in_one_byte_is_not_kept_again(checkpoints, tmp_path):
    source = checkpoints.folder("deepseek_v3")
    save_fp8(source, tmp_path / "fp8", tmp_path / "plain", (16, 12))
    checkpoint = Checkpoint(tmp_path / "fp8")
    write_int8_cache(checkpoint, touch)
    stored = load_file(checkpoint.folder / INT8_FOLDER / FILE)
    assert not any(checkpoint.is_narrow(name) for name in stored if not name.endswith(".scales"))
    assert HEAD in stored
    source = weights_of(checkpoint, torch.float32, Int8Cache(checkpoint))
    kinds = {name: source.matrix(name).values.dtype for name in matrices(checkpoint)}
    assert {*kinds.values()} == {torch.int8, torch.float8_e4m3fn}


def rewritten(file, *change):
    """Changes the bytes of the kept file, or of another one of the checkpoint."""

    def rewrite(folder):
        path = folder / file
        path.write_bytes(path.read_bytes().replace(*change))

    return rewrite


KEPT = f"{INT8_FOLDER}/{FILE}"


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: os.utime(folder / "model.safetensors", ns=(1, 1)),
        rewritten("config.json", b"{", b"{ ", 1),
        lambda folder: os.truncate(folder / KEPT, (folder / KEPT).stat().st_size - 1),
        lambda folder: (folder / KEPT).write_bytes(b"nothing of that kind"),
        rewritten(KEPT, b"layers.0.query", b"layers.9.query"),  # another model's
        rewritten(KEPT, b'"I8"', b'"U8"', 1),
    ],
)
def test_a_file_of_something_else_counts_as_missing(copied, change):
    checkpoint = copied("mixtral")
    write_int8_cache(checkpoint, touch)
    assert Int8Cache.find(checkpoint) is not None
    change(checkpoint.folder)
    assert Int8Cache.find(checkpoint) is None
    write_int8_cache(checkpoint, touch)
    assert Int8Cache.find(checkpoint) is not None


def test_nothing_is_left_where_it_cannot_be_written_whole(copied, monkeypatch):
    checkpoint = copied("mixtral")

    def fail(checkpoint, name, shape):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_rounded", fail)
    with pytest.raises(UserError, match=telling("No space left")):
        write_int8_cache(checkpoint, touch)
    assert not list((checkpoint.folder / INT8_FOLDER).iterdir())
