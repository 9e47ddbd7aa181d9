"""The tensors of a checkpoint, by `config.json` and the headers of its files; without torch.

First: the names and layouts of logical tensors in the checkpoints of each family. The safetensors
files, one, or many with an index, are memory-mapped. Pages of a mapped file count as memory of the
process that reads them, so a file is unmapped whenever much of it has been read.
"""

import json
import mmap
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from expertlane.errors import SpecError
from expertlane.spec.files import INDEX_BYTES, check_regular, read_json_object
from expertlane.spec.from_hf import from_hf
from expertlane.spec.hf_config import (
    FAMILIES,
    MXFP4_BLOCK,
    family_of,
    language_model_of,
    narrow_scheme,
    num_extra_layers,
    read_config,
)
from expertlane.spec.mixers import Shape
from expertlane.spec.model import ModelConfig
from expertlane.spec.tensors import EMBEDDING, HEAD, layer_name, tensor_names, tensor_shape

_OUTSIDE = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_IN_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "query_a": "self_attn.q_a_proj.weight",
    "query_a_norm": "self_attn.q_a_layernorm.weight",
    "query_b": "self_attn.q_b_proj.weight",
    "key": "self_attn.k_proj.weight",
    "key_bias": "self_attn.k_proj.bias",
    "key_norm": "self_attn.k_norm.weight",
    "value": "self_attn.v_proj.weight",
    "value_bias": "self_attn.v_proj.bias",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
    "sinks": "self_attn.sinks",
    "output": "self_attn.o_proj.weight",
    "output_bias": "self_attn.o_proj.bias",
    "moe_norm": "post_attention_layernorm.weight",
    "router": "mlp.gate.weight",
    "correction_bias": "mlp.gate.e_score_correction_bias",
    "shared.gate": "mlp.shared_experts.gate_proj.weight",
    "shared.up": "mlp.shared_experts.up_proj.weight",
    "shared.down": "mlp.shared_experts.down_proj.weight",
    "dense.gate": "mlp.gate_proj.weight",
    "dense.up": "mlp.up_proj.weight",
    "dense.down": "mlp.down_proj.weight",
}
# The name that a family publishes, then the one that transformers 5 writes by default.
_OWN_IN_LAYER: dict[str, dict[str, tuple[str, ...]]] = {
    "mixtral": {"router": ("block_sparse_moe.gate.weight", "mlp.gate.weight")},
    "qwen2_moe": {
        "shared_gate": ("mlp.shared_expert_gate.weight",),
        "shared.gate": ("mlp.shared_expert.gate_proj.weight",),
        "shared.up": ("mlp.shared_expert.up_proj.weight",),
        "shared.down": ("mlp.shared_expert.down_proj.weight",),
    },
    "gpt_oss": {"router": ("mlp.router.weight",), "router_bias": ("mlp.router.bias",)},
    "minimax_m2": {
        "router": ("block_sparse_moe.gate.weight", "mlp.gate.weight"),
        "correction_bias": (
            "block_sparse_moe.e_score_correction_bias",
            "mlp.e_score_correction_bias",
        ),
    },
    "ernie4_5_moe": {
        "correction_bias": (
            "mlp.moe_statics.e_score_correction_bias",
            "mlp.gate.moe_statics.e_score_correction_bias",
        )
    },
    "granitemoe": {
        "router": ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight")
    },
}
_IN_ROW = {("ernie4_5_moe", "correction_bias")}
_IN_ANY_LAYER = re.compile(r"model\.(?:language_model\.)?layers\.(\d{1,9})\.")
_OLD_BUFFER = "rotary_emb.inv_freq"
# Scales of one-byte caches, one for a tensor; ours has one for each key and value of a head.
_CACHE_SCALE = re.compile(r"\.self_attn\.(?:\w+\.)?[kv]_scale$")
_OF_EXPERT = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_OF_MIXTRAL_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class TensorLocation:
    """The stored tensor that holds a logical tensor, and the part of it.

    Attributes:
        name: name of the stored tensor.
        expert: index in its first dimension, where it holds all experts; else None.
        half: gate (0) or up (1), where it holds both; else None.
        interleaved: the halves' rows alternate; else one follows the other.
        transposed: matrices are [in_features, out_features], unless they are quantised.
        in_row: the logical tensor, a vector, is the only row of a matrix.
    """

    name: str
    expert: int | None = None
    half: int | None = None
    interleaved: bool = False
    transposed: bool = False
    in_row: bool = False


