"""Folders of models: local ones, or those of the Hugging Face hub and its cache."""

import os
import re
from pathlib import Path

from expertlane.errors import UserError

_CONFIG = "config.json"
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.tiktoken")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def resolve_model(model: str, base: Path = Path(), *, weights: bool = True) -> Path:
    """The folder of a model, downloaded first if it is a hub id that is not in the cache.

    Without a network, or with `HF_HUB_OFFLINE` set, the cache (below `HF_HOME`) is all there is.

    Args:
        model: a folder with a `config.json`, or a hub id, `organisation/name`.
        base: the folder that a relative one is looked for in.
        weights: else only the configuration is downloaded.

    Raises:
        UserError: there is no such folder or model, or it cannot be had.
    """
    # Unlike Path's, these raise nothing for odd names. An empty name is no folder.
    path = model and os.path.join(base, os.path.expanduser(model))
    if os.path.isfile(path):
        raise UserError(f"model {model!r} is a file; give the checkpoint's folder")
    if os.path.isdir(path):
        return _checked(model, Path(path))
    if not _HUB_ID.fullmatch(model):
        raise UserError(
            f"model {model!r}: there is no such folder, and it is no hub id such as "
            "'mistralai/Mixtral-8x7B-v0.1'"
        )
    return _checked(model, _download(model, _FILES if weights else (_CONFIG,)))


def _checked(model: str, folder: Path) -> Path:
    if not os.path.isfile(folder / _CONFIG):
        raise UserError(f"model {model!r}: there is no {_CONFIG}; it is no checkpoint's folder")
    return folder


def _download(model: str, files: tuple[str, ...]) -> Path:
    # Slow to import, and only needed for what is no folder.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except HFValidationError as error:
        reason = f"it is no folder and no hub id: {error}"
    except GatedRepoError:  # a RepositoryNotFoundError too
        reason = "it is gated; ask for access on its page of the hub, then set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "there is no such folder, and no such model on the hub; if private, set HF_TOKEN"
    except LocalEntryNotFoundError as error:
        cause = "HF_HUB_OFFLINE is set"
        if not constants.HF_HUB_OFFLINE:
            cause = f"the download from the hub failed ({_one_line(error.__cause__ or error)})"
        reason = f"{cause}, and the cache {constants.HF_HUB_CACHE} does not hold all of it"
    except Exception as error:  # the client passes its transport's errors on as they are
        reason = f"it cannot be downloaded: {_one_line(error)}"
    raise UserError(f"model {model!r}: {reason}")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
