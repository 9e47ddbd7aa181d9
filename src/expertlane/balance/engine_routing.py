"""Read routing that other engines recorded: traces of tokens' experts, or counts of experts.

SGLang writes its expert distribution record with `torch.save`; the content depends on its recorder
mode (python/sglang/srt/eplb/expert_distribution.py). vLLM (`--enable-return-routed-experts`,
docs.vllm.ai/training/routed_experts) and SGLang (`return_routed_experts`) return the experts of a
request's tokens in its response. Responses are read from a JSON file: one response, a list of them,
or one per line.
"""

import base64
import binascii
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from expertlane.balance.torch_file import is_torch_file, read_torch_file
from expertlane.balance.trace import DAMAGED_ARRAY, RoutingTrace, read_array, read_trace
from expertlane.errors import SpecError, UserError, naming
from expertlane.spec.files import PROMPTS_BYTES, TRACE_BYTES, check_regular, parse_json, read_text
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import take

Ints = npt.NDArray[np.integer]
_MOST_EXPERTS = 2**15 - 1
_NOTHING = "no routing was recorded: send requests between start and dump of the record"


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """How often each expert was chosen, summed over tokens.

    Attributes:
        model: the model's name.
        layers: indices of the MoE layers among the hidden layers, ascending.
        counts: [num_layers, num_experts]; tokens that chose each logical expert.
        num_experts_per_tok, topk_ids: None: counts do not have them, unlike a trace.
    """

    num_experts_per_tok: ClassVar[None] = None
    topk_ids: ClassVar[None] = None

    model: str
    layers: tuple[int, ...]
    counts: npt.NDArray[np.int64]

    @property
    def num_experts(self) -> int:
        """Number of logical experts of a layer."""
        return int(self.counts.shape[1])

    @property
    def num_choices(self) -> int:
        """Choices of an expert in a layer, the mean over layers."""
        return round(float(self.counts.sum()) / len(self.layers))

    def load(self) -> npt.NDArray[np.int64]:
        """The counts, [num_layers, num_experts], as the method of a trace."""
        return self.counts


Routing = RoutingTrace | RoutingCounts


def read_routing(path: Path, model: ModelConfig | None = None, name: str | None = None) -> Routing:
    """Read a routing trace, a record of SGLang, or responses of vLLM or SGLang.

    Args:
        path: the file.
        model: the model of responses, which do not name it; other files ignore it.
        name: the model's name for a record of SGLang, which has none; None for the file's name.

    Raises:
        UserError: the file is missing, damaged or of another kind, or its routing does not fit the
            model.
    """
    check_regular(path, TRACE_BYTES)
    if is_torch_file(path):
        data = read_torch_file(path)
        with naming(path):
            return _of_sglang(data, name or path.stem)
    if is_answers(path):
        text = read_text(path, PROMPTS_BYTES)
        with naming(path):
            return _of_answers(_answers(text), model)
    return read_trace(path)


def is_answers(path: Path) -> bool:
    """True if a file begins with a JSON object or list.

    Raises:
        UserError: the file is missing, or cannot be read.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip()[:1] in (b"{", b"[")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


# SGLang


def _of_sglang(data: Any, name: str) -> Routing:
    if not isinstance(data, dict):
        raise UserError("it is not an expert distribution record of SGLang")
    if "logical_count" in data:
        return _of_counts(_array(data, "logical_count", 3).sum(axis=0), name)
    records = data.get("records")
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise UserError(
            "it is not an expert distribution record of SGLang: it has neither logical_count nor "
            "records"
        )
    if not records:
        raise UserError(_NOTHING)
    logical = _array(data, "last_physical_to_logical_map", 2)
    if logical.min(initial=0) < 0 or logical.max(initial=0) >= _MOST_EXPERTS:
        raise UserError("last_physical_to_logical_map names an expert that cannot exist")
    if "topk_ids_of_layer" in records[0]:
        return _of_tokens(records, logical, name)
    counts = np.zeros((len(logical), int(logical.max()) + 1), np.int64)
    layers = np.arange(len(logical))[:, None]
    for record in records:
        found = _array(record, "global_physical_count", 2)
        if found.shape != logical.shape:
            raise UserError(
                f"global_physical_count has shape {found.shape}, last_physical_to_logical_map "
                f"{logical.shape}"
            )
        np.add.at(counts, (layers, logical), found)
    return _of_counts(counts, name)


def _of_counts(counts: Ints, name: str) -> RoutingCounts:
    if counts.min(initial=0) < 0:
        raise UserError("a count of an expert is negative")
    layers = np.flatnonzero(counts.any(axis=1))  # others are dense
    if not len(layers):
        raise UserError(_NOTHING)
    take("num_experts", counts.shape[1], "num_experts")
    return RoutingCounts(name, tuple(layers.tolist()), counts[layers].astype(np.int64))


def _of_tokens(records: list[dict[str, Any]], logical: Ints, name: str) -> RoutingTrace:
    """Read SGLang's mode per_token: physical experts by layer and token, -1 for none."""
    steps, parts = [], []
    for record in records:
        ids, step = _array(record, "topk_ids_of_layer", 3), record.get("forward_pass_id")
        if type(step) is not int or not 0 <= step < 2**62 or len(ids) != len(logical):
            raise UserError("a record has no forward_pass_id, or other layers than the map")
        steps.append(step)
        parts.append(ids)
    width = {each.shape[2] for each in parts}
    if len(width) != 1:
        raise UserError("records differ in their number of experts per token")
    order = np.argsort(steps, kind="stable")
    found = np.concatenate([parts[place] for place in order], axis=1)
    step = np.repeat(np.array(steps)[order], [parts[place].shape[1] for place in order])
    if found.max(initial=-1) >= logical.shape[1]:
        raise UserError(
            f"a token chose physical expert {found.max()}; the map has {logical.shape[1]}"
        )
    is_there = found >= 0
    layers = np.flatnonzero(is_there.any(axis=(1, 2)))  # others are dense
    columns = np.flatnonzero(is_there.any(axis=(0, 1)))
    if not len(layers):
        raise UserError(_NOTHING)
    found = found[layers][:, :, columns]
    is_whole = (found >= 0).all(axis=(0, 2))  # others are padding
    found, step = found[:, is_whole], step[is_whole]
    ids = np.stack([of[each] for of, each in zip(logical[layers], found, strict=True)])
    num_experts = int(logical.max()) + 1
    return RoutingTrace(
        name, num_experts, tuple(layers.tolist()), ids.astype(np.int16), step.astype(np.int64)
    )


