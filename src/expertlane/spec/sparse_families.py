"""Readers of families whose tokens take part of what is there: by chosen positions or experts.

The planner takes them; the engine does not run them. Each is read as its transformers class (5.24)
does.
"""

from typing import Any

from expertlane.spec.families import Reader, latent_attention
from expertlane.spec.hf_config import ConfigReader
from expertlane.spec.mixers import Mixing
from expertlane.spec.model import LayerKind, ModelConfig, Routing


def _longcat_flash(fields: ConfigReader) -> dict[str, Any]:
    """Each of its layers is two here: attention and a dense MLP, and experts beside the first MLP.

    What the experts give is added after the second.
    """
    fields.expect("zero_expert_type", "identity")
    fields.expect("attention_method", "MLA")
    for key in ("attention_bias", "router_bias", "ngram_vocab_size_ratio"):
        fields.expect(key, False)
    num = fields.optional(int, "num_layers")
    if num is None:
        num = fields.get(int, "num_hidden_layers") // 2
    inner = fields.get(int, "intermediate_size")
    return {
        **latent_attention(fields),
        "num_hidden_layers": 2 * num,
        "rope_interleave": True,
        "dense_layers": tuple(range(1, 2 * num, 2)),
        "draft": (LayerKind(Mixing(), "dense"),),
        "intermediate_size": inner,
        "shared_expert_intermediate_size": inner,
        **fields.same(ModelConfig, "moe_intermediate_size"),
        "num_zero_experts": fields.optional(int, "zero_expert_num") or 0,
        "shortcut_experts": True,
        "routing": Routing(
            norm_topk_prob=False,
            correction_bias=True,
            **fields.same(Routing, "routed_scaling_factor"),
        ),
    }


SPARSE_READERS: dict[str, Reader] = {
    "longcat_flash": _longcat_flash,
}
