"""The range of every number that is read: one table for files, options and Python.

A number is looked up by its field's name. Limits are far beyond any model or cluster that exists,
yet low enough that nothing overflows 64 bits and no list or array exceeds a machine's memory.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from expertlane.errors import SpecError, UserError, did_you_mean

MAX_TOKENS_OF_A_RUN = 2**28  # prompts and outputs together; they are held in memory
MAX_RANKS = 1_000_000
MAX_PARAMS = 10**14
# Of expert popularity, of models whose family has no published statistics: the median over all
# models that have some (calibration/popularity.py). Bounds go from the flattest family to requests
# of one narrow kind.
DEFAULT_SKEW = 0.45
SKEW_BOUNDS = (0.15, 1.0)
# Deviation of the logarithm of an expert's popularity since tokens that it was placed by, over the
# exponent: as much as DeepSeek-R1 is uneven after it was balanced (calibration/popularity.py).
DRIFT = 0.13
# How alike tokens of one prompt choose, a rank correlation (`PowerLawRouting`): with it the load of
# one document is as uneven as published (calibration/popularity.py).
LIKENESS = 0.19
DEFAULT_REPEAT = 7  # fewer give intervals over 5 % wide (docs/log.md)
SHOWN_LENGTH = 60  # of a wrong value, in a message
REFUSED = "refused"  # pydantic's type of an error of a class itself
_SHOWN_LEVELS = 3  # of lists in lists that are shown whole
_SHOWN_BITS = 128  # of a whole number that is written out


class Strict:
    """Base of what pydantic reads: no unknown key, no value of another type.

    What the class itself refuses, in `__post_init__`, becomes an error of pydantic's, which knows
    where in the file it is.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import PydanticCustomError

        def check(made: Any) -> Any:
            try:
                made.__post_init__()
            except UserError as error:
                raise PydanticCustomError(REFUSED, "{text}", {"text": str(error)}) from None
            return made

        schema = handler(source)
        if not hasattr(cls, "__post_init__"):
            return schema
        return _followed_by(check, schema | {"post_init": False})


@dataclass(frozen=True)
class Valid:
    """A check of a field's value beside its type (`Annotated`).

    Attributes:
        test: whether a value, which has the field's type, is valid.
        wanted: description of valid values, for a message.
    """

    test: Callable[[Any], bool]
    wanted: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import PydanticCustomError

        def check(value: Any) -> Any:
            if not self.test(value):
                raise PydanticCustomError("invalid", "{wanted}", {"wanted": self.wanted})
            return value

        return _followed_by(check, handler(source))


def _followed_by(check: Callable[[Any], Any], schema: Any) -> Any:
    """A schema of pydantic's with a check after it.

    It takes over the schema's reference, by which pydantic finds it for other fields of a class.
    """
    from pydantic_core import core_schema

    inner = {key: value for key, value in schema.items() if key != "ref"}
    return core_schema.no_info_after_validator_function(check, inner, ref=schema.get("ref"))


Counted = Annotated[int, Valid(lambda number: number > 0, "a whole number above 0")]


