"""A model's folder, local or from the Hugging Face hub, and its `config.json`.

Of the configuration: the family, the quantisation, and typed values.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from expertlane.errors import SpecError, UserError, did_you_mean
from expertlane.spec.files import CONFIG_BYTES, read_json_object
from expertlane.spec.model import PRESETS
from expertlane.spec.ranges import ANY_NUMBER, ANY_WHOLE, DEFAULT_SKEW, RANGES, Range, shown

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
        hint = did_you_mean(model, PRESETS)
        raise UserError(
            f"model {model!r}: there is no such folder, and it is no hub id such as "
            f"'mistralai/Mixtral-8x7B-v0.1'{hint and '; '}{hint}"
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


_KIND_NAMES: dict[type, str] = {bool: "true or false", str: "a string"}

_MODELOPT = "hf_quant_config.json"
MXFP4_BLOCK = 32  # values that share a scale
_E4M3 = ("e4m3", "float8_e4m3fn")
# By type of weights, how NVIDIA's ModelOpt, compressed-tensors and others call it.
_NAMES_OF_TYPE = {
    "float8": {"fp8", "fbgemm_fp8", "float-quantized", "fp8_pb_wo", "fp8_per_channel_per_token"},
    "nvfp4": {"nvfp4", "nvfp4-pack-quantized", "nvfp4_awq"},
    "mxfp4": {"mxfp4"},
    "int4": {"int4_awq", "w4a16", "w4a16_awq"},
}
_WEIGHT_ONLY = ("auto-round", "awq", "gptq")  # methods that tell `bits`

T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True)
class Family:
    """A model family: names of fields in its `config.json`, and their defaults.

    Attributes:
        num_experts: names of the field for the number of experts; where a config has several, the
            first counts.
        num_experts_per_tok: likewise for the number of experts that a token goes to.
        wrappers: other architectures of this family, or whose language model, in `text_config`, is
            of it; their weights have names of their own, which are not read.
        like: another family, whose language model this one has in `text_config`; what is not said
            here is as there.
        has_drafts: published checkpoints have layers for multi-token prediction, which `plan` and
            `simulate` price.
        calls, thoughts: forms of tool calls and of reasoning in the chat templates of published
            checkpoints, by the names of `server/call_forms.py`.
        skew: `usual_skew` of `ModelConfig`, by calibration/popularity.py.
        mixers: what its layers mix tokens by, in words.
        is_planned_only: the engine cannot run it.
        hidden_acts: activations of MLPs that it has, one function under several names.
        spellings: names of fields that other families call otherwise, with those names.
        unread: prefixes of names of tensors that are no part of the language model.
        also_told: further fields of published configurations, without a default here: read where
            given, or without effect on what is priced.
        expects: fields with the values that can be computed; null, and what is missing, too.
        defaults: defaults of all fields that are read; those of transformers 5's config classes.
            transformers 4.57 differs in two: DeepSeek-V2's vocab_size was 32000, and a null
            rope_scaling of GPT-OSS meant plain rotary positions.
    """

    architecture: str
    num_experts: list[str]
    defaults: dict[str, Any]
    num_experts_per_tok: list[str] = field(default_factory=lambda: ["num_experts_per_tok"])
    wrappers: list[str] = field(default_factory=list)
    skew: float = DEFAULT_SKEW
    mixers: str = "grouped queries"
    like: str | None = None
    is_planned_only: bool = False
    has_drafts: bool = False
    calls: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    hidden_acts: list[str] = field(default_factory=lambda: ["silu", "swish"])
    spellings: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    also_told: list[str] = field(default_factory=list)
    expects: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """All names of fields that are known."""
        of_experts = {*self.num_experts, *self.num_experts_per_tok}
        return {*self.defaults, *self.spellings, *self.also_told} | of_experts


def _families() -> dict[str, Family]:
    said = json.loads(Path(__file__).with_name("families.json").read_text())
    return {name: Family(**said.get(of.get("like"), {}) | of) for name, of in said.items()}


FAMILIES = _families()


@dataclass(frozen=True)
class Quantization:
    """Quantisation of a checkpoint's weights.

    Attributes:
        method: its `quant_method`.
        number_type: `float8`, `nvfp4`, `mxfp4` or `int4`; None where it is none that is known here.
        has_float8_cache: ModelOpt asks for keys and values in float8.
        others: type of matrices beside experts, where only experts are in `number_type`.
    """

    method: str
    number_type: str | None
    has_float8_cache: bool = False
    others: str | None = None

    @property
    def is_narrow(self) -> bool:
        """True if weights have one byte in a form that can be read."""
        return self.method in ("compressed-tensors", "fp8")


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint's folder.

    How weights are quantised may stand in ModelOpt's `hf_quant_config.json` alone; it is added.

    Raises:
        SpecError: there is none, it cannot be read, or it is not a JSON object.
    """
    path = folder / "config.json"
    if os.path.isfile(folder):
        raise SpecError(f"{folder} is a file; give the checkpoint's folder")
    if not os.path.lexists(path):
        raise SpecError(f"{folder}: there is no config.json; it is no checkpoint's folder")
    config, beside = read_json_object(path, CONFIG_BYTES, lenient=True), folder / _MODELOPT
    if language_model_of(config).get("quantization_config") is None and os.path.lexists(beside):
        said = read_json_object(beside, CONFIG_BYTES, lenient=True).get("quantization")
        if not isinstance(said, dict):
            raise SpecError(f"{beside}: quantization is {shown(said)}; it must be an object")
        config["quantization_config"] = {"quant_method": "modelopt"} | said
    return config