def tensor_locations(family: str, name: str) -> tuple[TensorLocation, ...]:
    """Locations where the logical tensor `name` may be stored, the usual one first.

    Besides the layout that a family publishes, a checkpoint may have all experts of a layer in one
    tensor, as transformers 5 holds them.
    """
    model = "model.language_model" if family == "qwen3_vl_moe" else "model"
    if name in _OUTSIDE:
        return (TensorLocation(_OUTSIDE[name].replace("model", model, 1)),)
    _, layer, part = name.split(".", 2)
    prefix = f"{model}.layers.{layer}"
    if part.startswith("experts."):
        _, expert, matrix = part.split(".")
        return _expert_locations(family, prefix, int(expert), matrix)
    own = _OWN_IN_LAYER.get(family, {}).get(part) or (_IN_LAYER[part],)
    in_row = (family, part) in _IN_ROW
    return tuple(TensorLocation(f"{prefix}.{each}", in_row=in_row) for each in own)


def is_left_unread(stored_name: str, extra_layers: range, unread: Iterable[str] = ()) -> bool:
    """Whether a stored tensor is ignored without a warning.

    Transformers ignores it too, or it is the scale of a one-byte cache.

    Args:
        extra_layers: layers for multi-token prediction, after the last one.
        unread: prefixes of names that are no part of the language model.
    """
    if stored_name.startswith(tuple(unread)):
        return True
    layer = _IN_ANY_LAYER.match(stored_name)
    if _OLD_BUFFER in stored_name or _CACHE_SCALE.search(stored_name):
        return True
    return layer is not None and int(layer[1]) in extra_layers


def _expert_locations(
    family: str, prefix: str, expert: int, matrix: str
) -> tuple[TensorLocation, ...]:
    matrix, _, bias = matrix.partition("_")
    is_down, bias = matrix == "down", bias and f"_{bias}"
    block = "block_sparse_moe" if family == "granitemoe" else "mlp"
    half = {"gate": 0, "up": 1, "down": None}[matrix]

    def together(name: str) -> TensorLocation:
        return TensorLocation(f"{prefix}.{name}", expert, half)

    fused = together(f"{block}.experts.{'down_proj' if is_down else 'gate_up_proj'}{bias}")
    match family:
        case "gpt_oss":
            return (replace(fused, interleaved=half is not None, transposed=not bias),)
        case "granitemoe":
            return together(f"{block}.{'output' if is_down else 'input'}_linear.weight"), fused
        case "mixtral" | "minimax_m2":
            alone = f"block_sparse_moe.experts.{expert}.{_OF_MIXTRAL_EXPERT[matrix]}"
        case _:
            alone = f"mlp.experts.{expert}.{_OF_EXPERT[matrix]}"
    by_itself = TensorLocation(f"{prefix}.{alone}.weight")
    if family == "qwen3_vl_moe":
        return fused, replace(fused, transposed=True), by_itself  # published transposed
    return by_itself, fused


PLAIN_TYPES = ("F32", "BF16", "F16")
VALUES_OF_INT32 = 4  # that are packed into one
_TYPE_NAMES = {
    ("int8", False): "I8",
    ("int8", True): "I32",
    ("float8", False): "F8_E4M3",
}
_OF_ACTIVATIONS = ("input_scale", "input_zero_point")
MAX_MAPPED_BYTES = 64 * 1024**2
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COMPARED_BYTES = 16 * 1024**2  # at a time


