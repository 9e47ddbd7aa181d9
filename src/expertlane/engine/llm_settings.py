"""The model, the tokenizer and the limits of an `LLM`, found before ranks start."""

import sys
from contextlib import suppress
from pathlib import Path

from expertlane.engine.launch import check_checkpoint
from expertlane.errors import UserError
from expertlane.schedule.request import Limits
from expertlane.spec.checkpoint_folder import resolve_model
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.files import as_path
from expertlane.spec.from_hf import read_model
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.text.tokenizer import TOKENIZER, Tokenizer, configured_eos_token_ids


def find_model(model: str | Path, ignore_unused_tensors: bool) -> tuple[ModelConfig, Path | None]:
    """The model of a preset, or of a checkpoint checked against its files, and its folder.

    Raises:
        UserError: there is no such model, or the checkpoint's files do not suit it.
    """
    if not isinstance(model, str):
        model = str(as_path("model", model))
    if model in PRESETS:
        return PRESETS[model], None
    folder = resolve_model(model)
    checked = check_checkpoint(
        read_model(folder, model),
        folder,
        ignore_unused_tensors=ignore_unused_tensors,
        log=print_to_stderr,
    )
    return checked, folder


def print_to_stderr(line: str) -> None:
    """Print a line on stderr for the user of an `LLM`."""
    with suppress(OSError, ValueError):  # it cannot be written: requests go on
        print(line, file=sys.stderr)


def read_tokenizer(folder: Path | None) -> tuple[Tokenizer | None, frozenset[int]]:
    """A checkpoint's tokenizer, if it has one, and the tokens that end a sequence."""
    if folder is None:
        return None, frozenset()
    if not (folder / TOKENIZER).is_file():
        return None, configured_eos_token_ids(folder)
    tokenizer = Tokenizer.from_folder(folder)
    return tokenizer, tokenizer.eos_token_ids


def wanted_limits(model: ModelConfig, config: EngineConfig) -> Limits:
    """The limits that a config asks for, with one block where it leaves their number open.

    Raises:
        UserError: `max_model_len` is more than the model's positions.
    """
    longest = model.max_position_embeddings
    asked = longest if config.max_model_len is None else config.max_model_len
    if asked > longest:
        raise UserError(f"max_model_len is {asked}; valid for {model.name}: 1 to {longest}")
    return Limits(
        vocab_size=model.vocab_size,
        max_model_len=asked,
        num_blocks=1 if config.num_blocks is None else config.num_blocks,
        block_size=config.block_size,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        prefix_caching=config.prefix_caching,
    )
