"""A `ModelConfig` from a Hugging Face `config.json`, in the spellings of transformers 4 and 5.

A family computes what its transformers class does; `docs/families.md` has the table. That class
also decides what a field means where it is left out or null.
"""

import os
from pathlib import Path
from typing import Any, get_args

from expertlane.errors import SpecError
from expertlane.spec.families import READERS
from expertlane.spec.hf_config import (
    FAMILIES,
    ConfigReader,
    Family,
    family_of,
    language_model_of,
    narrow_scheme,
    read_config,
)
from expertlane.spec.mixer_families import MIXER_READERS
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Dtype
from expertlane.spec.planned_families import PLANNED_READERS
from expertlane.spec.ranges import MAX_PARAMS
from expertlane.spec.tensors import num_params

_READERS = READERS | MIXER_READERS | PLANNED_READERS
_SAME = (  # in every family
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def from_hf(
    config: dict[str, Any], name: str | None = None, *, weights: bool = True
) -> ModelConfig:
    """The model that a Hugging Face configuration describes.

    Args:
        config: the parsed `config.json`, or `to_dict()` of a configuration object.
        name: the model's name in messages; its family's name if None.
        weights: whether they will be read; else they may be quantised in any way.

    Raises:
        SpecError: an architecture or a feature that is not supported, or a missing or wrong value.
    """
    family = family_of(config)
    known = FAMILIES[family]
    if weights:
        if known.is_planned_only:
            given = (config.get("architectures") or [known.architecture])[0]
            raise SpecError(
                f"models of {given} are not run by our engine yet; plan and simulate take their "
                "config.json, and compare --engine vllm or --url measures them elsewhere"
            )
        for wrapper in known.wrappers:
            if config.get("architectures") == [wrapper]:
                raise SpecError(
                    f"weights of {wrapper} cannot be read; plan, simulate and compare --project "
                    "take its config.json"
                )
        narrow_scheme(config)
    text = language_model_of(config)
    if known.spellings:
        text = {known.spellings.get(key, key): value for key, value in text.items()}
    fields = ConfigReader(text, name or family, known.defaults)
    fields.refuse_misspelt(known)
    for key, allowed in known.expects.items():
        fields.expect(key, *allowed)
    if fields.get(str, "hidden_act") not in known.hidden_acts:
        raise fields.unsupported("hidden_act")
    model = ModelConfig(
        num_experts=fields.same_in_all(*known.num_experts),
        num_experts_per_tok=fields.same_in_all(*known.num_experts_per_tok),
        usual_skew=known.skew,
        unread_family=family if known.is_planned_only else None,
        **_common(fields, known) | _READERS[known.like or family](fields),
    )
    if (size := num_params(model)) > MAX_PARAMS:
        raise SpecError(
            f"model {model.name}: it has {size:,} parameters; valid: {MAX_PARAMS:,} at most"
        )
    return model


def read_model(folder: Path, given: str, *, weights: bool = True) -> ModelConfig:
    """The model of a checkpoint's folder.

    Args:
        given: the path or hub id that the folder was found by; its last part is the model's name.
        weights: as for `from_hf`.

    Raises:
        SpecError: no checkpoint is there, or it is of a kind that cannot be read.
    """
    config = read_config(folder)
    if not (config.get("architectures") or config.get("model_type")):
        raise SpecError(f"{folder / 'config.json'} names no architecture")
    known, text = FAMILIES[family_of(config)], language_model_of(config)
    sizes = ["hidden_size", known.num_experts[0]]
    if not any(known.spellings.get(key, key) in {*sizes, *known.num_experts} for key in text):
        inside = " in text_config" if text is not config else ""
        raise SpecError(f"{folder / 'config.json'} has no {' and no '.join(sizes)}{inside}")
    return from_hf(config, Path(os.path.abspath(given)).name, weights=weights)


def _common(fields: ConfigReader, family: Family) -> dict[str, Any]:
    """Fields that every family has in the same form."""
    eos = fields.raw("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    dtype = fields.raw("dtype", "torch_dtype")
    if dtype is None:  # what quantised checkpoints were made from
        dtype = "bfloat16" if fields.raw("quantization_config") else "float32"
    dtype = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    if dtype not in get_args(Dtype):
        valid = ", ".join(get_args(Dtype))
        raise fields.error(f"dtype {dtype!r} is not supported; supported: {valid}")
    return {
        "name": fields.name,
        **fields.same(ModelConfig, *_SAME),
        "gated_mlp": family.hidden_acts[0] == "silu",
        "hidden_act": family.hidden_acts[0],
        "eos_token_ids": tuple(fields.typed(int, "eos_token_id", token) for token in eos),
        "dtype": dtype,
    }


def lacking_in_engine(model: ModelConfig) -> str | None:
    """The first feature of a model that the engine lacks, in words; None if it runs."""
    lacking = {
        model.state.title if model.state is not None else "": model.state is not None,
        "compressed attention": model.compressed is not None,
        "sparse attention by an indexer": model.indexer is not None,
        "gated attention": model.attention_gate is not None,
        "layers with a window and heads of their own": model.window_heads is not None,
        "values of another width than keys": (
            model.latent is None and model.value_dim != model.head_dim
        ),
        "queries from a latent": model.query_rank is not None,
        "norms of rotated queries and keys": model.qk_norm == "rotated_head",
        "LayerNorm": "norm" in model.further_biases,
        "a bias of the output head": "head" in model.further_biases,
        "longrope positions": (
            model.rope_scaling is not None and model.rope_scaling.rope_type == "longrope"
        ),
        "layers without rotary positions": bool(model.unrotated_layers),
        "layers of a mixer or an MLP alone": bool(model.mixer_only_layers or model.mlp_only_layers),
        "experts at a latent width": model.moe_latent_size is not None,
        "several residual streams": model.num_streams > 1,
        "experts chosen by a token's number": bool(model.hash_layers),
        "routing by the root of softplus": model.routing.scoring_func == "sqrtsoftplus",
        "experts that compute nothing": model.num_zero_experts > 0,
        "experts added after the next layer": model.shortcut_experts,
        "squared ReLU": model.hidden_act == "relu2",
        f"tensors named as in {model.unread_family}": model.unread_family is not None,
    }
    return next((what for what, is_there in lacking.items() if is_there), None)
