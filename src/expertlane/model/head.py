"""The output head: from hidden states to the likeliest token."""

from typing import NamedTuple

import torch
from torch import Tensor

from expertlane.comm.interleave import Steps
from expertlane.comm.mesh import ParallelMesh
from expertlane.comm.recorder import Recorder
from expertlane.model.draw import NO_TOKEN, likeliest
from expertlane.model.forward_batch import ForwardBatch
from expertlane.model.norm import rms_norm
from expertlane.ops.linear import Linear
from expertlane.spec.layout import partition
from expertlane.spec.names import Stage


class HeadResult(NamedTuple):
    """What the last stage gives for a batch.

    Attributes:
        token_ids: [num_seqs]; the likeliest, the same on all tensor-parallel ranks, or `NO_TOKEN`
            where the greatest logit is not finite; None where more is needed.
        logits: [num_seqs, num_local_vocab] float32.
        all_logits: [num_seqs, vocab_size] float32; None unless needed.
    """

    token_ids: Tensor | None
    logits: Tensor
    all_logits: Tensor | None


class OutputHead:
    """Final norm, a rank's rows of the output head, and the choice of the likeliest token.

    Args:
        norm: [hidden_size].
        head: [num_local_vocab, hidden_size]; this rank's rows.
        vocab_size: of all ranks together.
    """

    def __init__(
        self,
        norm: Tensor,
        head: Tensor,
        vocab_size: int,
        mesh: ParallelMesh,
        recorder: Recorder,
        eps: float,
    ) -> None:
        self._norm = norm
        self._head = Linear(head)
        parts = partition(vocab_size, mesh.layout.tp)
        self._vocab_of_tp_rank = [len(part) for part in parts]
        self._first_token_id = parts[mesh.at.tp_rank].start
        self._mesh = mesh
        self._recorder = recorder
        self._eps = eps

    def forward(self, x: Tensor, batch: ForwardBatch, needs_logits: bool) -> Steps[HeadResult]:
        """The next token of every sequence of the batch that yields one.

        Args:
            x: [num_owned, hidden_size].
            needs_logits: more is asked for than the likeliest token.
        """
        enter, tp = self._recorder.enter, self._mesh.tp
        enter(Stage.HEAD)
        last = x[batch.last_tokens(self._mesh.at.tp_rank).to(x.device)]
        hidden = rms_norm(last, self._norm, self._eps)
        if tp.size > 1:
            enter(Stage.COLLECTIVES)
            hidden = yield tp.all_gather(hidden, batch.last_tokens_of_tp_rank)
            enter(Stage.HEAD)
        logits = self._head(hidden).float()
        num_seqs = len(hidden)
        self._recorder.count_compute(
            2 * num_seqs * self._head.num_weights, self._head.num_bytes if num_seqs else 0
        )
        if needs_logits:
            all_logits = logits
            if tp.size > 1:
                all_logits = yield from self._gather_logits(logits)
            return HeadResult(None, logits, all_logits)
        if tp.size == 1:
            return HeadResult(likeliest(logits), logits, None)
        token_ids = yield from self._likeliest(logits)
        return HeadResult(token_ids, logits, None)

    def _gather_logits(self, logits: Tensor) -> Steps[Tensor]:
        """[num_seqs, vocab_size], from every rank's part of the vocabulary."""
        recorder, tp = self._recorder, self._mesh.tp
        recorder.enter(Stage.COLLECTIVES)
        # The vocabulary is what is cut: it must be the rows.
        gathered = yield tp.all_gather(logits.t().contiguous(), self._vocab_of_tp_rank)
        recorder.enter(Stage.HEAD)
        return gathered.t()

    def _likeliest(self, logits: Tensor) -> Steps[Tensor]:
        """`likeliest` over all ranks' parts."""
        recorder, tp, num_seqs = self._recorder, self._mesh.tp, len(logits)
        if logits.shape[1]:
            value, token_id = logits.max(dim=-1)
        else:  # more ranks than vocabulary
            value, token_id = logits.new_full((num_seqs,), -torch.inf), logits.new_zeros(num_seqs)
        candidates = torch.stack([value.double(), (token_id + self._first_token_id).double()], 1)
        recorder.enter(Stage.COLLECTIVES)
        width = candidates.shape[1] * candidates.itemsize
        gathered = yield tp.all_gather(candidates, [num_seqs] * tp.size, metadata_bytes=width)
        recorder.enter(Stage.HEAD)
        by_rank = gathered.view(tp.size, num_seqs, 2)
        best = by_rank[:, :, 0].argmax(dim=0)  # the first of equals: the lowest token id
        value, token_id = by_rank[best, torch.arange(num_seqs, device=best.device)].unbind(1)
        return token_id.where(value.isfinite(), NO_TOKEN).long()