def family_of(config: dict[str, Any]) -> str:
    """The `model_type` of a supported architecture.

    Raises:
        SpecError: the architecture is not supported, or `architectures` is no list.
    """
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if isinstance(architectures, str):
        raise SpecError(f"architectures is {shown(architectures)}; it must be a list")
    for family, known in FAMILIES.items():
        names = [known.architecture, *known.wrappers]
        if architectures in [[each] for each in names] or (
            not architectures and model_type == family
        ):
            return family
    given = architectures or model_type
    given = given[0] if isinstance(given, list) and len(given) == 1 else given
    raise SpecError(f"architecture {shown(given)} is not supported; {_nearest(config, given)}")


_MISSPELT = 0.93  # likeness of names; those of published configurations are less alike
_LEAST_TOLD = 5  # fields that a nearest family is found by
_MOST_NAMED = 8  # fields of an unknown architecture that are named
# Fields that change no computation of a served model, or that readers ask for without a default.
_SAYS_NOTHING = re.compile(
    r"architectures|model_type|auto_map|.*dtype|.*_token_id|.*token_index|transformers_version|"
    r"use_cache|initializer_range|.*dropout|.*_coef|output_.*|_.*|quantization_config|.*loss.*|"
    r"pretraining_tp|num_nextn_predict_layers|rope_.*|partial_rotary_factor|vision_config|text_config|"
    r"(bos|eos|pad)_.*|ep_size|seq_aux|.*jitter.*|attn_implementation|rotary_dim|scoring_func|topk_method|head_dim|chunk_size_feed_forward|"
    r"is_encoder_decoder|problem_type|return_dict|.*_noise|id2label|label2id"
)


_ENDS = re.compile(r"For(CausalLM|ConditionalGeneration)$")


def _nearest(config: dict[str, Any], given: object) -> str:
    """The family nearest to an unknown architecture, and the fields that this family lacks.

    Nearness goes by the names of fields and of the architecture; with few fields none is named.
    """
    text = language_model_of(config)
    told = {key for key in text if not _SAYS_NOTHING.fullmatch(key)}
    if len(told) < _LEAST_TOLD:
        return "expertlane list families names those that are"
    if not any("expert" in key or key.startswith("moe") for key in told):
        return "its configuration names no experts"

    def known_to(family: Family) -> set[str]:
        return {key for key in family.names if not _SAYS_NOTHING.fullmatch(key)}

    def likeness(name: str) -> float:
        known = known_to(FAMILIES[name])
        of_fields = 2 * len(told & known) / (len(told) + len(known))
        own, its = (_ENDS.sub("", each) for each in (str(given), FAMILIES[name].architecture))
        return 2 * of_fields + SequenceMatcher(None, own, its).ratio()

    name = max(FAMILIES, key=likeness)
    known_somewhere: set[str] = set().union(*map(known_to, FAMILIES.values()))
    further = sorted(told - known_to(FAMILIES[name]), key=lambda key: (key in known_somewhere, key))
    beside = ", ".join(further[:_MOST_NAMED]) + (", …" if len(further) > _MOST_NAMED else "")
    differs = f"no {beside}" if beside else "all of its fields"
    return f"the nearest is {name}, which has {differs} (expertlane list families names all)"


