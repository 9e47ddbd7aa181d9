"""Checks, before ranks start, that a checkpoint holds what its `config.json` says, and no more."""

from collections.abc import Callable
from pathlib import Path

from expertlane.engine.torchrun import is_under_torchrun, own_rank
from expertlane.errors import SpecError
from expertlane.model.stored_tensors import StoredTensors
from expertlane.spec.model import ModelConfig

_NUM_SHOWN = 3


def check_checkpoint(
    model: ModelConfig, folder: Path, *, ignore_unused_tensors: bool, log: Callable[[str], None]
) -> ModelConfig:
    """Compare a checkpoint with its model, by the headers of its files.

    Args:
        ignore_unused_tensors: go on with a warning where the model has no use for some tensors.
        log: gets warnings, a line each; under torchrun those of the first process.

    Returns:
        The model that ranks are to load: its head is not tied to its embedding where the
        checkpoint has another head, as in transformers 5.

    Raises:
        SpecError: a tensor is missing, has a wrong shape, or is not used.
    """
    if is_under_torchrun() and own_rank() != 0:  # all find the same; the first one prints
        log = _discard
    checkpoint = StoredTensors(folder, model)
    unused = checkpoint.check()
    if unused:
        text = f"{folder}: config.json has no use for {_shown(unused)}"
        if not ignore_unused_tensors:
            raise SpecError(
                f"{text}; to go on without: --ignore-unused-tensors (ignore_unused_tensors=True)"
            )
        log(f"warning: {text}; going on without")
    if not checkpoint.has_head_of_its_own():
        return model
    log(
        f"warning: {folder}: config.json ties the output head to the embedding, but "
        "lm_head.weight is another; it is used"
    )
    return model.with_overrides(tie_word_embeddings=False)


def _discard(line: str) -> None:
    pass


def _shown(names: list[str]) -> str:
    shown, num_more = ", ".join(names[:_NUM_SHOWN]), len(names) - _NUM_SHOWN
    kind = "tensor" if len(names) == 1 else "tensors"
    return f"{kind} {shown}" + (f" and {num_more} more" if num_more > 0 else "")
