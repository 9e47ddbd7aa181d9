"""Fields that a config.json leaves out mean what the installed transformers' classes say."""

import copy
import dataclasses

import pytest
import transformers

from cli.screen import refusing
from expertlane.errors import SpecError
from expertlane.spec.from_hf import from_hf
from expertlane.spec.hf_config import FAMILIES
from spec.reference import their_config

# Read as the code published with the checkpoint does.
_NO_CLASS = {"step3_text", "bailing_moe_v2_5", "bailing_moe_linear"}
_OF_FAMILY = {
    name: type(their_config({"model_type": name})) for name in FAMILIES if name not in _NO_CLASS
}
_CLASSES, _PLANNED = (
    {name: cls for name, cls in _OF_FAMILY.items() if FAMILIES[name].is_planned_only is is_planned}
    for is_planned in (False, True)
)
DEFAULTS = {name: family.defaults for name, family in FAMILIES.items()}
NUM_EXPERTS = {name: family.num_experts for name, family in FAMILIES.items()}
# Fields that no class declares; without one, what the family computes without.
_UNDECLARED = {
    "architectures",
    "attn_type_list",
    "model_type",
    "moe_layer_freq",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "qk_norm_type",
    "quantization_config",
    "rotary_dim",
    "scoring_func",
    "shared_intermediate_size",
    "text_config",
    "use_qk_norm",
    "use_routing_bias",
}
# One spelling stands for all; the last is what the class itself calls it.
_SPELLINGS = (
    ("torch_dtype", "dtype"),
    ("rope_scaling", "rope_parameters"),
    ("num_nextn_predict_layers", "num_mtp_layers"),
)
_FEW = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
# What a config.json has to say, since no default can be computed.
_NEEDED = {
    "glm4_moe": {"head_dim": 128},  # else 21 of 42 values would be rotated
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 1},
}
_NULL_IS_LEFT_OUT = (
    *("clip_qkv", "head_dim", "layer_types", "mlp_layer_types", "mlp_only_layers"),
    *("rope_parameters", "use_bias"),
)
# Where fields are read only if others say so.
_VARIANTS = {
    "qwen2_moe": {"use_sliding_window": True},
    "qwen3_moe": {"use_sliding_window": True, "mlp_only_layers": [0]},
    "deepseek_v2": {
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
    },
}


def _base(family):
    """The least that a config.json of a family says."""
    return {"model_type": family} | _NEEDED.get(family, {})


class _Recorded(dict):
    """Remembers which keys were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = set()

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)


def _theirs(family):
    """Every declared default of a family; positions' as the class makes them of None."""
    cls = _CLASSES[family]
    declared = {each.name: each.default for each in dataclasses.fields(cls)}
    rope = dict(cls().rope_parameters)
    rope.pop("partial_rotary_factor", None)  # no field; compared where both read a config
    theta = rope.pop("rope_theta")
    is_plain = rope == {"rope_type": "default"}
    return declared | {"rope_theta": theta, "rope_parameters": None if is_plain else rope}


def _outcome(config):
    """The model, or that it is refused."""
    try:
        return from_hf(config)
    except SpecError:
        return SpecError


def _spelled_out(family):
    """All defaults as a config.json would have them, and what makes the others be read."""
    fields = {key: value for key, value in _theirs(family).items() if key in DEFAULTS[family]}
    return fields | _base(family) | _VARIANTS.get(family, {})


def _asked(family):
    config = _Recorded(_spelled_out(family) | {"num_experts_per_tok": 4})
    from_hf(config)
    return config.asked


def _own_names(key):
    """All spellings of a field."""
    return next((group for group in _SPELLINGS if key in group), (key,))


@pytest.mark.parametrize("family", _CLASSES)
def test_the_table_is_transformers_own(family):
    theirs = _theirs(family)
    assert DEFAULTS[family] == {key: theirs[key] for key in DEFAULTS[family]}