def language_model_of(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration, for models with an image encoder too.

    `text_config`, and from beside it what transformers reads there: architecture, quantisation,
    stored type, tied head.

    Raises:
        SpecError: `text_config` is no object.
    """
    text = config.get("text_config")
    if text is None:
        return config
    if not isinstance(text, dict):
        raise SpecError(f"text_config is {shown(text)}; it must be an object")
    outside = ("architectures", "model_type", "quantization_config", "dtype", "torch_dtype")
    taken = {key: config[key] for key in outside if config.get(key) is not None}
    return text | {"tie_word_embeddings": config.get("tie_word_embeddings", False)} | taken


def quantization_of(config: dict[str, Any]) -> Quantization | None:
    """The quantisation of the weights, readable or not; None without one.

    Raises:
        SpecError: the entry has another form than checkpoints have.
    """
    quantization = language_model_of(config).get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise SpecError(f"quantization_config is {shown(quantization)}; it must be an object")
    method = quantization.get("quant_method")
    if not isinstance(method, str):
        raise SpecError(
            f"quantization_config: quant_method is {shown(method)}; it must be a string"
        )
    names = [method, quantization.get("quant_algo"), quantization.get("format")]
    said = {name.lower() for name in names if isinstance(name, str)}
    has_float8_cache = quantization.get("kv_cache_quant_algo") == "FP8"
    for number_type, spellings in _NAMES_OF_TYPE.items():
        if said & spellings:
            experts = _type_of_experts(config, quantization)
            if experts not in (None, number_type):
                return Quantization(method, experts, has_float8_cache, others=number_type)
            return Quantization(method, number_type, has_float8_cache)
    return Quantization(method, "int4" if _is_int4(method, quantization) else None)


def _type_of_experts(config: dict[str, Any], quantization: dict[str, Any]) -> str | None:
    """The type of experts, where a field of its own names it, as in DeepSeek-V4; else None."""
    if quantization.get("moe_quant_algo") == "NVFP4":
        return "nvfp4"
    told = quantization.get("expert_dtype", language_model_of(config).get("expert_dtype"))
    if told not in (None, "fp4", "fp8"):
        raise SpecError(f"expert_dtype is {shown(told)}; known are fp4 and fp8")
    return "mxfp4" if told == "fp4" else None


def _is_int4(method: str, quantization: dict[str, Any]) -> bool:
    """True if weights are integers of four bits."""
    if method in _WEIGHT_ONLY:
        return quantization.get("bits") == 4
    weights = _weights_of_groups(quantization)
    return bool(weights) and all(
        isinstance(each, dict) and (each.get("type"), each.get("num_bits")) == ("int", 4)
        for each in weights
    )


def _weights_of_groups(quantization: dict[str, Any]) -> list[Any]:
    """The `weights` entries of compressed-tensors' groups of matrices; None for missing ones."""
    groups = quantization.get("config_groups")
    schemes = [*groups.values()] if isinstance(groups, dict) else []
    return [each.get("weights") if isinstance(each, dict) else None for each in schemes]


NarrowType = Literal["int8", "float8"]


@dataclass(frozen=True)
class NarrowScheme:
    """Weights of one byte, each with a scale that is shared by a block of its matrix.

    Attributes:
        rows, columns: size of a block; None for the whole dimension.
        scale: suffix of a matrix's name that names its scales.
        is_packed: four values are one int32, in a tensor named `..._packed`.
    """

    type: NarrowType
    rows: int | None
    columns: int | None
    scale: str
    is_packed: bool = False


def is_mxfp4(config: dict[str, Any]) -> bool:
    """True if experts are stored in MXFP4 as in GPT-OSS.

    Raises:
        SpecError: as in `quantization_of`.
    """
    found = quantization_of(config)
    return found is not None and found.method == "mxfp4"


def narrow_scheme(config: dict[str, Any]) -> NarrowScheme | None:
    """The storage of one-byte matrices; None where there are none.

    Raises:
        SpecError: the weights are quantised in a way that cannot be read.
    """
    found = quantization_of(config)
    if found is None or is_mxfp4(config):
        return None
    quantization = language_model_of(config)["quantization_config"]
    if found.method == "compressed-tensors":
        return _compressed(quantization)
    if found.method != "fp8":
        raise SpecError(
            f"quantization {shown(found.method)} is not supported; supported: compressed-tensors, "
            "fp8, mxfp4"
        )
    block, fmt = quantization.get("weight_block_size"), quantization.get("fmt", "e4m3")
    match block:
        case [int(rows), int(columns)] if fmt in _E4M3 and rows > 0 and columns > 0:
            return NarrowScheme("float8", rows, columns, "_scale_inv")
    raise SpecError(
        f"quantization fp8 with fmt {shown(fmt)} and weight_block_size {shown(block)} is not "
        "supported; supported: 'e4m3' with blocks of two sizes, such as [128, 128]"
    )


_COMPRESSED: dict[str, tuple[str, NarrowType]] = {
    "int-quantized": ("int", "int8"),
    "naive-quantized": ("float", "float8"),
    "float-quantized": ("float", "float8"),
    "pack-quantized": ("int", "int8"),
}


def _compressed(quantization: dict[str, Any]) -> NarrowScheme:
    """A scheme of compressed-tensors: one for all matrices that are not left out."""
    weights, fmt = _weights_of_groups(quantization), quantization.get("format")
    of = weights[0] if weights else None
    if not isinstance(of, dict) or any(each != of for each in weights):
        raise SpecError(
            "quantization compressed-tensors without config_groups, or with weights quantised in "
            "several ways, is not supported"
        )
    kind, own = _COMPRESSED.get(fmt if isinstance(fmt, str) else "", ("", "int8"))
    is_read = (of.get("type"), of.get("num_bits"), of.get("symmetric", True)) == (
        kind,
        8,
        True,
    ) and of.get("actorder") in _ORDERS
    blocks: dict[str, Any] = {
        "tensor": (None, None),
        "channel": (1, None),
        "group": (1, of.get("group_size") or 0),
        "block": of.get("block_structure"),
    }
    match blocks.get(str(of.get("strategy"))):
        case [None | int() as rows, None | int() as columns] if (
            is_read and min(1 if each is None else each for each in (rows, columns)) > 0
        ):
            return NarrowScheme(own, rows, columns, "_scale", fmt == "pack-quantized")
    said = ", ".join(
        f"{name} {shown(of.get(name))}"
        for name in ("type", "num_bits", "symmetric", "strategy", "group_size", "actorder")
    )
    raise SpecError(
        f"quantization compressed-tensors with format {shown(fmt)} and weights of {said} is not "
        "supported; supported: symmetric ones of 8 bits in int-quantized, pack-quantized or "
        "float-quantized, by tensor, channel, group or block"
    )


_ORDERS = (None, False, "static", "weight")  # groups of neighbouring inputs


def num_extra_layers(config: dict[str, Any]) -> int:
    """Layers after the last one, for multi-token prediction; plain decoding leaves them out.

    Raises:
        SpecError: the architecture is not supported, or the number is not valid.
    """
    family = family_of(config)
    reader = ConfigReader(config, family, FAMILIES[family].defaults)
    return reader.get(int, "num_nextn_predict_layers", "num_mtp_layers", default=0)


class ConfigReader:
    """Typed look-ups in a configuration.

    Args:
        name: the model's name in messages.
        defaults: for fields that it leaves out. A null is a value, unless another spelling has one.
    """

    def __init__(
        self, config: dict[str, Any], name: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        self._config = config
        self.defaults = defaults or {}
        self.name = name

    def raw(self, *spellings: str) -> Any:
        """The first of some spellings that is there and not null, else None or the default."""
        return self._find(spellings)[1]

    def _find(self, spellings: tuple[str, ...]) -> tuple[str, Any]:
        """The spelling that counts, and its value."""
        there = [key for key in spellings if key in self._config]
        for key in there:
            if self._config[key] is not None:
                return key, self._config[key]
        if there:
            return there[0], None
        return next(
            ((key, self.defaults[key]) for key in spellings if key in self.defaults),
            (spellings[0], None),
        )

    def get(self, kind: type[T], *spellings: str, default: T | None = None) -> T:
        """A value that must be there unless it has a default, here or in `defaults`."""
        key, value = self._find(spellings)
        value = default if value is None else value
        if value is None and key in self._config:
            raise self.error(f"{key} is null; it must be {self._valid(kind, key)}")
        if value is None:
            raise self.error(f"{' or '.join(spellings)} is missing")
        return self.typed(kind, key, value)

    def same_in_all(self, *spellings: str) -> int:
        """A whole number, or a list of it, once for each layer."""
        key, value = self._find(spellings)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            return self.typed(int, key, value[0])
        return self.get(int, *spellings)

    def inside(
        self, key: str, *known: str, defaults: Mapping[str, Any] | None = None
    ) -> "ConfigReader":
        """The object that a field holds; empty where it is null or missing.

        A field in it that is not known is refused: a default would stand for one that is misspelt.
        """
        given = self.raw(key)
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise self.error(f"{key} is {shown(given)}; it must be an object")
        if unknown := [name for name in given if name not in known]:
            hint = did_you_mean(unknown[0], known)
            raise self.error(
                f"{key} has {shown(unknown[0])}; known: {', '.join(known)}{hint and f' ({hint})'}"
            )
        return ConfigReader(given, f"{self.name}: {key}", defaults)

    def refuse_misspelt(self, family: Family) -> None:
        """Refuse a field that is not known where one of nearly its name is missing.

        The default of that one would stand in its place, unseen.
        """
        missing = [key for key in family.defaults if key not in self._config]
        names = family.names
        for key in self._config:
            if key not in names and (near := get_close_matches(key, missing, 1, _MISSPELT)):
                raise self.error(f"{shown(key)} is not known; did you mean {near[0]}?")

    def with_fields(self, **fields: Any) -> "ConfigReader":
        """A copy of the configuration with some fields replaced."""
        return ConfigReader({**self._config, **fields}, self.name, self.defaults)

    def optional(self, kind: type[T], key: str) -> T | None:
        """A value, or None where it is null, or missing without a default."""
        value = self.raw(key)
        return None if value is None else self.typed(kind, key, value)

    def same(self, kind: type[Any], *names: str) -> dict[str, Any]:
        """Fields that have the same names and types in the dataclass `kind`."""
        types = {each.name: each.type for each in fields(kind)}
        return {
            name: self.get((get_args(types[name]) or (types[name],))[0], name) for name in names
        }

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers; empty where it is null or missing."""
        value = self.raw(key)
        value = [] if value is None else value
        if not isinstance(value, list):
            raise self.error(f"{key} is {shown(value)}; it must be a list")
        return [self.typed(int, key, item) for item in value]

    def typed(self, kind: type[T], key: str, value: Any) -> T:
        """`value` as a `kind`, in its range; a whole number is a number, but true is not."""
        valid = self._valid(kind, key)
        if isinstance(valid, Range):
            return kind(valid.take(f"model {self.name}: {key}", value))
        if type(value) is not kind:
            raise self.error(f"{key} is {shown(value)}; it must be {valid}")
        return value

    def _valid(self, kind: type[T], key: str) -> Range | str:
        """The valid values of a field, as the end of an error message."""
        if kind in (int, float):
            return RANGES.get(key, ANY_WHOLE if kind is int else ANY_NUMBER)
        return _KIND_NAMES[kind]

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a value that is there and is none of those that can be computed."""
        if self.raw(key) is not None and self.raw(key) not in allowed:
            raise self.unsupported(key)

    def error(self, text: str) -> SpecError:
        """A mistake in this configuration."""
        return SpecError(f"model {self.name}: {text}")

    def unsupported(self, key: str) -> SpecError:
        """A value that cannot be computed."""
        return self.error(f"{key} {shown(self.raw(key))} is not supported")
