"""A Mixture-of-Experts transformer: its sizes, under Hugging Face's names."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from expertlane.errors import SpecError
from expertlane.spec.mixers import (
    CompressedAttention,
    Indexer,
    LatentAttention,
    Mixing,
    RopeScaling,
    StateMixer,
    WindowHeads,
)
from expertlane.spec.names import Dtype
from expertlane.spec.ranges import DEFAULT_SKEW, Strict, take_fields


class LayerKind(NamedTuple):
    """A layer's mixer and MLP; layers of one kind have the same tensors and costs.

    Attributes:
        mixing: None where it has an MLP alone.
        mlp: `none` where it has a mixer alone.
        is_hashed: a token's number, not a router, chooses its experts.
    """

    mixing: Mixing | None
    mlp: Literal["experts", "dense", "none"]
    is_hashed: bool = False


@dataclass(frozen=True)
class Routing(Strict):
    """Routing function: from a router's logits to chosen experts and their weights.

    Scores are `scoring_func` of the logits over all experts. The choice is the
    `num_experts_per_tok` largest of scores + correction bias, within the best `topk_group` of
    `n_group` equal groups of consecutive experts. Weights are the chosen experts' scores without
    the correction bias, divided by their sum if `norm_topk_prob`, times `routed_scaling_factor`.
    So softmax with `norm_topk_prob` is the same function as a softmax over the chosen logits.

    Attributes:
        scoring_func: `sqrtsoftplus` is the root of ln(1 + e^logit).
        router_bias: the logits have a bias.
        router_skew: skew of the experts' popularity under seeded weights: their router's bias is
            -router_skew · ln(1 + place) by the experts' places in an order drawn for each layer, so
            that the load falls about as a power law. Checkpoints have biases of their own.
        correction_bias: a bias for the choice alone exists.
        group_score: score of a group: its largest, or the sum of its two largest
            scores + correction bias.
    """

    scoring_func: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_bias: bool = False
    router_skew: float = 0.0
    correction_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2_sum"] = "max"


class Heads(NamedTuple):
    """Heads of a layer's attention: of queries, of keys and values; and whether they have sinks."""

    num: int
    num_kv: int
    have_sinks: bool


