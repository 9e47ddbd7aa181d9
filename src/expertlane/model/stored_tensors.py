"""The tensors that a checkpoint holds, by `config.json` and its files' headers; without torch."""

from pathlib import Path
from typing import Literal

from expertlane.errors import SpecError
from expertlane.model.checkpoint_names import (
    MXFP4_BLOCK,
    TensorLocation,
    is_left_unread,
    tensor_locations,
)
from expertlane.model.shards import Shards
from expertlane.spec.from_hf import from_hf
from expertlane.spec.hf_config import (
    family_of,
    num_extra_layers,
    read_config,
    weight_block_size,
)
from expertlane.spec.model import ModelConfig
from expertlane.spec.tensors import EMBEDDING, HEAD, Shape, tensor_names, tensor_shape

PLAIN_TYPES = ("F32", "BF16", "F16")
FP8 = "F8_E4M3"
_COMPARED_BYTES = 16 * 1024**2  # at a time


class StoredTensors:
    """A folder with a `config.json` and safetensors.

    Args:
        model: what is to be read; by default what `config.json` describes.
        framework: library of the arrays that slices of tensors are.

    Attributes:
        folder: where it is.
        model: as given or described.

    Raises:
        SpecError: no checkpoint is there, or it is of a kind that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelConfig | None = None,
        framework: Literal["pt", "numpy"] = "numpy",
    ) -> None:
        self.folder = folder
        config = read_config(folder)
        self.model = model or from_hf(config, folder.resolve().name)
        self._family = family_of(config)
        self._block_size = weight_block_size(config)
        self._num_extra_layers = num_extra_layers(config)
        self._shards = Shards(folder, framework)

    def check(self) -> list[str]:
        """Check that all tensors of the model are there, with their shapes, by the files' headers.

        Returns:
            The stored tensors that the model has no use for, sorted. An output head beside an
            embedding that it is tied to is not among them, nor is what transformers ignores without
            a warning.

        Raises:
            SpecError: one is missing or has a wrong shape.
        """
        used: set[str] = set()
        for name in tensor_names(self.model):
            used.update(self._stored_names(self._locate(name)[0]))
        if self._has_both_tied():
            used.add(tensor_locations(self._family, HEAD)[0].name)
        first = self.model.num_hidden_layers
        extra_layers = range(first, first + self._num_extra_layers)
        unused = {
            name
            for name in self._shards.names_in_files()
            if name not in used and not is_left_unread(name, extra_layers)
        }
        self._shards.close()
        return sorted(unused)

    def has_head_of_its_own(self) -> bool:
        """Whether `config.json` ties the head to the embedding, but there is another head.

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

    def _has_both_tied(self) -> bool:
        locations = (tensor_locations(self._family, name)[0] for name in (EMBEDDING, HEAD))
        return self.model.tie_word_embeddings and all(
            each.name in self._shards for each in locations
        )

    def _stored_names(self, stored: TensorLocation) -> list[str]:
        """A tensor's own name, or those of its quantised form."""
        if self._is_mxfp4(stored):
            return [f"{stored.name}_blocks", f"{stored.name}_scales"]
        scale = f"{stored.name}_scale_inv"
        has_scale = scale in self._shards and self._stored_type(stored.name) == FP8
        return [stored.name, scale] if has_scale else [stored.name]

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
        """Where a logical tensor is, and its logical shape; its stored shape has been checked."""
        locations = tensor_locations(self._family, name)
        if name in (EMBEDDING, HEAD) and self.model.tie_word_embeddings:
            name = EMBEDDING  # one of them is enough
            locations = tensor_locations(self._family, EMBEDDING) + tensor_locations(
                self._family, HEAD
            )
        shape = tensor_shape(self.model, name)
        for stored in locations:
            if stored.name in self._shards or self._is_mxfp4(stored):
                break
        else:
            raise SpecError(f"{self.folder}: tensor {locations[0].name} is missing")
        expected = list(shape)
        if stored.half is not None:
            expected[0] *= 2
        leading = [] if stored.expert is None else [self.model.num_experts]
        if self._is_mxfp4(stored):
            expected[1:] = [expected[1] // MXFP4_BLOCK]
            self._check_shape(f"{stored.name}_scales", leading + expected)
            self._check_shape(f"{stored.name}_blocks", [*leading, *expected, MXFP4_BLOCK // 2])
        else:
            self._check_shape(
                stored.name, leading + (expected[::-1] if stored.transposed else expected)
            )
        return stored, shape

    def _check_shape(self, stored_name: str, expected: list[int]) -> None:
        found = list(self._shards.slice(stored_name).get_shape())
        if found != expected:
            raise SpecError(
                f"{self.folder}: tensor {stored_name} has shape {found}; config.json asks for "
                f"{expected}"
            )
