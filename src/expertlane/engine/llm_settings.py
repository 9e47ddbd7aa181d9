"""Reads and checks the arguments of an `LLM`: model, tokenizer, settings."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import get_args

from expertlane.engine.launch import (
    check_checkpoint,
)
from expertlane.errors import SpecError, UserError
from expertlane.spec.checkpoint_folder import resolve_model
from expertlane.spec.deployment import Options
from expertlane.spec.files import as_path
from expertlane.spec.from_hf import read_model
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.names import CheckLevel, CpuIsa, Dtype, OnFailure
from expertlane.spec.ranges import RANGES, shown, take, take_flag, take_word
from expertlane.text.tokenizer import TOKENIZER, Tokenizer, configured_eos_token_ids


def find_model(model: str | Path, ignore_unused_tensors: bool) -> tuple[ModelConfig, Path | None]:
    """A preset, or the model of a checkpoint's folder, checked against its files.

    Raises:
        UserError: there is none, or its files do not suit it.
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


def check_settings(
    dtype: str | None, cpu_isa: str | None, on_failure: str, check: str, **others: float | bool
) -> None:
    """Refuse a word that is none of the valid ones, a number out of its range, or no flag.

    Args:
        others: numbers that have a range, and flags.

    Raises:
        UserError: there is one.
    """
    for name, value, valid in (("dtype", dtype, Dtype), ("cpu_isa", cpu_isa, CpuIsa)):
        if value is not None:
            take_word(name, value, get_args(valid))
    take_word("on_failure", on_failure, get_args(OnFailure))
    take_word("check", check, get_args(CheckLevel))
    for name, other in others.items():
        take(name, other) if name in RANGES else take_flag(name, other)


def checked_model_len(model: ModelConfig, asked: int | None) -> int:
    """The largest number of positions of a sequence.

    Raises:
        UserError: more were asked for than the model takes, or none.
    """
    limit = model.max_position_embeddings
    if asked is None:
        return limit
    if not 1 <= take("max_model_len", asked) <= limit:
        raise UserError(f"max_model_len is {asked}; valid for {model.name}: 1 to {limit}")
    return asked


def as_layout(layout: str | Layout) -> Layout:
    """Parse a layout, unless it is one.

    Raises:
        SpecError: as `Layout.parse`.
    """
    if isinstance(layout, Layout):
        return layout
    if not isinstance(layout, str):
        raise SpecError(f"layout is {shown(layout)}; it must be a text, such as 'tp=2,ep=2'")
    return Layout.parse(layout)


def as_options(options: Options | None) -> Options:
    """`options`, or the defaults for None.

    Raises:
        SpecError: they are of another type.
    """
    if options is None:
        return Options()
    if not isinstance(options, Options):
        raise SpecError(f"options is {shown(options)}; it must be Options(…), or None")
    return options
