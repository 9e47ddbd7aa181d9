"""A decoder layer as a generator that yields where it waits for communication."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.model.attention import Attention, KVCache
from expertlane.model.forward_batch import ForwardBatch
from expertlane.moe.dispatch import AllToAllDispatcher
from expertlane.moe.experts import Experts
from expertlane.moe.router import route
from expertlane.parallel.interleave import Steps
from expertlane.parallel.mesh import ParallelMesh
from expertlane.parallel.recorder import Recorder
from expertlane.spec.names import Stage


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32.

    Args:
        x: [..., hidden_size].
        weight: [hidden_size].
    """
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """What one rank holds of a layer besides attention's and the experts' matrices.

    Attributes:
        attention_norm, moe_norm: [hidden_size].
        router: [num_experts, hidden_size] float32: near ties must not turn on rounding.
    """

    attention_norm: Tensor
    moe_norm: Tensor
    router: Tensor


class DecoderLayer:
    """Pre-norm attention and MoE block; tokens stay with their owners between layers."""

    def __init__(
        self,
        index: int,
        weights: LayerWeights,
        attention: Attention,
        experts: Experts,
        dispatcher: AllToAllDispatcher,
        mesh: ParallelMesh,
        recorder: Recorder,
        *,
        top_k: int,
        eps: float,
        first_expert: int,
    ) -> None:
        self.index = index
        self._weights = weights
        self._attention = attention
        self._experts = experts
        self._dispatcher = dispatcher
        self._mesh = mesh
        self._recorder = recorder
        self._top_k = top_k
        self._eps = eps
        self._first_expert = first_expert

    def forward(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Steps[Tensor]:
        """Run the layer on the tokens this rank owns.

        Args:
            x: [num_owned, hidden_size].

        Returns:
            [num_owned, hidden_size].
        """
        x = yield from self._attention_block(x, batch, cache)
        return (yield from self._moe_block(x, batch))

    def _attention_block(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Steps[Tensor]:
        enter, tp = self._recorder.enter, self._mesh.tp
        enter(Stage.ATTENTION, self.index)
        hidden = rms_norm(x, self._weights.attention_norm, self._eps)
        if tp.size > 1:
            enter(Stage.COLLECTIVES, self.index)
            hidden = yield tp.all_gather(hidden, batch.tokens_of_tp_rank)
            enter(Stage.ATTENTION, self.index)
        hidden = self._attention.forward(hidden, batch, cache)
        if tp.size > 1:
            enter(Stage.COLLECTIVES, self.index)
            hidden = yield tp.reduce_scatter(hidden, batch.tokens_of_tp_rank)
        return x + hidden

    def _moe_block(self, x: Tensor, batch: ForwardBatch) -> Steps[Tensor]:
        recorder, index, router = self._recorder, self.index, self._weights.router
        recorder.enter(Stage.ROUTER, index)
        hidden = rms_norm(x, self._weights.moe_norm, self._eps)
        topk_ids, topk_weights = route(F.linear(hidden.float(), router), self._top_k)
        recorder.count_compute(2 * len(x) * router.numel(), router.nbytes if len(x) else 0)
        recorder.enter(Stage.DISPATCH, index)
        arrived = yield from self._dispatcher.dispatch(
            hidden, topk_ids, topk_weights, batch.tokens_of_stage_rank
        )
        recorder.enter(Stage.EXPERTS, index)
        results = self._experts.forward(arrived.rows, arrived.num_tokens_per_expert)
        recorder.count_compute(*self._experts.compute_cost(arrived.num_tokens_per_expert))
        if self._mesh.at.etp_rank == 0:
            recorder.count_expert_tokens(self._first_expert, arrived.num_tokens_per_expert)
        recorder.enter(Stage.COMBINE, index)
        combined = yield from self._dispatcher.combine(arrived, results, topk_weights)
        return x + combined


class OutputHead:
    """Final norm, a rank's rows of the output head, and the choice of the likeliest token.

    Args:
        norm: [hidden_size].
        head: [num_local_vocab, hidden_size]; the rows from `first_token_id` on.
    """

    def __init__(
        self,
        norm: Tensor,
        head: Tensor,
        first_token_id: int,
        mesh: ParallelMesh,
        recorder: Recorder,
        eps: float,
    ) -> None:
        self._norm = norm
        self._head = head
        self._first_token_id = first_token_id
        self._mesh = mesh
        self._recorder = recorder
        self._eps = eps

    def forward(self, x: Tensor, batch: ForwardBatch) -> Steps[tuple[Tensor, Tensor]]:
        """The next token of every sequence of the batch.

        Args:
            x: [num_owned, hidden_size].

        Returns:
            token_ids: [num_seqs], the same on all tensor-parallel ranks.
            logits: [num_seqs, num_local_vocab] float32.
        """
        enter, tp = self._recorder.enter, self._mesh.tp
        enter(Stage.HEAD)
        last = x[batch.last_tokens(self._mesh.at.tp_rank).to(x.device)]
        hidden = rms_norm(last, self._norm, self._eps)
        if tp.size > 1:
            enter(Stage.COLLECTIVES)
            hidden = yield tp.all_gather(hidden, batch.last_tokens_of_tp_rank)
            enter(Stage.HEAD)
        logits = F.linear(hidden, self._head).float()
        num_seqs = len(hidden)
        self._recorder.count_compute(
            2 * num_seqs * self._head.numel(), self._head.nbytes if num_seqs else 0
        )
        if tp.size == 1:
            return logits.argmax(dim=-1), logits
        if logits.shape[1]:
            value, token_id = logits.max(dim=-1)
        else:  # more ranks than vocabulary
            value, token_id = logits.new_full((num_seqs,), -torch.inf), logits.new_zeros(num_seqs)
        candidates = torch.stack([value.double(), (token_id + self._first_token_id).double()], 1)
        enter(Stage.COLLECTIVES)
        width = candidates.shape[1] * candidates.itemsize
        gathered = yield tp.all_gather(candidates, [num_seqs] * tp.size, metadata_bytes=width)
        enter(Stage.HEAD)
        by_rank = gathered.view(tp.size, num_seqs, 2)
        best = by_rank[:, :, 0].argmax(dim=0)  # the first of equals: the lowest token id
        return by_rank[best, torch.arange(num_seqs, device=best.device), 1].long(), logits
