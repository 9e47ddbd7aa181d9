import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from cli.screen import tells
from expertlane.engine.model.stored_tensors import Shards
from expertlane.errors import SpecError

INDEX = "model.safetensors.index.json"


def _error(folder, name=None):
    with pytest.raises(SpecError) as error:
        Shards(folder, "numpy").slice(name or "model.norm.weight")
    assert "\n" not in str(error.value)
    return str(error.value)


def _name_all(folder, file):
    """An index by which all tensors are in one file."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))


NO_MAP = "cannot be read: it must hold an object 'weight_map'"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "JSON 1"),
        ("[]", "JSON object"),
        ("{}", f"{NO_MAP}"),
        ('{"weight_map": [1]}', f"{NO_MAP}"),
        ('{"weight_map": {"a": 1}}', f"{NO_MAP}"),
    ],
)
def test_a_bad_index(rewrite, text, said):
    folder = rewrite("mixtral")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    assert tells(_error(folder), f"model.safetensors.index.json {said}")


def test_a_missing_file_of_several(rewrite):
    folder = rewrite("mixtral")
    (folder / "model.safetensors").rename(folder / "all.safetensors")
    name = "model.embed_tokens.weight"
    index = {"weight_map": {name: "model-1.safetensors", "lm_head.weight": "all.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tells(
        _error(folder, "model.embed_tokens.weight"),
        f"{folder / 'model-1.safetensors'} missing model.safetensors.index.json",
    )
    index["weight_map"][name] = "all.safetensors"
    index["weight_map"]["model.norm.weight"] = "other.safetensors"
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tells(
        _error(folder, "model.norm.weight"),
        f"{folder / 'other.safetensors'} model.norm.weight missing",
    )


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x", "a/../../x", "a\0b", "", ".."])
def test_shards_outside_the_folder_are_refused(tmp_path, file):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"model.norm.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    _name_all(folder, file)
    assert tells(_error(folder), f"{folder / INDEX} {file!r} folder")


def test_links_as_in_the_cache_of_the_hub(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"model.norm.weight": torch.zeros(5)}, blobs / "5f3c")
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/5f3c")
    (blobs / "77aa").write_text('{"weight_map": {"model.norm.weight": "model-1.safetensors"}}')
    (snapshot / INDEX).symlink_to("../../blobs/77aa")
    assert Shards(snapshot, "numpy").slice("model.norm.weight").get_shape() == [5]
    (snapshot / INDEX).unlink()
    (snapshot / "model-1.safetensors").rename(snapshot / "model.safetensors")
    assert Shards(snapshot, "numpy").slice("model.norm.weight").get_shape() == [5]


@pytest.mark.parametrize("name", ["model.safetensors", INDEX])
def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    assert tells(_error(tmp_path), f"{path} regular")
    path.unlink()
    path.symlink_to("/dev/zero")
    assert tells(_error(tmp_path), f"{path} regular")
    path.unlink()
    path.mkdir()
    assert tells(_error(tmp_path), f"{path} folder")


def test_a_shard_that_is_no_regular_file(tmp_path):
    _name_all(tmp_path, "model-1.safetensors")
    os.mkfifo(tmp_path / "model-1.safetensors")
    shard = tmp_path / "model-1.safetensors"
    assert tells(_error(tmp_path), f"{shard} regular")


def test_an_index_without_end(tmp_path):
    with open(tmp_path / INDEX, "wb") as file:
        file.truncate(2**40)  # takes no room
    assert tells(_error(tmp_path), f"{tmp_path / INDEX} 1,099,511,627,776 bytes 268,435,456")


def _file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        b"\xff" * 100,
        struct.pack("<Q", 2**40) + b"{}",
        _file(b"[" * 100_000),
        _file(b"{}")[:-1],
        _file({"model.norm.weight": _TENSOR}),
        _file({"model.norm.weight": _TENSOR}, bytes(7)),
        _file({"model.norm.weight": _TENSOR}, bytes(9)),
        _file({"model.norm.weight": _TENSOR | {"data_offsets": [8, 0]}}, bytes(8)),
        _file({"model.norm.weight": _TENSOR | {"data_offsets": [4, 12]}}, bytes(12)),
        _file({"model.norm.weight": _TENSOR | {"data_offsets": [-8, 0]}}, bytes(8)),
        _file({"model.norm.weight": _TENSOR | {"shape": [2**62, 2**62]}}, bytes(8)),
        _file({"model.norm.weight": _TENSOR | {"shape": [3]}}, bytes(8)),
        _file({"model.norm.weight": _TENSOR | {"dtype": "F31"}}, bytes(8)),
        _file({"model.norm.weight": _TENSOR, "b": _TENSOR}, bytes(8)),
    ],
)
def test_a_header_that_lies(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert tells(_error(tmp_path), f"{path} read")


def test_one_file_goes_before_an_index(tmp_path):
    """As in transformers, which does not look at the index then."""
    save_file({"model.norm.weight": torch.zeros(5)}, tmp_path / "model.safetensors")
    save_file({"model.norm.weight": torch.zeros(7)}, tmp_path / "other.safetensors")
    _name_all(tmp_path, "other.safetensors")
    assert Shards(tmp_path, "numpy").slice("model.norm.weight").get_shape() == [5]