@pytest.mark.parametrize("family", _PLANNED)
def test_the_table_of_planned_families_is_transformers_own(family):
    cls, known = _PLANNED[family], FAMILIES[family]
    made, theirs_of = cls(), {ours: theirs for theirs, ours in known.spellings.items()}
    declared = {each.name: each.default for each in dataclasses.fields(cls)}
    for key, value in known.defaults.items():
        if key in ("rope_theta", "rope_interleave"):  # as code of the class has them
            assert value == getattr(made, "rope_parameters", {}).get(key, value)
        elif key == "num_hidden_layers":
            assert value == made.num_hidden_layers
        elif key == "partial_rotary_factor":
            parameters = made.rope_parameters["full_attention"]
            assert (value, known.defaults["rope_theta"]) == (
                parameters[key],
                parameters["rope_theta"],
            )
        elif key == "first_k_dense_replace" and key not in declared:
            assert value == made.mlp_layer_types.count("dense")
        elif key in declared:
            assert value == declared[key], key
        elif key != "rope_parameters":
            assert value == declared[theirs_of[key]], key
    from_hf({"model_type": family, "hybrid_override_pattern": "ME*"}, weights=False)


@pytest.mark.parametrize("family", _CLASSES)
def test_names_of_the_number_of_experts_are_transformers_own(family):
    cls, names = _CLASSES[family], NUM_EXPERTS[family]
    mapped = [name for pair in cls.attribute_map.items() for name in pair]
    mapped = [name for name in mapped if "experts" in name and "per_tok" not in name]
    own = next(name for name in names if name in DEFAULTS[family])
    assert set(names) == {*mapped, own}
    for name in names:
        config = cls(**{name: 16, "num_experts_per_tok": 2})
        assert [getattr(config, other) for other in names] == [16] * len(names) or name == own
        assert from_hf(_base(family) | {name: 16} | _FEW).num_experts == 16
    both = {name: 8 * (1 + place) for place, name in enumerate(names)}
    taken = getattr(cls(**both), names[0])
    assert from_hf(_base(family) | both | _FEW).num_experts == taken


@pytest.mark.parametrize("family", _CLASSES)
def test_the_table_has_every_field_that_is_read_and_declared(family):
    declared = {each.name for each in dataclasses.fields(_CLASSES[family])}
    for key in _asked(family) - _UNDECLARED - set(NUM_EXPERTS[family]) - {"dtype", "torch_dtype"}:
        name = _own_names(key)[-1]
        if name in declared or key == "rope_theta":
            assert name in DEFAULTS[family], name
    assert any(name in DEFAULTS[family] for name in NUM_EXPERTS[family])


@pytest.mark.parametrize("family", _CLASSES)
def test_a_field_left_out_is_as_if_it_were_spelled_out(family):
    spelled = _spelled_out(family)
    theirs = _theirs(family)
    num_compared = 0
    for key in sorted(_asked(family) - {"model_type", "architectures"}):
        per_tok = FAMILIES[family].num_experts_per_tok
        spellings = (_own_names(key), NUM_EXPERTS[family], per_tok)
        names = {name for group in spellings if key in group for name in group}
        left_out = {name: value for name, value in spelled.items() if name not in names}
        name = next((name for name in names if name in theirs), None)
        if name is None:
            assert key in _UNDECLARED or key in ("head_dim", "mlp_bias", "clip_qkv", "topk_method")
            continue
        assert _outcome(left_out) == _outcome(left_out | {name: theirs[name]}), key
        num_compared += 1
    assert num_compared >= 15


