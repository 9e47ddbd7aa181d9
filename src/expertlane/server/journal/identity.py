"""Facts that tokens and texts depend on; a journal continues only if they are the same."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from expertlane.spec.deployment import Options
from expertlane.spec.model import ModelConfig

_TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_TENSORS = ".safetensors"
_WHOLE_BYTES = 2**20  # of a tensor file; of a larger one, evenly spread samples are read
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096


def identity(
    model: ModelConfig, folder: Path | None, options: Options, dtype: str | None
) -> dict[str, str]:
    """The facts that tokens and texts depend on, by the names that messages use.

    The layout is not among them: it changes results by rounding alone.

    Args:
        folder: the checkpoint's folder; None where weights are random.
        dtype: the number type asked for; None for the default.
    """
    digest = blake2b(repr(replace(model, name="")).encode(), digest_size=8)
    return {
        "model": digest.hexdigest(),
        "checkpoint": "random weights" if folder is None else fingerprint(folder),
        "--dtype": dtype or "the default",
        "--weights": options.weights,
        "--activations": options.activations,
        "--kv-dtype": options.kv_dtype,
        "--payload": options.payload,
    }


def fingerprint(folder: Path) -> str:
    """A hash of a checkpoint's file names and sizes, its text files, and samples of tensors."""
    digest = blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.name in _TEXTS or path.suffix == _TENSORS):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for part in _parts(path):
                digest.update(part)
    return digest.hexdigest()


def _parts(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES or path.suffix != _TENSORS:
            yield file.read()
            return
        for number in range(_NUM_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)