def _array(table: dict[str, Any], key: str, num_dims: int) -> Ints:
    found = table.get(key)
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or found.ndim != num_dims:
        raise UserError(f"{key} is not an integer tensor with {num_dims} dimensions")
    return found


# Answers of vLLM and SGLang


def _answers(text: str) -> list[Any]:
    try:
        return [parse_json(text, lenient=True)]
    except json.JSONDecodeError as error:
        whole = error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(parse_json(line, lenient=True))
        except json.JSONDecodeError as error:
            if not found:
                raise SpecError(f"not JSON: {whole.msg} at line {whole.lineno}") from None
            raise SpecError(f"line {number} is not JSON: {error.msg}") from None
    return found


def _of_answers(answers: list[Any], model: ModelConfig | None) -> RoutingTrace:
    routed = [each for answer in answers for each in _routed(answer)]
    if not routed:
        raise UserError(
            "no response has routed experts: vLLM sends them with --enable-return-routed-experts, "
            "SGLang if a request has return_routed_experts"
        )
    if model is None:
        raise UserError("responses do not name their model; give it with --model")
    parts = [_of_model(each, model) for each in routed]
    ids = np.concatenate(parts, axis=1)
    step = np.repeat(np.arange(len(parts)), [each.shape[1] for each in parts])
    return RoutingTrace(
        model.name, model.num_experts, tuple(model.moe_layers), ids.astype(np.int16), step
    )


_KEYS = "prompt_routed_experts", "routed_experts"


def _routed(answer: Any) -> Iterator[Any]:
    """The values of these keys at any depth of a response, those of prompts first."""
    if isinstance(answer, list):
        for each in answer:
            if isinstance(each, dict):
                yield from _routed(each)
    elif isinstance(answer, dict):
        yield from (answer[key] for key in _KEYS if answer.get(key) is not None)
        for key, each in answer.items():
            if key not in _KEYS and isinstance(each, dict | list):
                yield from _routed(each)


def _of_model(routed: Any, model: ModelConfig) -> Ints:
    """The routed experts of a response, [num_moe_layers, num_tokens, num_experts_per_tok].

    Tokens whose keys and values came from a prefix cache have no experts, and are left out.

    Raises:
        UserError: shapes or experts do not fit the model.
    """
    if isinstance(routed, str):
        found = _decoded(routed, model)
    else:
        try:
            found = np.asarray(routed)
        except ValueError:
            raise UserError("routed_experts has rows of several lengths") from None
    if found.dtype.kind not in "iu" or found.ndim != 3:
        raise UserError("routed_experts is not [num_tokens, num_layers, num_experts_per_tok]")
    num_layers, moe = found.shape[1], model.moe_layers
    if num_layers == model.num_hidden_layers:
        found = found[:, moe]
    elif num_layers != len(moe):
        raise UserError(
            f"routed_experts has {num_layers} layers; {model.name} has {model.num_hidden_layers}, "
            f"{len(moe)} of them with experts"
        )
    if found.shape[2] != model.num_experts_per_tok:
        raise UserError(
            f"routed_experts has {found.shape[2]} experts per token; {model.name} has "
            f"{model.num_experts_per_tok}"
        )
    if found.max(initial=0) >= model.num_experts:
        raise UserError(f"a token chose expert {found.max()}; {model.name} has {model.num_experts}")
    # Experts of cached tokens are -1, or 0 as the buffer was initialised.
    is_blank = np.any(found < 0, axis=2)
    if found.shape[2] > 1:
        is_blank = is_blank | np.all(found == 0, axis=2)
    kept: Ints = found[~np.any(is_blank, axis=1)]
    return kept.transpose(1, 0, 2)


def _decoded(text: str, model: ModelConfig) -> Ints:
    """Decode base64: vLLM's .npy file, or SGLang's int32 numbers of all layers.

    Raises:
        UserError: it is damaged, or does not fit the model.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("routed_experts is not base64") from None
    if data.startswith(b"\x93NUMPY"):
        try:
            return read_array(io.BytesIO(data), len(data))
        except DAMAGED_ARRAY:
            raise UserError("routed_experts is a damaged array") from None
    row = model.num_hidden_layers * model.num_experts_per_tok * 4
    if len(data) % row:
        raise UserError(
            f"routed_experts has {len(data):,} bytes, no multiple of {row}: {model.name} has "
            f"{model.num_hidden_layers} layers and {model.num_experts_per_tok} experts per token"
        )
    shape = -1, model.num_hidden_layers, model.num_experts_per_tok
    return np.frombuffer(data, "<i4").reshape(shape)
