"""Rotary positions of a Hugging Face `config.json`, in the spellings of transformers 4 and 5."""

import math
from typing import Any

from expertlane.spec.hf_config import ConfigReader
from expertlane.spec.model import RopeScaling


def rope_parameters(fields: ConfigReader) -> ConfigReader:
    """The fields of `rope_scaling` (transformers 4) or `rope_parameters` (5); null: the default."""
    parameters = fields.raw("rope_scaling", "rope_parameters")
    parameters = fields.defaults["rope_parameters"] if parameters is None else parameters
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict) or any(isinstance(v, dict) for v in parameters.values()):
        raise fields.error("rope parameters that differ by layer are not supported")
    return ConfigReader(parameters, fields.name, {"truncate": True})


def rotary(fields: ConfigReader, share: float | None = None) -> dict[str, Any]:
    """Rotary positions.

    Args:
        share: of a head's values that are rotated where a configuration names none; None where
            all have to be.
    """
    rope, partial = rope_parameters(fields), {}
    if share is None:
        for holder in (fields, rope):
            holder.expect("partial_rotary_factor", 1, 1.0)
    else:
        share = fields.get(float, "partial_rotary_factor", default=share)
        share = rope.get(float, "partial_rotary_factor", default=share)
        partial = {"partial_rotary_factor": share}
    theta = rope.optional(float, "rope_theta")
    theta = fields.get(float, "rope_theta") if theta is None else theta
    kind = rope.get(str, "rope_type", "type", default="default")
    if kind in ("default", "dynamic"):  # dynamic differs only beyond max_position_embeddings
        return {"rope_theta": theta, **partial}
    max_len = fields.get(int, "max_position_embeddings")
    trained = rope.get(int, "original_max_position_embeddings", default=max_len)
    trained = fields.get(int, "original_max_position_embeddings", default=trained)
    match kind:
        case "linear":
            sizes = rope.same(RopeScaling, "factor")
        case "llama3":
            sizes = rope.same(RopeScaling, "factor", "low_freq_factor", "high_freq_factor")
        case "yarn":
            sizes = _yarn(rope, default_factor=max_len / trained)
        case _:
            raise fields.error(
                f"rope_type {kind!r} is not supported; supported: default, dynamic, linear, "
                "llama3, yarn"
            )
    sizes |= {"rope_type": kind, "original_max_position_embeddings": trained}
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**sizes), **partial}


def _yarn(rope: ConfigReader, default_factor: float) -> dict[str, Any]:
    factor = rope.get(float, "factor", default=default_factor)
    mscale, mscale_all_dim = rope.optional(float, "mscale"), rope.optional(float, "mscale_all_dim")
    if mscale and mscale_all_dim:
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    else:
        attention_factor = yarn_mscale(factor, 1.0)
    return {
        "factor": factor,
        "beta_fast": rope.optional(float, "beta_fast") or 32.0,
        "beta_slow": rope.optional(float, "beta_slow") or 1.0,
        "truncate": bool(rope.optional(bool, "truncate")),
        "attention_factor": rope.get(float, "attention_factor", default=attention_factor),
    }


def yarn_mscale(factor: float, mscale: float) -> float:
    """The growth of attention's logits with the context (Peng et al. 2023, equation 25)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
