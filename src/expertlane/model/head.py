"""The output head: from hidden states to the likeliest token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from expertlane.model.forward_batch import ForwardBatch
from expertlane.model.norm import rms_norm
from expertlane.parallel.interleave import Steps
from expertlane.parallel.mesh import ParallelMesh
from expertlane.parallel.recorder import Recorder
from expertlane.spec.names import Stage


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
