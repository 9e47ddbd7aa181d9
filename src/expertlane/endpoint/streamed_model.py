"""transformers' own model of a checkpoint, of which one layer at a time has its weights.

The model's own `forward` runs for every layer, so that masks, positions and scales are those of its
class; every decoder layer but one hands its input on. The one gets hidden states that were kept.
Tensors are renamed and fused as transformers does it (`core_model_loading`), those of experts into
place, one after the other.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from expertlane.endpoint.checkpoint_files import CheckpointFiles
from expertlane.errors import SpecError
from expertlane.spec.hf_config import read_config

_CHOOSING = (torch.topk, Tensor.topk)


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of a part of the model.

    Attributes:
        tensors: float32, by name within the part.
        narrow: names of those that are stored in one byte a value, or less.
    """

    tensors: dict[str, Tensor]
    narrow: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class RouterChoice:
    """A layer's routing of a group of prompts of one length.

    Attributes:
        topk_ids: [num_prompts, len, top_k].
        margins: [num_prompts, len]; the last chosen score less the first unchosen one, of the
            scores by which the model's class chooses; where it first chooses groups of experts, the
            least of that and of the groups'. None where the choice was made in another way.
    """

    topk_ids: Tensor
    margins: Tensor | None


@dataclass(eq=False)
class Skeleton:
    """A model without weights, in one number type.

    Attributes:
        model, decoder: transformers' modules.
        name: the decoder's name in the model.
        dtypes: of every tensor, by its full name.
    """

    model: Any
    decoder: Any
    name: str
    dtypes: dict[str, torch.dtype]
    _of_part: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def place(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Give weights to a part; only those named are replaced.

        Args:
            part: the module's name in the model.
            tensors: in the types of `dtypes`.
        """
        module = self.model.get_submodule(part)
        self._of_part.setdefault(part, dict(module.state_dict()))
        module.load_state_dict(tensors, assign=True, strict=False)

    def release(self, part: str) -> None:
        """Take its weights away."""
        module = self.model.get_submodule(part)
        module.load_state_dict(self._of_part.pop(part), assign=True, strict=False)


class StreamedModel:
    """A checkpoint's model, run layer by layer.

    Args:
        folder: with `config.json` and safetensors files.

    Attributes:
        num_layers: decoder layers.
        moe_layers: indices of those with experts.
        num_experts: of each of these.
        vocab_size: number of token ids.
        max_len: the longest prompt that the configuration allows.
        dtype: the checkpoint's own number type.

    Raises:
        SpecError: there is no checkpoint that can be read, or transformers has no class for it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = CheckpointFiles(folder, read_config(folder))
        self._config = _config_of(folder)
        self._skeletons: dict[torch.dtype, Skeleton] = {}
        plain = self.skeleton(torch.float32)
        text = self._config.get_text_config()
        self.num_layers = len(plain.decoder.layers)
        experts = {i: _experts_of(layer) for i, layer in enumerate(plain.decoder.layers)}
        with_experts = {i: module for i, module in experts.items() if module is not None}
        self.moe_layers = tuple(with_experts)
        self.num_experts = tuple(len(next(module.parameters())) for module in with_experts.values())
        self.vocab_size = int(text.vocab_size)
        self.max_len = int(getattr(text, "max_position_embeddings", None) or 2**31)
        self.dtype = getattr(torch, str(self._config.dtype or "bfloat16").removeprefix("torch."))
        self._converters: dict[str, WeightConverter] = {}
        self._sources = self._find_sources(plain.model)

    def skeleton(self, dtype: torch.dtype) -> Skeleton:
        """The model without weights, in a number type."""
        if dtype not in self._skeletons:
            self._skeletons[dtype] = _skeleton(self._config, dtype, self._folder)
        return self._skeletons[dtype]

    def layer_name(self, index: int) -> str:
        """A decoder layer's name in the model."""
        return f"{self.skeleton(torch.float32).name}.layers.{index}"

    def head_name(self) -> str:
        """The output head's name in the model."""
        model = self.skeleton(torch.float32).model
        return _name_of(model, model.get_output_embeddings())

    def load(self, part: str) -> Weights:
        """The weights of a part, read now.

        Args:
            part: the name of a module in the model.

        Raises:
            SpecError: one is missing, can't be read, or has another shape.
        """
        plain = self.skeleton(torch.float32)
        wanted = plain.model.get_submodule(part).state_dict()
        return self._load(f"{part}.", wanted, plain.model)

    def load_rest(self) -> Weights:
        """Weights of the decoder beside layers and embedding, such as its norm; by full names."""
        plain = self.skeleton(torch.float32)
        embedding = _name_of(plain.model, plain.decoder.get_input_embeddings())
        apart = (f"{plain.name}.layers.", f"{embedding}.")
        own = {
            name: tensor
            for name, tensor in plain.model.state_dict().items()
            if name.startswith(f"{plain.name}.") and not name.startswith(apart)
        }
        return self._load("", own, plain.model)

    def embedding(self, token_ids: list[int]) -> Tensor:
        """Rows [len(token_ids), width] of the embedding's matrix."""
        plain = self.skeleton(torch.float32)
        name = _name_of(plain.model, plain.decoder.get_input_embeddings()) + ".weight"
        sources = self._sources_of(name, plain.model)
        if len(sources) != 1 or sources[0][0] is not None:
            raise SpecError(f"{self._folder}: the embedding is stored in several tensors")
        return self._files.read_rows(sources[0][1], token_ids)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _find_sources(self, model: Any) -> dict[str, list[tuple[str | None, str]]]:
        """Patterns of converters, and stored names, of each tensor of the model."""
        mapping = get_model_conversion_mapping(model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        for converter in converters:
            self._converters |= dict.fromkeys(converter.source_patterns, converter)
        own, prefix = model.state_dict(), model.base_model_prefix
        sources: dict[str, list[tuple[str | None, str]]] = {}
        for stored in sorted(self._files.names, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, own)
            if name not in own and stored in own:
                name, pattern = rename_source_key(stored, [], [], prefix, own)
            if name in own:
                sources.setdefault(name, []).append((pattern, stored))
        return sources

    def _sources_of(self, name: str, model: Any) -> list[tuple[str | None, str]]:
        """The sources of a tensor; a tied one may be stored under the other's name."""
        tied = dict(model.all_tied_weights_keys)
        for other in (name, tied.get(name), *(a for a, b in tied.items() if b == name)):
            if other in self._sources:
                return self._sources[other]
        raise SpecError(f"{self._folder}: the tensor for {name} is missing")

    def _load(self, prefix: str, wanted: dict[str, Tensor], model: Any) -> Weights:
        found: dict[str, Tensor] = {}
        narrow = set()
        # Those that have stored tensors of their own first: converters may make others with them.
        for name in sorted(wanted, key=lambda each: prefix + each not in self._sources):
            if prefix + name in found:
                continue
            sources = self._sources_of(prefix + name, model)
            found |= self._converted(prefix + name, wanted[name], sources, model)
            if all(self._files.is_narrow(stored) for _, stored in sources):
                narrow.add(name)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        for name, empty in wanted.items():
            if name not in tensors:
                raise SpecError(f"{self._folder}: the tensor for {prefix}{name} is missing")
            if tensors[name].shape != empty.shape:
                shape = list(tensors[name].shape)
                raise SpecError(
                    f"{self._folder}: the tensor for {prefix}{name} is {shape}; config.json asks "
                    f"for {list(empty.shape)}"
                )
        return Weights(tensors, frozenset(narrow))

    def _converted(
        self, name: str, empty: Tensor, sources: list[tuple[str | None, str]], model: Any
    ) -> dict[str, Tensor]:
        """A tensor made of stored ones, and those that are made of the same."""
        pattern, stored = sources[0]
        if pattern is None:
            return {name: self._files.read(stored)}
        converter = self._converters[pattern]
        kinds = [(type(each), each.dim) for each in converter.operations if hasattr(each, "dim")]
        whole = len(kinds) == len(converter.operations)
        if whole and kinds in ([_MERGED], [_MERGED, _SIDE_BY_SIDE]):
            return {name: self._experts(name, empty, converter, sources)}
        collecting: Any = deepcopy(converter)  # its types know tensors that are being loaded alone
        for pattern, stored in sources:
            collecting.add_tensor(name, stored, pattern, self._files.read(stored))
        made = collecting.convert(name, model=model, config=model.config)
        return {
            each: (tensor[0] if isinstance(tensor, list) else tensor).contiguous()
            for each, tensor in made.items()
        }

    def _experts(
        self,
        name: str,
        empty: Tensor,
        converter: WeightConverter,
        sources: list[tuple[str | None, str]],
    ) -> Tensor:
        """Matrices of experts, one after the other: [num_experts, rows of all kinds, columns]."""
        out = torch.empty(empty.shape)
        row = 0
        for kind in converter.source_patterns:
            stored = [each for pattern, each in sources if pattern == kind]
            if len(stored) != len(out):
                raise SpecError(
                    f"{self._folder}: {len(stored)} tensors {kind} for {name}; config.json asks "
                    f"for {len(out)}"
                )
            height = 0
            for expert, each in enumerate(stored):
                matrix = self._files.read(each)
                height = len(matrix)
                if row + height > out.shape[1] or matrix.shape[1:] != out.shape[2:]:
                    raise SpecError(
                        f"{self._folder}: tensor {each} is {list(matrix.shape)}, too large for "
                        f"config.json"
                    )
                out[expert, row : row + height] = matrix
            row += height
        if row != out.shape[1]:
            raise SpecError(f"{self._folder}: {name} has {row} rows, not {out.shape[1]}")
        return out


_MERGED, _SIDE_BY_SIDE = (MergeModulelist, 0), (Concatenate, 1)


def run_layer(
    skeleton: Skeleton, index: int, hidden: Tensor, *, is_embedded: bool
) -> tuple[Tensor, RouterChoice | None]:
    """One decoder layer, whose weights are in place.

    Args:
        hidden: [num_prompts, len, width].
        is_embedded: these are rows of the embedding, and not hidden states of the layer before.

    Raises:
        SpecError: layers of this class give each other something else, too.
    """
    layer = skeleton.decoder.layers[index]
    taken: list[Tensor] = []
    chosen: list[Tensor] = []
    calls = _TopkCalls()

    def give(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if is_embedded else (hidden, *args[1:])

    def take(_: Any, args: Any, out: Any) -> None:
        if not isinstance(out, Tensor):
            raise SpecError(
                f"layers of {type(layer).__name__} hand on more than hidden states; such models "
                "cannot be run layer by layer"
            )
        taken.append(out)

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args[1:], *kwargs.values())
        chosen.extend(
            each for each in given if isinstance(each, Tensor) and not each.is_floating_point()
        )

    experts = _experts_of(layer)
    hooks = [layer.register_forward_pre_hook(give), layer.register_forward_hook(take)]
    if experts is not None:
        hooks.append(experts.register_forward_pre_hook(see, with_kwargs=True))
    try:
        with _runs(layer), calls:
            skeleton.decoder(inputs_embeds=hidden, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return taken[0], _routed(chosen, calls, hidden.shape[:2]) if chosen else None


def run_head(skeleton: Skeleton, hidden: Tensor) -> Tensor:
    """Logits [1, len, vocab_size] of the last layer's hidden states [1, len, width]."""
    last = skeleton.decoder.layers[-1]
    hook = last.register_forward_pre_hook(lambda _, args: (hidden, *args[1:]))
    try:
        logits: Tensor = skeleton.model(inputs_embeds=hidden, use_cache=False).logits
    finally:
        hook.remove()
    return logits


class _TopkCalls(TorchFunctionMode):
    """Recorder of calls of topk: scores, and what was chosen of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _CHOOSING:
            self.calls.append((args[0], out[1]))
        return out


def _routed(chosen: list[Tensor], noted: _TopkCalls, shape: torch.Size) -> RouterChoice:
    """The choice that experts were given, and by how much it was one."""
    topk_ids = chosen[0].reshape(-1, chosen[0].shape[-1])
    margins = None
    for place, (scores, ids) in enumerate(noted.calls):
        if ids.shape == topk_ids.shape and torch.equal(ids, topk_ids):
            margins = _margin(scores, ids.shape[-1])
            for groups, of in noted.calls[:place]:
                if _chooses_groups(groups, scores):
                    margins = torch.minimum(margins, _margin(groups, of.shape[-1]))
    return RouterChoice(topk_ids.view(*shape, -1), None if margins is None else margins.view(shape))


def _chooses_groups(groups: Tensor, scores: Tensor) -> bool:
    """Whether scores are those of groups of a layer's experts."""
    is_like = groups.dim() == scores.dim() and groups.shape[:-1] == scores.shape[:-1]
    return is_like and groups.shape[-1] < scores.shape[-1]


def _margin(scores: Tensor, k: int) -> Tensor:
    """The k-th less the (k+1)-th largest of [num_tokens, n]; infinite if all are chosen."""
    wide = scores.double()
    if k == wide.shape[-1]:
        return wide.new_full(wide.shape[:1], torch.inf)
    best = wide.topk(k + 1, dim=-1).values
    return best[:, -2] - best[:, -1]


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A decoder layer that does nothing."""
    return hidden_states


@contextmanager
def _runs(layer: Any) -> Iterator[None]:
    """Let a layer do what its class does."""
    del layer.forward
    try:
        yield
    finally:
        layer.forward = _hand_on


def _experts_of(layer: nn.Module) -> nn.Module | None:
    """The module of a layer that is given the chosen experts; None of a dense layer."""
    named = (module for name, module in layer.named_modules() if name.split(".")[-1] == "experts")
    return next(named, None)


def _config_of(folder: Path) -> Any:
    """transformers' configuration, of weights that aren't quantised."""
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise SpecError(
            f"{folder}: transformers {transformers.__version__} cannot read config.json: "
            f"{_first_line(error)}"
        ) from None
    for each in (config, config.get_text_config()):
        if getattr(each, "quantization_config", None) is not None:
            del each.quantization_config
        if getattr(each, "output_router_logits", False):
            each.output_router_logits = False
    return config


def _skeleton(config: Any, dtype: torch.dtype, folder: Path) -> Skeleton:
    config = deepcopy(config)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    kind: Any = next((each for each in kinds if type(config) in each._model_mapping), None)
    if kind is None:
        raise SpecError(
            f"{folder}: transformers {transformers.__version__} has no class of language models "
            f"for model_type {config.model_type!r} (code that comes with a checkpoint is never run)"
        )
    with torch.device("meta"):
        model = kind.from_config(
            config, dtype=dtype, experts_implementation="eager", trust_remote_code=False
        )
    model.eval().requires_grad_(False)
    _fill_buffers(model)
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise SpecError(f"{folder}: {type(model).__name__} has no list of decoder layers")
    for layer in decoder.layers:
        layer.forward = _hand_on
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept += tuple(model._keep_in_fp32_modules or ())
    is_kept = re.compile("|".join(rf"(^|\.){each}($|\.)" for each in kept)) if kept else None
    dtypes = {
        name: torch.float32 if is_kept and is_kept.search(name) else tensor.dtype
        for name, tensor in model.state_dict().items()
    }
    return Skeleton(model, decoder, _name_of(model, decoder), dtypes)


def _fill_buffers(model: Any) -> None:
    """Compute buffers that no checkpoint holds, such as frequencies of rotary positions."""
    owners = []
    for name, buffer in model.named_non_persistent_buffers():
        parent, _, own = name.rpartition(".")
        owner = model.get_submodule(parent)
        owner._buffers[own] = torch.empty_like(buffer, device="cpu")
        owners.append(owner)
    with torch.no_grad():
        for owner in dict.fromkeys(owners):
            model._init_weights(owner)


def _name_of(model: Any, module: Any) -> str:
    name: str = next(name for name, each in model.named_modules() if each is module)
    return name


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
