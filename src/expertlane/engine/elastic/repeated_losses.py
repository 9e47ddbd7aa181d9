"""Requests whose steps are lost again and again, while those of others are committed."""

from collections.abc import Collection, Sequence

from expertlane.schedule.plan import StepPlan
from expertlane.spec.members import DpRank


class RepeatedLosses:
    """Counts, for each request, losses in its steps since it last got further than ever before.

    A request that ends ranks does so at the same position each time: its steps up to there may be
    committed again after each loss, those beyond never are.
    """

    def __init__(self) -> None:
        # By sequence: losses, and its computed tokens when it had most of them.
        self._found: dict[int, tuple[int, int]] = {}

    @property
    def most(self) -> int:
        """The largest number of losses of a request."""
        return max((num_losses for num_losses, _ in self._found.values()), default=0)

    def add(
        self, plans: Sequence[StepPlan], replicas: Collection[int], most: int
    ) -> tuple[int, DpRank] | None:
        """Count a loss.

        Args:
            plans: all that are not committed, in their order.
            replicas: that lost ranks.
            most: losses that a request may have.

        Returns:
            The newest of the sequences that would have more now, and where it is; None if none
            would. The others ran before it came, so it is the likeliest cause; it is forgotten.
        """
        struck: dict[int, tuple[int, DpRank]] = {}  # computed before the first step that is lost
        for plan in plans:
            parts = [
                (dp_rank, batch)
                for micro_batch in plan.micro_batches
                for dp_rank, batch in enumerate(micro_batch)
                if plan.replica in replicas
            ]
            for dp_rank, batch in parts:
                pairs = zip(batch.seq_ids.tolist(), batch.num_computed_tokens.tolist(), strict=True)
                for seq, num_computed in pairs:
                    struck.setdefault(seq, (num_computed, (plan.replica, dp_rank)))
        newest: int | None = None
        for seq, (num_computed, _) in struck.items():
            num_losses, furthest = self._found.get(seq, (0, 0))
            self._found[seq] = min(num_losses + 1, most), max(furthest, num_computed)
            if num_losses == most and (newest is None or seq > newest):
                newest = seq
        if newest is None:
            return None
        del self._found[newest]
        return newest, struck[newest][1]

    def committed(self, plan: StepPlan) -> None:
        """Forget the losses of requests that a step has brought further; a hot path."""
        if not self._found:
            return
        for batch in plan.batches:
            ends = (batch.num_computed_tokens + batch.num_scheduled_tokens).tolist()
            for seq, end in zip(batch.seq_ids.tolist(), ends, strict=True):
                if seq in self._found and end > self._found[seq][1]:
                    del self._found[seq]

    def clear(self) -> None:
        """Forget all losses, since no request is unfinished."""
        self._found.clear()