class Shards:
    """The safetensors files of a folder.

    Args:
        framework: the library whose arrays slices are; with numpy nothing here needs torch.

    Raises:
        SpecError: there are no files, or the index or a file cannot be read.
    """

    def __init__(self, folder: Path, framework: Literal["pt", "numpy"]) -> None:
        self._folder = folder
        self._framework = framework
        self._open_files: dict[str, Any] = {}
        self._mapped_bytes = 0
        self._file_of_tensor = self._read_index()

    def __contains__(self, stored_name: str) -> bool:
        return stored_name in self._file_of_tensor

    def names_in_files(self) -> Iterable[str]:
        """Names of all stored tensors, also of those that the index lacks."""
        for file in sorted(set(self._file_of_tensor.values())):
            yield from self._file(file).keys()

    def slice(self, stored_name: str) -> Any:
        """A stored tensor, to be sliced; only the slices are read.

        Raises:
            SpecError: it is missing, or its file cannot be read.
        """
        file = self._file_of_tensor.get(stored_name)
        if file is None:
            raise SpecError(f"{self._folder}: tensor {stored_name} is missing")
        try:
            return self._file(file).get_slice(stored_name)
        except SafetensorError:
            raise SpecError(f"{self._folder / file}: tensor {stored_name} is missing") from None

    def tensor(self, stored_name: str) -> Any:
        """A whole stored tensor, which `slice` has found before."""
        return self._file(self._file_of_tensor[stored_name]).get_tensor(stored_name)

    def bytes_of(self, stored_name: str) -> memoryview:
        """The bytes of a stored tensor, memory-mapped."""
        path = self._folder / self._file_of_tensor[stored_name]
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(header_bytes))[stored_name]["data_offsets"]
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(mapped)[8 + header_bytes :][begin:end]

    def count_read(self, num_bytes: int) -> None:
        """Count bytes that were read from mapped files."""
        self._mapped_bytes += num_bytes

    def close(self) -> None:
        """Unmap all files; they are opened again when needed."""
        self._open_files.clear()
        self._mapped_bytes = 0

    def _read_index(self) -> dict[str, str]:
        """The file name of every stored tensor."""
        path = self._folder / _INDEX
        if (self._folder / _FILE).exists():  # transformers looks for it first
            return dict.fromkeys(self._file(_FILE).keys(), _FILE)
        if not path.exists():
            raise SpecError(f"{self._folder}: there is neither {_FILE} nor {_INDEX}")
        files = read_json_object(path, INDEX_BYTES, lenient=True).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(each, str) for each in files.values()):
            raise SpecError(f"{path} cannot be read: it must hold an object 'weight_map'")
        for file in set(files.values()):
            if not _stays_inside(file):
                raise SpecError(
                    f"{path} names {file!r}; shards must lie in the checkpoint's folder"
                )
        return dict(files)

    def _file(self, name: str) -> Any:
        """An open file; all files are unmapped first if much of them was read."""
        if self._mapped_bytes > MAX_MAPPED_BYTES:
            self.close()
        if name not in self._open_files:
            path = self._folder / name
            if not path.exists():
                raise SpecError(f"{path} is missing; {_INDEX} names it")
            check_regular(path)
            try:
                self._open_files[name] = safe_open(path, self._framework)
            except (OSError, SafetensorError) as error:
                raise SpecError(f"{path} cannot be read: {error}") from None
        return self._open_files[name]


def _stays_inside(file: str) -> bool:
    """Whether a file's name stays inside the folder.

    Links are followed, since the hub's cache consists of them.
    """
    path = PurePosixPath(file)
    return bool(file) and "\0" not in file and not path.is_absolute() and ".." not in path.parts


