"""A checkpoint as the reference: log-probabilities by transformers' own classes, in float32.

Layers are read from disk one at a time, each run on all prompts and released, so that a checkpoint
may be larger than memory: about one layer in float32 is held, half of one more for other number
types, and prompts' hidden states (and attention scores of the longest one, where a class has plain
attention alone). It shares no code with the engine that it judges.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertlane.endpoint.rounding import NUMBER_TYPES, NumberType, RoundedInputs
from expertlane.endpoint.scored import Prompt, PromptScores
from expertlane.endpoint.streamed_model import (
    RouterChoice,
    Skeleton,
    StreamedModel,
    Weights,
    run_head,
    run_layer,
)
from expertlane.errors import UserError
from expertlane.progress import Progress

_GROUP_TOKENS = 2048  # of prompts of one length that run together
_LOGIT_ROWS = 256  # at a time
# Ends of names of matrices that servers leave as they are: routers, gates of shared experts, and
# what multi-head latent attention multiplies into others.
_UNROUNDED = ("gate.weight", "router.weight", "kv_b_proj.weight", "bias")


class CheckpointReference:
    """A checkpoint of any family with experts that transformers has a class for.

    Args:
        folder: with `config.json` and safetensors files; code in it is never run.

    Attributes:
        moe_layers: indices of the layers with experts, in the order of choices in `PromptScores`.
        num_experts: of each of these.
        vocab_size: number of token ids.
        max_len: tokens of the longest prompt.
        dtype: the checkpoint's own number type, such as `bfloat16`.

    Raises:
        SpecError: it can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self._model = StreamedModel(folder)
        self._folder = folder
        self.moe_layers, self.num_experts = self._model.moe_layers, self._model.num_experts
        self.vocab_size, self.max_len = self._model.vocab_size, self._model.max_len
        self.dtype = str(self._model.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def score_in(
        self, prompts: Sequence[Prompt], number_types: Sequence[str], progress: Progress
    ) -> dict[str, list[PromptScores]]:
        """Log-probabilities in several number types, each layer read once.

        Args:
            number_types: of `NUMBER_TYPES`. With those that round weights, activations have the
                checkpoint's own type.

        Raises:
            UserError: a prompt is empty, too long, or has a token that the model hasn't; or a
                number type isn't known.
            SpecError: a tensor is missing or can't be read.
        """
        self._check(prompts)
        for name in number_types:
            if name not in NUMBER_TYPES:
                raise UserError(
                    f"number type {name!r} is not known; known: {', '.join(NUMBER_TYPES)}"
                )
        types = {name: NUMBER_TYPES[name] for name in dict.fromkeys(number_types)}
        groups = list(_groups(prompts))
        runs = {name: _Run(self._skeleton(each), each) for name, each in types.items()}
        self._embed(prompts, groups, runs.values())
        num_layers = self._model.num_layers
        progress.task(f"{self._folder.name}: layers", num_layers + 1)
        for index in range(num_layers):
            name = self._model.layer_name(index)
            weights = self._model.load(name)
            for run in runs.values():
                run.layer(index, name, weights)
            del weights
            progress.advance()
        name = self._model.head_name()
        head = self._model.load(name)
        scored = {
            each: run.scored(prompts, groups, name, head, len(self.moe_layers))
            for each, run in runs.items()
        }
        self._model.close()
        progress.advance()
        progress.done()
        return scored

    def _skeleton(self, number_type: NumberType) -> Skeleton:
        return self._model.skeleton(number_type.dtype or self._model.dtype)

    def _check(self, prompts: Sequence[Prompt]) -> None:
        for place, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= self.max_len:
                raise UserError(
                    f"prompt {place} has {len(prompt)} tokens; {self._folder} takes 1 to "
                    f"{self.max_len}"
                )
            if min(prompt) < 0 or max(prompt) >= self.vocab_size:
                raise UserError(
                    f"prompt {place} has a token outside 0 to {self.vocab_size - 1}, which is all "
                    f"that {self._folder} has"
                )

    def _embed(self, prompts: Sequence[Prompt], groups: list[list[int]], runs: Any) -> None:
        """Give every run its prompts' rows of the embedding."""
        token_ids = sorted({token for prompt in prompts for token in prompt})
        place = {token: row for row, token in enumerate(token_ids)}
        rows, rest = self._model.embedding(token_ids), self._model.load_rest()
        for run in runs:
            run.begin(rows, rest)
            for group in groups:
                run.embed(torch.tensor([[place[token] for token in prompts[i]] for i in group]))


class _Run:
    """All prompts in one number type, between two layers.

    Attributes:
        hidden: of each group, [num_prompts, len, width].
        routed: of each layer with experts, what its router did with each group.
    """

    def __init__(self, skeleton: Skeleton, number_type: NumberType) -> None:
        self._skeleton, self._type = skeleton, number_type
        self.hidden: list[Tensor] = []
        self.routed: list[list[RouterChoice]] = []

    def begin(self, rows: Tensor, rest: Weights) -> None:
        """Take the embedding's rows for the prompts' tokens, and what the decoder has beside."""
        embedding = self._skeleton.decoder.get_input_embeddings()
        dtype = next(iter(embedding.parameters())).dtype
        embedding.weight = torch.nn.Parameter(rows.to(dtype), requires_grad=False)
        embedding.padding_idx = None
        dtypes = self._skeleton.dtypes
        own = {name: tensor.to(dtypes[name]) for name, tensor in rest.tensors.items()}
        self._skeleton.place("", own)

    def embed(self, rows: Tensor) -> None:
        """Begin with a group of prompts, given as rows of the embedding."""
        self.hidden.append(self._skeleton.decoder.get_input_embeddings()(rows))

    def layer(self, index: int, name: str, weights: Weights) -> None:
        """Run a layer on all groups."""
        tensors, rounded = self._in_its_type(name, weights)
        self._skeleton.place(name, tensors)
        routed = []
        with self._rounding(rounded):
            for place, hidden in enumerate(self.hidden):
                out, chosen = run_layer(self._skeleton, index, hidden, is_embedded=index == 0)
                self.hidden[place] = out
                routed.append(chosen)
        self._skeleton.release(name)
        if all(each is not None for each in routed) and routed:
            self.routed.append([each for each in routed if each is not None])

    def scored(
        self,
        prompts: Sequence[Prompt],
        groups: list[list[int]],
        name: str,
        head: Weights,
        num_moe_layers: int,
    ) -> list[PromptScores]:
        """Log-probabilities of the prompts' tokens."""
        tensors, rounded = self._in_its_type(name, head, is_head=True)
        self._skeleton.place(name, tensors)
        of_prompt: dict[int, PromptScores] = {}
        with self._rounding(rounded):
            for group, hidden in enumerate(self.hidden):
                for row, prompt in enumerate(groups[group]):
                    logprobs = self._logprobs(hidden[row : row + 1], prompts[prompt])
                    of_prompt[prompt] = self._one(
                        prompts[prompt], logprobs, group, row, num_moe_layers
                    )
        self._skeleton.release(name)
        return [of_prompt[i] for i in range(len(prompts))]

    def _one(
        self, prompt: Prompt, logprobs: Tensor, group: int, row: int, num_moe_layers: int
    ) -> PromptScores:
        of_layers = [layer[group] for layer in self.routed]
        is_known = bool(of_layers) and len(of_layers) == num_moe_layers
        topk_ids = [each.topk_ids[row].numpy() for each in of_layers]
        margins = [each.margins[row].numpy() for each in of_layers if each.margins is not None]
        return PromptScores(
            np.asarray(prompt, dtype=np.int64),
            logprobs.double().numpy(),
            np.stack(topk_ids).astype(np.int64) if is_known else None,
            np.stack(margins) if is_known and len(margins) == len(topk_ids) else None,
        )

    def _logprobs(self, hidden: Tensor, prompt: Prompt) -> Tensor:
        """[len - 1], of each token but the first."""
        wanted = torch.tensor(prompt[1:])
        out = torch.empty(len(wanted))
        for start in range(0, len(wanted), _LOGIT_ROWS):
            rows = slice(start, min(start + _LOGIT_ROWS, len(wanted)))
            logits = run_head(self._skeleton, hidden[:, rows]).float()[0]
            out[rows] = logits.log_softmax(-1).gather(-1, wanted[rows, None])[:, 0]
        return out

    def _in_its_type(
        self, part: str, weights: Weights, *, is_head: bool = False
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """A part's tensors in this number type, and those whose products get rounded inputs."""
        module, dtypes = self._skeleton.model.get_submodule(part), self._skeleton.dtypes
        tensors, rounded = {}, []
        for name, tensor in weights.tensors.items():
            dtype = dtypes[f"{part}.{name}"]
            is_matrix = (
                self._type.weights is not None
                and tensor.dim() > 1
                and not name.endswith(_UNROUNDED)
                and (self._type.rounds_head or not is_head)
            )
            if is_matrix and name not in weights.narrow:
                owner = module.get_submodule(name.rpartition(".")[0])
                tensors[name] = self._rounded(
                    tensor, dtype, is_transposed=getattr(owner, "is_transposed", False)
                )
            else:
                tensors[name] = tensor.to(dtype)
            if is_matrix:
                rounded.append(tensors[name])
        return tensors, rounded

    def _rounded(self, tensor: Tensor, dtype: torch.dtype, *, is_transposed: bool) -> Tensor:
        """Each matrix of a tensor [..., out, in], or [..., in, out], rounded by itself."""
        assert self._type.weights is not None
        out = torch.empty(tensor.shape, dtype=dtype)
        matrices = tensor.view(-1, *tensor.shape[-2:])
        for into, matrix in zip(out.view(matrices.shape), matrices, strict=True):
            if is_transposed:
                into.copy_(self._type.weights(matrix.T.contiguous()).T)
            else:
                into.copy_(self._type.weights(matrix))
        return out

    def _rounding(self, matrices: list[Tensor]) -> Any:
        if self._type.inputs is None or not matrices:
            return nullcontext()
        return RoundedInputs(self._type.inputs, matrices)


def _groups(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Indices of prompts that run together: of one length, so that none is filled up."""
    of_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        of_length.setdefault(len(prompt), []).append(place)
    for length, places in sorted(of_length.items()):
        size = max(1, _GROUP_TOKENS // length)
        yield from (places[start : start + size] for start in range(0, len(places), size))
