"""What a Mixture-of-Experts transformer is made of, under Hugging Face's names."""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from expertlane.errors import SpecError


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm transformer in which every layer is an MoE layer.

    Attention is multi-head with rotary positions; the router is a softmax over the chosen
    `num_experts_per_tok` of `num_experts`; an expert is one up projection, GELU, one down
    projection.

    Raises:
        SpecError: a size is not positive, or `num_experts_per_tok` exceeds `num_experts`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    name: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and not value > 0:  # NaN too
                raise SpecError(f"model {self.name}: {field.name} is {value}; it must be positive")
        if self.num_experts_per_tok > self.num_experts:
            raise SpecError(
                f"model {self.name}: num_experts_per_tok is {self.num_experts_per_tok} but there "
                f"are only {self.num_experts} experts"
            )
        if self.hidden_size % 2:
            raise SpecError(
                f"model {self.name}: hidden_size is {self.hidden_size}; rows of two-byte values "
                "must be whole words, so it must be even"
            )
        if self.head_dim % 2:
            raise SpecError(
                f"model {self.name}: head_dim is {self.head_dim}; rotary positions need an even one"
            )

    @property
    def attention_size(self) -> int:
        """Width of all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def num_expert_params(self) -> int:
        """Parameters of one expert: its up and its down projection."""
        return 2 * self.hidden_size * self.moe_intermediate_size

    @property
    def num_attention_params(self) -> int:
        """Parameters of one layer's query, key, value and output projections."""
        return 4 * self.hidden_size * self.attention_size

    @property
    def num_params(self) -> int:
        """All parameters of the model."""
        per_layer = (
            self.num_attention_params
            + 2 * self.hidden_size
            + self.num_experts * (self.hidden_size + self.num_expert_params)
        )
        outside = 2 * self.vocab_size * self.hidden_size + self.hidden_size
        return self.num_hidden_layers * per_layer + outside

    def with_overrides(self, **overrides: Any) -> "ModelConfig":
        """The same model with some fields replaced."""
        return replace(self, **overrides)


_PAPER = ModelConfig(
    name="paper",
    num_hidden_layers=4,
    hidden_size=8192,
    num_attention_heads=16,
    head_dim=512,
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=32_768,
    vocab_size=32_768,
    max_position_embeddings=16_384,
)

PRESETS: dict[str, ModelConfig] = {
    "paper": _PAPER,
    "paper-small": replace(
        _PAPER,
        name="paper-small",
        hidden_size=256,
        head_dim=16,
        moe_intermediate_size=1024,
        vocab_size=4096,
        max_position_embeddings=1024,
    ),
    "paper-tiny": replace(
        _PAPER,
        name="paper-tiny",
        hidden_size=64,
        head_dim=4,
        moe_intermediate_size=128,
        vocab_size=257,
        max_position_embeddings=64,
    ),
}