@dataclass(frozen=True)
class Range:
    """The valid range of a number.

    Attributes:
        low, high: smallest and largest valid number.
        is_whole: whether it must be a whole number.
        is_above: whether `low` itself is not valid.
    """

    low: float
    high: float
    is_whole: bool = True
    is_above: bool = False

    def take(self, name: str, value: object, verb: str = "is") -> int | float:
        """`value` as an int, or a float where fractions are valid.

        Raises:
            SpecError: it is no number, or out of range; the text names it.
        """
        number = self._number(value)
        if number is None:
            raise SpecError(f"{name} {verb} {shown(value)}; it must be {self}")
        return number

    def parse(self, text: str) -> int | float | None:
        """The number in a text; None where it is none or out of range."""
        text = text.strip()
        try:
            if not self.is_whole:
                return self._number(float(text))
            is_number = text.isascii() and text.isdigit() and len(text) <= len(str(self.high))
            return self._number(int(text)) if is_number else None
        except ValueError:
            return None

    def _number(self, value: object) -> int | float | None:
        if isinstance(value, bool) or not isinstance(value, Integral if self.is_whole else Real):
            return None
        try:
            number: int | float = int(value) if self.is_whole else float(value)  # type: ignore[call-overload]
        except (OverflowError, ValueError):  # of a whole number as a float; of NaN as a whole one
            return None
        is_low_enough = number > self.low if self.is_above else number >= self.low
        return number if is_low_enough and number <= self.high else None

    def __str__(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        if self.is_above:
            return f"{kind} above {_end(self.low)}, at most {_end(self.high)}"
        return f"{kind}, {_end(self.low)} to {_end(self.high)}"


_whole = Range
_number = partial(Range, is_whole=False)
_above = partial(Range, is_whole=False, is_above=True)

_POSITIONS = _whole(1, 2**24)
_TOKEN = _whole(0, 2**31 - 1)

_RANGES: dict[str, Range] = {  # by the names of the fields, parted by spaces
    # layout and cluster
    "replicas pp dp tp ep dcp num_devices": _whole(1, MAX_RANKS),
    "ranks_per_node": _whole(0, MAX_RANKS),
    # deployment
    "num_micro_batches": _whole(1, 1024),
    "num_redundant_experts": _whole(0, 4096),
    "rebalance_steps": _whole(0, 10**9),
    "num_slots": _whole(1, 4096),
    "ranks ep_ranks": _whole(1, 1024),  # that a command starts or balances for
    # workload and load
    "num_sequences": _whole(1, 2**20),
    "prompt_len output_len": _POSITIONS,
    "seed": _whole(0, 2**64 - 1),
    "num_requests batch num_prefixes": _whole(1, 10**6),
    "prefix_len": _whole(0, 2**24),
    "num_warm_up": _whole(0, 10**6),
    "rate": _number(1e-3, 1e6),
    "limit_s": _above(0, 1e9),  # of an SLO, in its unit
    "price": _above(0, 1e6),
    "skew usual_skew": _number(0, 10),
    "threshold": _number(0, 1e3),
    "link_scale": _number(1e-6, 1e9),
    "repeat rounds": _whole(1, 1000),
    "min_time": _number(0, 1e6),
    "within": _number(1, 1e6),
    "mtp_acceptance": _number(0, 1),
    # engine
    "timeout_s": _above(0, 1e6),
    "max_model_len": _POSITIONS,
    "num_blocks": _whole(1, 2**25),
    "kv_tokens": _whole(1, 2**40),
    "state_blocks": _whole(0, 2**25),
    "block_size": _whole(1, 2**16),
    "max_num_batched_tokens": _whole(1, MAX_TOKENS_OF_A_RUN),
    "max_num_seqs": _whole(1, 2**20),
    "prompt_wait_steps": _whole(0, 10_000),
    "aging_steps": _whole(1, 10**9),
    "priority": _whole(-(2**31), 2**31 - 1),
    # server
    "port": _whole(0, 65535),
    "max_num_queued": _whole(1, 10**6),
    "request_timeout_s budget_s": _above(0, 1e6),
    "drain_s reconnect_s rejoin_s": _number(0, 1e6),
    "watch_s": _number(0, 600),
    "after_s observe_s hang_s health_s stall_s": _number(0.1, 1e5),
    "pid": _whole(2, 2**22),
    "rank": _whole(0, MAX_RANKS),
    # sampling
    "temperature": _number(0, 1e9),
    "top_k": _whole(0, 2**31 - 1),
    "top_p": _above(0, 1),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(1e-6, 1e6),  # beyond, logits would grow to infinity
    "presence_penalty frequency_penalty": _number(-2, 2),
    "max_tokens": _whole(1, 2**31 - 1),
    "min_tokens": _whole(0, 2**31 - 1),
    "bias": _number(-100, 100),  # of a logit
    "logprobs prompt_logprobs": _whole(0, 20),
    "stop_token_ids shown_token_ids": _TOKEN,
    # model; also under the other names that a config.json has for them
    "num_hidden_layers": _whole(1, 1024),
    "hidden_size kv_lora_rank q_lora_rank moe_latent_size": _whole(1, 2**20),
    "query_rank share_q_dim o_lora_rank": _whole(1, 2**20),
    "o_groups": _whole(1, 2**14),
    "hc_mult num_streams": _whole(1, 64),
    "chosen_rate all_rate compressed_sparse_attention heavily_compressed_attention": _POSITIONS,
    "num_attention_groups num_sliding_attention_heads": _whole(1, 2**14),
    "swa_num_attention_heads swa_num_key_value_heads": _whole(1, 2**14),
    "share_expert_dim share_expert_dims": _whole(0, 2**24),
    "moe_topk moe_top_k": _whole(1, 4096),
    "moe_router_scaling_factor alpha": _above(0, 1e6),
    "moe_layers_enum": _whole(0, 1023),
    "hybrid_layer_pattern": _whole(0, 1),
    "sliding_window_size": _whole(1, 2**31 - 2),
    "long_mscale": _above(0, 1e3),
    "num_attention_heads num_key_value_heads": _whole(1, 2**14),
    "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim": _whole(1, 2**16),
    "num_experts num_local_experts n_routed_experts moe_num_experts": _whole(1, 4096),
    "num_experts_per_tok num_experts_per_token moe_k moe_topk": _whole(1, 4096),
    "interleave_moe_layer_step moe_layer_interval": _whole(1, 1024),
    "no_rope_layer_interval full_attention_interval": _whole(1, 1024),
    "num_nextn_predict_layers num_mtp_layers": _whole(0, 1024),
    "n_group topk_group": _whole(1, 4096),
    "n_shared_experts moe_num_shared_experts num_shared_experts": _whole(0, 4096),
    "linear_num_key_heads linear_num_value_heads linear_num_heads": _whole(1, 2**14),
    "linear_key_head_dim linear_value_head_dim linear_head_dim": _whole(1, 2**16),
    "mamba_n_heads mamba_num_heads mamba_n_groups n_groups index_n_heads": _whole(1, 2**14),
    "mamba_d_state mamba_d_head mamba_head_dim ssm_state_size index_head_dim": _whole(1, 2**16),
    "linear_conv_kernel_dim mamba_d_conv short_conv_kernel_size": _whole(1, 256),
    "mamba_expand": _whole(1, 64),
    "mamba_dt_rank": _whole(1, 2**20),
    "layer_group_size": _whole(1, 1024),
    "num_layers": _whole(1, 512),
    "num_zero_experts zero_expert_num": _whole(0, 4096),
    "group_norm_size norm_groups": _whole(1, 2**14),
    "attn_layer_period expert_layer_period": _whole(1, 1024),
    "attn_layer_offset expert_layer_offset": _whole(0, 1023),
    "mamba_chunk_size index_topk": _whole(1, 2**24),
    "index_block_size sparse_block_size": _whole(1, 2**16),
    "index_topk_blocks sparse_topk_blocks": _whole(1, 2**16),
    "index_local_blocks sparse_local_block": _whole(0, 2**16),
    "sparse_num_index_heads": _whole(1, 2**14),
    "sparse_index_dim rotary_dim": _whole(1, 2**16),
    "sparse_attention_freq sparse_disable_index_value": _whole(0, 1),
    "index_topk_freq index_skip_topk_offset": _whole(0, 1024),
    "moe_intermediate_size vocab_size": _whole(1, 2**24),
    "intermediate_size intermediate_size_mlp": _whole(0, 2**24),
    "shared_expert_intermediate_size shared_intermediate_size": _whole(0, 2**24),
    "moe_shared_expert_intermediate_size": _whole(0, 2**24),
    "max_position_embeddings original_max_position_embeddings": _POSITIONS,
    "rope_theta": _above(1, 1e12),
    "rms_norm_eps norm_eps": _above(0, 1),
    "attention_chunk_size sliding_window decoder_sparse_step": _whole(1, 2**31 - 1),
    "dense_layers mlp_only_layers mixer_only_layers": _whole(0, 1023),
    "state_layers unrotated_layers no_rope_layers moe_layers hash_layers": _whole(0, 1023),
    "unindexed_layers shared_choice_layers": _whole(0, 1023),
    "num_heads num_key_heads": _whole(1, 2**20),  # of mixers
    "step_rank": _whole(0, 2**20),
    "key_dim value_dim chunk_size topk": _whole(1, 2**24),
    "conv_kernel": _whole(0, 256),
    "first_k_dense_replace num_hash_layers": _whole(0, 1024),
    "eos_token_ids eos_token_id": _TOKEN,
    "mscale mscale_all_dim": _number(0, 1e3),
    "swiglu_limit swiglu_alpha routed_scaling_factor": _above(0, 1e6),
    "factor low_freq_factor high_freq_factor beta_fast beta_slow": _above(0, 1e6),
    "attention_factor": _above(0, 1e3),
    "partial_rotary_factor": _above(0, 1),
    "attention_multiplier embedding_multiplier residual_multiplier logits_scaling": _above(0, 1e6),
    "router_skew": _number(0, 100),
    # placement files
    "layer": _whole(0, 1023),
    # profiles
    "memory_bytes": _number(1, 1e18),
    "memory_bytes_per_s bytes_per_s flops_per_s": _number(1, 1e24),
    "term": _number(0, 1e12),
    "correction": _number(1e-9, 1e9),
    "knot": _number(1e-9, 1e24),
    "wider": _number(1, 1e3),
}
RANGES = {name: allowed for names, allowed in _RANGES.items() for name in names.split()}
ANY_WHOLE = _whole(-(2**31), 2**31 - 1)  # for names that the table lacks
ANY_NUMBER = _number(-1e30, 1e30)


def take(name: str, value: object, shown_as: str | None = None) -> Any:
    """`value` as an int or float, checked against the range of a field.

    Args:
        shown_as: its name in messages; the field's name if None.

    Raises:
        SpecError: it is out of its range.
    """
    return RANGES[name].take(shown_as or name, value)


def take_option(name: str, value: object) -> Any:
    """`take` for a command's option `--field-name`; None stays None."""
    field = name.removeprefix("--").replace("-", "_")
    return None if value is None else take(field, value, name)


def take_word(name: str, value: object, valid: Sequence[str]) -> Any:
    """`value`, if it is one of the valid words.

    Raises:
        SpecError: it is none of them; the text names it.
    """
    if not isinstance(value, str) or value not in valid:
        hint = did_you_mean(value, valid) if isinstance(value, str) else ""
        raise SpecError(
            f"{name} is {shown(value)}; valid: {', '.join(valid)}{hint and f' ({hint})'}"
        )
    return value


def take_flag(name: str, value: object) -> bool:
    """`value`, if it is true or false.

    Raises:
        SpecError: it is neither; the text names it.
    """
    if not isinstance(value, bool):
        raise SpecError(f"{name} is {shown(value)}; it must be true or false")
    return value


def take_fields(instance: Any, name: Callable[[str], str] = str) -> None:
    """Check all fields of a dataclass that have a range, are flags or one of several words.

    Ints and floats replace other numbers. None is valid where the field's type says so; in a
    tuple, every item but None is checked.

    Args:
        name: gives a field's name in messages.

    Raises:
        SpecError: one is out of its range, no flag, or none of the words.
    """
    for field in fields(instance):
        value, called = getattr(instance, field.name), name(field.name)
        kinds = _kinds(field.type)
        if value is None and NoneType in kinds:
            continue
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        if words and bool not in kinds:
            take_word(called, value, words)
        elif bool in kinds and not words:
            take_flag(called, value)
        if field.name not in RANGES:
            continue
        allowed = RANGES[field.name]
        if isinstance(value, tuple) and any(get_origin(kind) is tuple for kind in kinds):
            taken: object = tuple(
                None if item is None else allowed.take(called, item, "holds") for item in value
            )
        else:
            taken = allowed.take(called, value)
        object.__setattr__(instance, field.name, taken)


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The types of a union; else the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


_JOINED = re.compile(r"([a-z]+)[ :_-]*([0-9]+)")  # a name and its number without `=`


def parse_sizes(
    what: str, unknown: str, text: str, valid: Sequence[str], told: Sequence[str] = ()
) -> dict[str, int]:
    """Read `tp=8,pp=2`: names with whole numbers in their ranges, none twice; perhaps none at all.

    Names may be in capitals.

    Args:
        what, unknown: names in messages: of the whole, and of a name that is not valid.
        told: valid names that an error lists; all if empty.

    Raises:
        SpecError: it breaks one of these rules.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        given, _, value = (piece.strip() for piece in part.partition("="))
        name = given.lower()
        if name not in valid:
            listed = told or valid
            hint = _with_equals(part, listed) or did_you_mean(given, listed)
            raise SpecError(
                f"{what}: {unknown} {shown(given)}; valid: {', '.join(listed)}"
                f"{hint and f' ({hint})'}"
            )
        if name in sizes:
            raise SpecError(f"{what}: {name} is given twice")
        size = RANGES[name].parse(value)
        if size is None:
            raise SpecError(f"{what}: {name} is {shown(value)}; it must be {RANGES[name]}")
        sizes[name] = int(size)
    return sizes


def _with_equals(part: str, valid: Sequence[str]) -> str:
    """`did you mean tp=8?` for `tp8`; empty where it is nothing like that."""
    part = part.lower()
    if len(part) > SHOWN_LENGTH:
        return ""
    found = _JOINED.findall(part)
    if _JOINED.sub("", part).strip() or not all(name in valid for name, _ in found):
        return ""
    return f"did you mean {','.join(map('='.join, found))}?" if found else ""


def shown(value: object) -> str:
    """A wrong value on one line, cut when long."""
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        # Python writes out no number of more than 4,300 digits.
        return f"a number of about {1 + int(value.bit_length() * 0.30103):,} digits"
    item = getattr(value, "item", None)  # of numpy's numbers
    if item is not None and getattr(value, "ndim", 1) == 0:
        value = item()
    text = repr(_beginning(value))
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…"


def _beginning(value: Any, depth: int = 0) -> Any:
    """The part of a value that is shown: it may have millions of parts, nested too."""
    if isinstance(value, str | bytes):
        return value[: 2 * SHOWN_LENGTH]
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        return ...
    if type(value) not in (list, tuple, dict):
        return value
    if depth > SHOWN_LENGTH:
        return ...
    most = SHOWN_LENGTH if depth < _SHOWN_LEVELS else 1
    cut = [...] if len(value) > most else []
    if type(value) is dict:
        return {key: _beginning(part, depth + 1) for key, part in islice(value.items(), most)}
    parts = [*(_beginning(part, depth + 1) for part in value[:most]), *cut]
    return tuple(parts) if type(value) is tuple else parts


def _end(number: float) -> str:
    if number == 2**64 - 1:
        return "2**64 - 1"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.12g}"