@dataclass(frozen=True)
class ModelConfig(Strict):
    """A pre-norm decoder with root-mean-square norms and MoE or dense MLPs.

    The defaults are the paper's model: multi-head attention with rotary positions in every layer,
    a softmax over the chosen experts, and experts of one up projection, GELU, one down projection.

    Attributes:
        head_dim: of a query and a key; with latent attention qk_nope_head_dim + qk_rope_head_dim.
        v_head_dim: of a value, without latent attention; None for `head_dim`.
        num_key_value_heads: None for as many as there are query heads; see `num_kv_heads`.
        qkv_bias, output_bias: attention's projections have biases.
        qk_norm: queries and keys are normed before they are rotated: each head by itself with one
            weight for all heads (`rotated_head`: after they are rotated), or all heads together.
        attention_sinks: every head has a logit that takes part in the softmax's sum alone.
        window_heads: of the layers with a window; None where all layers have the same heads.
        query_rank: width of a latent that the queries come from, without latent attention (Hu et
            al. 2024, Multi-matrix Factorization Attention); None where they have none.
        attention_gate: attention's output is multiplied by the sigmoid of a gate: of one for each
            value, which the queries' projection gives beside them, or one for each head.
        further_biases: `norm`: norms of hidden states subtract the mean and have a bias (layer
            norms); `head`: the output head has a bias.
        unread_family: its family, where the engine does not know that family's names of tensors.
        unrotated_layers: layers whose queries and keys are not rotated by their positions.
        state: the mixer of `state_layers`, which have no attention.
        indexer: chooses the positions that attention sees, or the entries of compressed attention.
        unindexed_layers: layers whose attention sees all positions although others have an indexer.
        shared_choice_layers: layers without an indexer of their own that take the choice of the
            latest layer with one.
        compressed: attention to a window and to entries that stand for several positions; one head
            of keys, which are values too.
        num_streams: residual streams, which are mixed around every block; 1 for a plain residual.
        mixer_only_layers, mlp_only_layers: layers without an MLP, and without a mixer.
        draft: layers that a draft of multi-token prediction passes; empty where none are published
            (see `draft_kinds`).
        sliding_window: one entry a layer, how many latest positions (its own among them) a token
            sees, None for all; empty if no layer has a window.
        rope_interleave: rotary pairs are (2i, 2i + 1), not (i, i + rotary_dim / 2).
        partial_rotary_factor: this share of a head's values, the first ones, is rotated; 1 with
            latent attention, which has its own.
        attention_multiplier: factor of attention's dot products; None for the usual,
            see `softmax_scale`.
        embedding_multiplier: factor of embeddings.
        residual_multiplier: factor of attention's and MLPs' outputs before they are
            added to the hidden states.
        logits_scaling: divisor of logits.
        gated_mlp: act(gate(x)) · up(x) goes into the down projection, not act(up(x)).
        swiglu_limit: if given, gate ≤ limit and -limit ≤ up ≤ limit, and (up + 1) · gate ·
            sigmoid(swiglu_alpha · gate) goes into the down projection.
        expert_bias: the experts' projections have biases.
        dense_layers: the layers with one dense MLP of `intermediate_size` and no experts.
        shared_expert_intermediate_size: width of the MLP that every token of an MoE layer takes
            besides its experts; 0 for none.
        moe_latent_size: width that tokens are projected to on their way to experts, and back from
            it; None where experts take hidden states.
        num_zero_experts: further experts of the router that give back what they take, and compute
            and hold nothing; of the chosen ones only the others cost anything.
        shortcut_experts: the experts' output is added after the next layer, which does not wait for
            it; that of a shared expert is added at once.
        hash_layers: the layers in which a table chooses a token's experts by its number in the
            vocabulary; the router weights their outputs.
        shared_expert_gate: its output is multiplied by the sigmoid of a projection to one value.
        tie_word_embeddings: the output head is the embedding.
        dtype: number type of the weights as stored, or as meant where they are quantised.
        usual_skew: exponent of Zipf's law that its experts' popularity is taken to follow.

    Raises:
        SpecError: numbers that are out of their ranges or do not fit each other.
    """

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
    num_key_value_heads: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["head", "rotated_head", "full"] | None = None
    attention_sinks: bool = False
    sliding_window: tuple[int | None, ...] = ()
    latent: LatentAttention | None = None
    v_head_dim: int | None = None
    window_heads: WindowHeads | None = None
    query_rank: int | None = None
    further_biases: tuple[Literal["norm", "head"], ...] = ()
    unread_family: str | None = None
    attention_gate: Literal["sigmoid", "head"] | None = None
    unrotated_layers: tuple[int, ...] = ()
    state: StateMixer | None = None
    state_layers: tuple[int, ...] = ()
    indexer: Indexer | None = None
    unindexed_layers: tuple[int, ...] = ()
    shared_choice_layers: tuple[int, ...] = ()
    compressed: CompressedAttention | None = None
    num_streams: int = 1
    mixer_only_layers: tuple[int, ...] = ()
    mlp_only_layers: tuple[int, ...] = ()
    draft: tuple[LayerKind, ...] = ()
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = False
    partial_rotary_factor: float = 1.0
    attention_multiplier: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    hidden_act: Literal["gelu", "silu", "relu2"] = "gelu"
    gated_mlp: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    expert_bias: bool = False
    routing: Routing = field(default_factory=Routing)
    dense_layers: tuple[int, ...] = ()
    intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    shared_expert_gate: bool = False
    num_zero_experts: int = 0
    hash_layers: tuple[int, ...] = ()
    shortcut_experts: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: Dtype = "float32"
    usual_skew: float = DEFAULT_SKEW

    def __post_init__(self) -> None:
        take_fields(self, f"model {self.name}: {{}}".format)
        for part in (
            *("rope_scaling", "latent", "routing", "state", "indexer", "window_heads"),
            "compressed",
        ):
            if getattr(self, part) is not None:
                take_fields(getattr(self, part), f"model {self.name}: {part}: {{}}".format)
        if self.num_experts_per_tok > self.num_routed_experts:
            raise self._error(
                f"num_experts_per_tok is {self.num_experts_per_tok} but there are only "
                f"{self.num_routed_experts} experts"
            )
        if self.hidden_size % 2:
            raise self._error(
                f"hidden_size is {self.hidden_size}; rows of two-byte values must be whole words, "
                "so it must be even"
            )
        self._check_attention()
        self._check_mixers()
        self._check_routing()
        self._check_mlps()

    def _error(self, text: str) -> SpecError:
        return SpecError(f"model {self.name}: {text}")

    def _check_attention(self) -> None:
        latent, scaling = self.latent, self.rope_scaling
        if latent is None and (self.rotary_dim % 2 or not self.rotary_dim):
            share = self.partial_rotary_factor
            raise self._error(
                f"head_dim is {self.head_dim}"
                + (f", of which {self.rotary_dim} are rotated" if share != 1 else "")
                + "; rotary positions need an even one"
            )
        if latent is not None:
            if latent.qk_rope_head_dim % 2:
                raise self._error(
                    f"qk_rope_head_dim is {latent.qk_rope_head_dim}; rotary positions need an even "
                    "one"
                )
            if latent.qk_nope_head_dim + latent.qk_rope_head_dim != self.head_dim:
                raise self._error(
                    f"head_dim is {self.head_dim}; with latent attention it must be "
                    f"qk_nope_head_dim + qk_rope_head_dim = {latent.qk_nope_head_dim} + "
                    f"{latent.qk_rope_head_dim}"
                )
            if self.qkv_bias or self.qk_norm or self.attention_sinks or any(self.sliding_window):
                raise self._error(
                    "latent attention takes no qkv_bias, qk_norm, attention_sinks or sliding_window"
                )
            if self.partial_rotary_factor != 1:
                raise self._error(
                    f"partial_rotary_factor is {self.partial_rotary_factor:g}; with latent "
                    "attention it must be 1"
                )
        for heads in self.all_heads:
            if heads.num % heads.num_kv:
                raise self._error(
                    f"num_key_value_heads is {heads.num_kv}; it must divide the {heads.num} "
                    "attention heads"
                )
        if latent is None and (self.head_dim + self.value_dim) % 2:
            raise self._error(
                f"head_dim is {self.head_dim} and v_head_dim {self.value_dim}; their sum must be "
                "even"
            )
        of_grouped = (self.v_head_dim, self.query_rank, self.window_heads)
        if latent is not None and any(each is not None for each in of_grouped):
            raise self._error("latent attention takes no v_head_dim, query_rank or window_heads")
        if self.sliding_window and len(self.sliding_window) != self.num_hidden_layers:
            raise self._error(
                f"sliding_window has {len(self.sliding_window)} entries; it must have one for each "
                f"of the {self.num_hidden_layers} layers, or none"
            )
        if scaling is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
            raise self._error(
                f"rope_scaling: low_freq_factor is {scaling.low_freq_factor:g}; it must be under "
                f"high_freq_factor, {scaling.high_freq_factor:g}"
            )

    def _check_mixers(self) -> None:
        state = self.state
        if (state is None) != (not self.state_layers):
            raise self._error("state and state_layers need each other")
        if state is not None and state.norm_groups and state.num_heads % state.norm_groups:
            raise self._error(
                f"state: norm_groups is {state.norm_groups}; it must divide the {state.num_heads} "
                "heads"
            )
        if state is not None and state.num_heads % state.num_key_heads:
            raise self._error(
                f"state: num_key_heads is {state.num_key_heads}; it must divide the "
                f"{state.num_heads} heads"
            )
        if self.compressed is not None:
            self._check_compressed(self.compressed)
        layers = ("state", "mixer_only", "mlp_only", "unrotated", "unindexed", "shared_choice")
        for name in (f"{each}_layers" for each in (*layers, "hash")):
            self._check_layers(name, getattr(self, name))
        self._check_indexer()
        if set(self.mlp_only_layers) & {*self.mixer_only_layers, *self.state_layers}:
            raise self._error("mlp_only_layers has layers that have a mixer, or nothing else")
        if set(self.mixer_only_layers) & set(self.dense_layers):
            raise self._error("mixer_only_layers has layers that have a dense MLP")

    def _check_indexer(self) -> None:
        indexer, shared = self.indexer, self.shared_choice_layers
        if indexer is None or self.compressed is not None:
            if shared or self.unindexed_layers:
                raise self._error(
                    "unindexed_layers and shared_choice_layers need an indexer of positions"
                )
            return
        if indexer.by_group != (self.latent is None):
            raise self._error("an indexer is by_group without latent attention, and only there")
        if self.latent is not None and self.latent.q_lora_rank is None:
            raise self._error("an indexer of latent attention needs a q_lora_rank")
        if indexer.by_group and indexer.num_heads != self.num_kv_heads:
            raise self._error(
                f"indexer: num_heads is {indexer.num_heads}; it must be that of keys and values, "
                f"{self.num_kv_heads}"
            )
        if any(self.sliding_window):
            raise self._error("an indexer takes no sliding_window")
        if indexer.topk % indexer.block_size:
            raise self._error(
                f"indexer: block_size is {indexer.block_size}; it must divide topk, {indexer.topk}"
            )
        choices = [self._choice_of_layer(layer) for layer in range(self.num_hidden_layers)]
        first = next((each for each in choices if each is not None), None)
        if first != "own":
            raise self._error("the first layer that an indexer chooses for must have its own")

    def _check_compressed(self, compressed: CompressedAttention) -> None:
        if self.latent is not None or self.state is not None or self.num_kv_heads != 1:
            raise self._error(
                "compressed attention takes neither latent attention nor states, and one head of "
                f"keys; there are {self.num_kv_heads}"
            )
        if len(compressed.layers) != self.num_hidden_layers:
            raise self._error(
                f"compressed: layers has {len(compressed.layers)} entries for "
                f"{self.num_hidden_layers} layers"
            )
        if len(self.sliding_window) != self.num_hidden_layers or None in self.sliding_window:
            raise self._error("compressed attention needs a sliding_window in every layer")
        if (self.indexer is not None) != ("chosen" in compressed.layers):
            raise self._error("an indexer and layers with chosen entries need each other")
        if self.num_attention_heads % compressed.o_groups:
            raise self._error(
                f"o_groups is {compressed.o_groups}; it must divide the "
                f"{self.num_attention_heads} attention heads"
            )

    def _check_layers(self, name: str, layers: tuple[int, ...]) -> None:
        if list(layers) != sorted(set(layers)) or not all(
            0 <= layer < self.num_hidden_layers for layer in layers
        ):
            raise self._error(
                f"{name} is {list(layers)}; it must be rising layer numbers from 0 to "
                f"{self.num_hidden_layers - 1}"
            )

    def _check_routing(self) -> None:
        routing = self.routing
        if routing.router_skew and not routing.router_bias:
            raise SpecError("router_skew is that of the router's bias; set router_bias = true too")
        if self.num_experts % routing.n_group:
            raise self._error(
                f"n_group is {routing.n_group}; it must divide the {self.num_experts} experts"
            )
        size = self.num_experts // routing.n_group
        if routing.topk_group > routing.n_group:
            raise self._error(
                f"topk_group is {routing.topk_group}; it must be from 1 to n_group, "
                f"{routing.n_group}"
            )
        if routing.n_group > 1 and routing.topk_group * size < self.num_experts_per_tok:
            raise self._error(
                f"num_experts_per_tok is {self.num_experts_per_tok} but topk_group groups hold "
                f"only {routing.topk_group} × {size} experts"
            )
        if routing.n_group > 1 and self.num_zero_experts:
            raise self._error(f"n_group is {routing.n_group}; with zero experts it must be 1")
        if routing.n_group > 1 and routing.group_score == "top2_sum" and size < 2:
            raise self._error(
                f"n_group is {routing.n_group} for {self.num_experts} experts; groups compared by "
                "their two best need at least 2 experts each"
            )

    def _check_mlps(self) -> None:
        layers = self.dense_layers
        self._check_layers("dense_layers", layers)
        has_dense = layers or any(kind.mlp == "dense" for kind in self.draft)
        if has_dense and self.intermediate_size < 1:
            raise self._error(
                f"intermediate_size is {self.intermediate_size}; the dense layers need a positive "
                "one"
            )
        if self.swiglu_limit is not None and not self.gated_mlp:
            raise self._error(f"swiglu_limit is {self.swiglu_limit:g}; it needs gated_mlp true")

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        heads = self.num_key_value_heads
        return self.num_attention_heads if heads is None else heads

    def heads_of(self, *, has_window: bool = False) -> Heads:
        """Heads of a layer's attention.

        Args:
            has_window: of a layer with a window.
        """
        if has_window and (own := self.window_heads) is not None:
            return Heads(own.num_heads, own.num_key_value_heads, own.sinks)
        return Heads(self.num_attention_heads, self.num_kv_heads, self.attention_sinks)

    @property
    def all_heads(self) -> tuple[Heads, ...]:
        """Heads of layers without a window, and with one where theirs are others."""
        own = () if self.window_heads is None else (self.heads_of(has_window=True),)
        return self.heads_of(), *own

    @property
    def value_dim(self) -> int:
        """Values of a head that attention gives to its output projection."""
        if self.latent is not None:
            return self.latent.v_head_dim
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def num_routed_experts(self) -> int:
        """Experts that a router chooses from, those that compute nothing too."""
        return self.num_experts + self.num_zero_experts

    @property
    def expert_hidden_size(self) -> int:
        """Width of what experts take and give."""
        return self.moe_latent_size or self.hidden_size

    @property
    def carried_size(self) -> int:
        """Width of a token between layers: of all its residual streams."""
        return self.num_streams * self.hidden_size

    @property
    def own_dtype(self) -> Dtype | None:
        """Number type of its weights for computing; None for float16, which few CPUs compute in."""
        return None if self.dtype == "float16" else self.dtype

    @property
    def attention_size(self) -> int:
        """Width of the queries of all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys, or of the values, of all heads together, without latent attention."""
        return self.num_kv_heads * self.head_dim

    @property
    def attention_output_size(self) -> int:
        """Width of what attention gives to its output projection."""
        return self.num_attention_heads * self.value_dim

    @property
    def rotary_dim(self) -> int:
        """Rotated values of a head: the first ones, with latent attention the last."""
        if self.latent is not None:
            return self.latent.qk_rope_head_dim
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def softmax_scale(self) -> float:
        """Factor of attention's dot products."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        mscale = 1.0 if self.latent is None else self.latent.mscale
        return float(self.head_dim**-0.5 * mscale * mscale)

    @property
    def hidden_norm_eps(self) -> float:
        """Epsilon that norms of hidden states add to the mean of the squares.

        Hidden states are kept divided by `residual_multiplier`, so that what is added to them
        needs no factor: x / √(mean(x²) + eps) is the same of x / r with eps / r².
        """
        return self.rms_norm_eps / self.residual_multiplier**2

    def window_of_layer(self, layer: int) -> int | None:
        """Latest positions that a token of a layer sees, its own included; None for all."""
        return self.sliding_window[layer] if self.sliding_window else None

    def mixing_of_layer(self, layer: int) -> Mixing | None:
        """How a layer mixes tokens; None where it has an MLP alone."""
        if layer in self.mlp_only_layers:
            return None
        if layer in self.state_layers:
            return Mixing("state")
        entries = None if self.compressed is None else self.compressed.layers[layer]
        choice = self._choice_of_layer(layer)
        return Mixing("attention", self.window_of_layer(layer), choice, entries)

    def _choice_of_layer(self, layer: int) -> Literal["own", "shared"] | None:
        without = (*self.unindexed_layers, *self.state_layers, *self.mlp_only_layers)
        if self.indexer is None or self.compressed is not None or layer in without:
            return None
        return "shared" if layer in self.shared_choice_layers else "own"

    def kind_of_layer(self, layer: int) -> LayerKind:
        """A layer's mixer and MLP."""
        mlp: Literal["experts", "dense", "none"] = "experts"
        if layer in self.mixer_only_layers:
            mlp = "none"
        elif layer in self.dense_layers:
            mlp = "dense"
        return LayerKind(self.mixing_of_layer(layer), mlp, layer in self.hash_layers)

    @property
    def draft_kinds(self) -> tuple[LayerKind, ...]:
        """Layers that a draft passes, in turn: its own, or one more like the last."""
        return self.draft or (self.kind_of_layer(self.num_hidden_layers - 1),)

    def with_draft(self) -> "ModelConfig":
        """The model whose last layers are those of a draft, as ranks that draft hold it."""
        num, kinds = self.num_hidden_layers, self.draft_kinds
        mixings = [kind.mixing for kind in kinds]

        def and_those(layers: tuple[int, ...], has: list[bool]) -> tuple[int, ...]:
            return *layers, *(num + place for place, each in enumerate(has) if each)

        compressed = self.compressed
        if compressed is not None:
            entries = (None if mixing is None else mixing.entries for mixing in mixings)
            compressed = replace(compressed, layers=(*compressed.layers, *entries))
        choices = [
            mixing.choice if mixing is not None and mixing.kind == "attention" else "none"
            for mixing in mixings
        ]
        sees_all = [choice is None and self.indexer is not None for choice in choices]
        windows = (
            *(self.sliding_window or (None,) * num),
            *(None if mixing is None else mixing.window for mixing in mixings),
        )
        return replace(
            self,
            num_hidden_layers=num + len(kinds),
            sliding_window=windows if any(windows) else (),
            state_layers=and_those(self.state_layers, [of == Mixing("state") for of in mixings]),
            mlp_only_layers=and_those(self.mlp_only_layers, [of is None for of in mixings]),
            mixer_only_layers=and_those(
                self.mixer_only_layers, [kind.mlp == "none" for kind in kinds]
            ),
            dense_layers=and_those(self.dense_layers, [kind.mlp == "dense" for kind in kinds]),
            unindexed_layers=self.unindexed_layers
            if compressed is not None
            else and_those(self.unindexed_layers, sees_all),
            shared_choice_layers=and_those(
                self.shared_choice_layers, [choice == "shared" for choice in choices]
            ),
            compressed=compressed,
        )

    @property
    def moe_layers(self) -> list[int]:
        """The layers with experts."""
        return [layer for layer in range(self.num_hidden_layers) if not self.is_dense(layer)]

    def is_dense(self, layer: int) -> bool:
        """True if a layer has no router and experts."""
        return layer in self.dense_layers or layer in self.mixer_only_layers

    def with_overrides(self, **overrides: Any) -> "ModelConfig":
        """The model with some fields replaced."""
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
    # Heads, experts and vocabulary in the paper's proportions, 1/8 as wide; the hidden states alone
    # 1/128: they decide what dispatch sends for what an expert computes (`comparison.assumptions`).
    "paper-small": replace(
        _PAPER,
        name="paper-small",
        hidden_size=64,
        head_dim=64,
        moe_intermediate_size=4096,
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