class StoredTensors:
    """A checkpoint: a folder with a `config.json` and safetensors files.

    Args:
        model: the model whose tensors are read; by default the one that `config.json` describes.
        framework: the library whose arrays slices of tensors are.

    Attributes:
        folder: the checkpoint's folder.
        model: the model given, or described.
        scheme: the quantisation scheme of one-byte matrices; None where there are none.

    Raises:
        SpecError: there is no checkpoint, or it is of a kind that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelConfig | None = None,
        framework: Literal["pt", "numpy"] = "numpy",
    ) -> None:
        self.folder = folder
        config = language_model_of(read_config(folder))
        self.model = model or from_hf(config, folder.resolve().name)
        self._family = family_of(config)
        self.scheme = narrow_scheme(config)
        self._num_extra_layers = num_extra_layers(config)
        self._shards = Shards(folder, framework)

    def check(self) -> list[str]:
        """Check that all tensors of the model are there, with their shapes, by the files' headers.

        Returns:
            Names of stored tensors that the model does not use, sorted. They do not include an
            output head that is tied to the embedding, nor tensors that transformers ignores without
            a warning.

        Raises:
            SpecError: a tensor is missing or has a wrong shape.
        """
        used: set[str] = set()
        for name in tensor_names(self.model):
            used.update(self._stored_names(self._locate(name)[0]))
        used.update(self._without_values())
        if self._has_both_tied():
            used.add(tensor_locations(self._family, HEAD)[0].name)
        first = self.model.num_hidden_layers
        extra_layers = range(first, first + self._num_extra_layers)
        unread = FAMILIES[self._family].unread
        unused = {
            name
            for name in self._shards.names_in_files()
            if name not in used and not is_left_unread(name, extra_layers, unread)
        }
        self._shards.close()
        return sorted(unused)

    def has_head_of_its_own(self) -> bool:
        """Whether `config.json` ties the head to the embedding, but a different head is stored.

        Raises:
            SpecError: the head has another shape than the embedding, or cannot be read.
        """
        if not self._has_both_tied():
            return False
        names = [tensor_locations(self._family, name)[0].name for name in (EMBEDDING, HEAD)]
        for name in names:
            self._check_shape(name, list(tensor_shape(self.model, EMBEDDING)))
        if len({self._stored_type(name) for name in names}) > 1:
            return True
        embedding, head = map(self._shards.bytes_of, names)
        starts = range(0, len(embedding), _COMPARED_BYTES)
        return any(
            embedding[start : start + _COMPARED_BYTES] != head[start : start + _COMPARED_BYTES]
            for start in starts
        )

    def _without_values(self) -> Iterator[str]:
        """Stored names of shared experts of width 0, which transformers writes nevertheless."""
        model = self.model
        if model.shared_expert_intermediate_size:
            return
        for layer in range(model.num_hidden_layers):
            for part in ("gate", "up", "down"):
                name = layer_name(layer, f"shared.{part}")
                stored = tensor_locations(self._family, name)[0]
                if not self._is_there(stored):
                    continue
                is_narrow = self._is_narrow(stored)
                values = self._values_name(stored) if is_narrow else stored.name
                if 0 in self._shape_in_file(values):
                    yield from self._stored_names(stored)

    def _has_both_tied(self) -> bool:
        locations = (tensor_locations(self._family, name)[0] for name in (EMBEDDING, HEAD))
        return self.model.tie_word_embeddings and all(
            each.name in self._shards for each in locations
        )

    def _stored_names(self, stored: TensorLocation) -> list[str]:
        """Stored names of a tensor: its own, or those of its quantised form."""
        if self._is_mxfp4(stored):
            return [f"{stored.name}_blocks", f"{stored.name}_scales"]
        if not self._is_narrow(stored):
            return [stored.name]
        assert self.scheme is not None
        names = [self._values_name(stored), f"{stored.name}{self.scheme.scale}"]
        more = [f"{stored.name}_shape"] if self.scheme.is_packed else []
        # Scales of activations are not used: inputs are scaled by their own values, if rounded.
        more += [stored.name.removesuffix("weight") + each for each in _OF_ACTIVATIONS]
        return names + [name for name in more if name in self._shards]

    def _is_narrow(self, stored: TensorLocation) -> bool:
        """Whether a tensor is stored as one-byte values."""
        scheme = self.scheme
        if scheme is None or stored.expert is not None:
            return False
        name, type_name = self._values_name(stored), _TYPE_NAMES[scheme.type, scheme.is_packed]
        return name in self._shards and self._stored_type(name) == type_name

    def _values_name(self, stored: TensorLocation) -> str:
        packed = self.scheme is not None and self.scheme.is_packed
        return f"{stored.name}_packed" if packed else stored.name

    def _stored_type(self, stored_name: str) -> str:
        return str(self._shards.slice(stored_name).get_dtype())

    def _refused_type(self, stored_name: str) -> SpecError:
        return SpecError(
            f"{self.folder}: tensor {stored_name} is {self._stored_type(stored_name)}; it must be "
            f"{', '.join(PLAIN_TYPES)}, or quantised as config.json says"
        )

    def _is_mxfp4(self, stored: TensorLocation) -> bool:
        return f"{stored.name}_blocks" in self._shards

    def _locate(self, name: str) -> tuple[TensorLocation, Shape]:
        """The location and logical shape of a logical tensor; checks its stored shape."""
        locations = tensor_locations(self._family, name)
        if name in (EMBEDDING, HEAD) and self.model.tie_word_embeddings:
            name = EMBEDDING  # one of them is enough
            locations = tensor_locations(self._family, EMBEDDING) + tensor_locations(
                self._family, HEAD
            )
        shape = tensor_shape(self.model, name)
        there = [each for each in locations if self._is_there(each)]
        if not there:
            raise SpecError(f"{self.folder}: tensor {locations[0].name} is missing")
        # Of locations with one name, transposed or not, take the one whose shape fits.
        alike = [each for each in there if each.name == there[0].name][1:]
        fits = (
            each for each in alike if self._shape_in_file(each.name) == self._plain(each, shape)
        )
        stored = there[0]
        if alike and self._shape_in_file(stored.name) != self._plain(stored, shape):
            stored = next(fits, stored)
        if self._is_mxfp4(stored):
            *leading, columns = self._plain(replace(stored, transposed=False), shape)
            blocks = [*leading, columns // MXFP4_BLOCK]
            self._check_shape(f"{stored.name}_scales", blocks)
            self._check_shape(f"{stored.name}_blocks", [*blocks, MXFP4_BLOCK // 2])
        elif self._is_narrow(stored):
            self._check_narrow(stored, list(shape))
        else:
            self._check_shape(stored.name, self._plain(stored, shape))
        return stored, shape

    def _is_there(self, stored: TensorLocation) -> bool:
        return stored.name in self._shards or self._is_mxfp4(stored) or self._is_narrow(stored)

    def _plain(self, stored: TensorLocation, shape: Shape) -> list[int]:
        """The stored shape of a tensor that is not quantised."""
        rows, *columns = shape
        whole = [rows * (1 if stored.half is None else 2), *columns]
        whole = whole[::-1] if stored.transposed else whole
        if stored.in_row:
            return [1, *whole]
        return whole if stored.expert is None else [self.model.num_experts, *whole]

    def _shape_in_file(self, stored_name: str) -> list[int]:
        return list(self._shards.slice(stored_name).get_shape())

    def _check_narrow(self, stored: TensorLocation, expected: list[int]) -> None:
        scheme = self.scheme
        assert scheme is not None
        if len(expected) != 2:
            raise self._refused_type(stored.name)
        rows, columns = expected
        in_values = -(-columns // VALUES_OF_INT32) if scheme.is_packed else columns
        self._check_shape(self._values_name(stored), [rows, in_values])
        scales = [-(-rows // (scheme.rows or rows)), -(-columns // (scheme.columns or columns))]
        name = f"{stored.name}{scheme.scale}"
        if self._stored_type(name) not in PLAIN_TYPES:
            raise self._refused_type(name)
        if scheme.rows is not None or self._shards.slice(name).get_shape() not in ([], [1]):
            self._check_shape(name, scales)

    def _check_shape(self, stored_name: str, expected: list[int]) -> None:
        found = self._shape_in_file(stored_name)
        if found != expected:
            raise SpecError(
                f"{self.folder}: tensor {stored_name} has shape {found}; config.json asks for "
                f"{expected}"
            )