@pytest.mark.parametrize("family", _CLASSES)
def test_both_spellings_of_positions_and_types(family):
    """transformers 4: at the top level; 5: in `rope_parameters`. Each with a field left out."""
    base = _base(family) | {"num_experts_per_tok": 2}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    theta = {"rope_theta": 5e5}
    assert from_hf(base | {"rope_parameters": yarn | theta}) == from_hf(
        base | {"rope_scaling": yarn} | theta
    )
    assert from_hf(base | {"rope_parameters": yarn}) == from_hf(base | {"rope_scaling": yarn})
    cls = _CLASSES[family]
    assert from_hf(base | {"rope_parameters": yarn}).rope_theta == cls.default_theta
    assert from_hf(base | theta).rope_theta == cls(**theta).rope_parameters["rope_theta"] == 5e5
    for null in ({"rope_scaling": None}, {"rope_parameters": None}):
        assert from_hf(base | null) == from_hf(base)
    types = {"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}
    types += ({"dtype": None, "torch_dtype": "bfloat16"},)
    assert {from_hf(base | each).dtype for each in types} == {"bfloat16"}


def _takes_null(family, key):
    try:
        _CLASSES[family](**{key: None})
    except Exception:  # huggingface_hub's own
        return False
    return True


@pytest.mark.parametrize("family", _CLASSES)
def test_null_is_what_transformers_makes_of_it(family):
    """Compared by what the class holds once it is made."""
    base = _base(family) | _VARIANTS.get(family, {}) | {"num_experts_per_tok": 4}
    num_taken = 0
    for key in DEFAULTS[family]:
        if not _takes_null(family, key) or key == "moe_k":  # which base has by its other name
            continue
        num_taken += 1
        model = _outcome(base | {key: None})
        theirs = _CLASSES[family](**(base | {key: None}))
        if key in _NULL_IS_LEFT_OUT:
            assert model == from_hf({name: base[name] for name in base if name != key})
        elif key == "num_key_value_heads":
            assert model.num_kv_heads == theirs.num_attention_heads
        elif key == "q_lora_rank":
            assert model.latent.q_lora_rank is theirs.q_lora_rank is None
        elif key == "norm_topk_prob":
            assert model.routing.norm_topk_prob is bool(theirs.norm_topk_prob) is False
        elif key == "rope_interleave":
            assert model.rope_interleave is bool(theirs.rope_interleave) is False
        elif key == "eos_token_id":
            assert (model.eos_token_ids, theirs.eos_token_id) == ((), None)
        elif key == "sliding_window" and family in ("mixtral", "qwen3_moe", "dots1"):
            assert (model.sliding_window, theirs.sliding_window) == ((), None)
        else:  # theirs cannot be made, or cannot run
            assert model is SpecError, key
    assert num_taken >= 2


def test_half_of_a_head_is_rotated_if_glm_does_not_say():
    base = {"model_type": "glm4_moe", "head_dim": 128}
    cases = (
        {},
        {"partial_rotary_factor": 0.25},
        {"rope_parameters": {"partial_rotary_factor": 0.75}},
        {"rope_parameters": {"partial_rotary_factor": 0.75}, "partial_rotary_factor": 0.25},
        {"rope_scaling": None, "partial_rotary_factor": 1.0},
    )
    for case in cases:
        theirs = transformers.Glm4MoeConfig(**(base | copy.deepcopy(case))).rope_parameters
        assert from_hf(base | case).partial_rotary_factor == theirs["partial_rotary_factor"], case


def test_minimax_m2_names_how_many_values_are_rotated():
    base = {"model_type": "minimax_m2", "head_dim": 128}
    for case in ({}, {"rotary_dim": 64}, {"rotary_dim": 64, "partial_rotary_factor": 0.25}):
        theirs = transformers.MiniMaxM2Config(**(base | case)).rope_parameters
        expected = theirs.get("partial_rotary_factor", 1.0)
        assert from_hf(base | case).partial_rotary_factor == expected, case


def test_without_shared_experts_deepseek_v3_has_one():
    model = from_hf({"model_type": "deepseek_v3", "moe_intermediate_size": 32})
    assert model.shared_expert_intermediate_size == 32


def test_windows_that_a_config_does_not_size():
    base = {"use_sliding_window": True, "num_hidden_layers": 2}
    assert from_hf({"model_type": "qwen3_moe"} | base).sliding_window == (4096, 4096)
    assert from_hf({"model_type": "qwen2_moe"} | base).sliding_window == (4096, None)


def test_sliding_layers_of_qwen2_moe_without_windows_are_refused():
    config = {"model_type": "qwen2_moe", "num_hidden_layers": 2}
    types = {"layer_types": ["sliding_attention", "full_attention"]}
    with refusing("mine layer_types sliding_attention use_sliding_window false"):
        from_hf(config | types | {"use_sliding_window": False}, "mine")
    with refusing("layer_types 3 list"):
        from_hf(config | {"layer_types": 3})
    # transformers 5 sees nothing through such a window: not even the token itself.
    assert transformers.Qwen2MoeConfig(**types, num_hidden_layers=2).sliding_window == 0
