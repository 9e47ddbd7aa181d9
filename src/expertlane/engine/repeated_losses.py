"""Requests whose steps are lost again and again, while those of others are committed."""

from collections.abc import Collection, Sequence

from expertlane.schedule.plan import StepPlan


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
        """Of the request that has most."""
        return max((num_losses for num_losses, _ in self._found.values()), default=0)

    def add(self, plans: Sequence[StepPlan], replicas: Collection[int]) -> None:
        """Count a loss.

        Args:
            plans: all that are not committed, in their order.
            replicas: that lost ranks.
        """
        computed: dict[int, int] = {}  # of each sequence before its first step that is lost
        for batch in [b for plan in plans if plan.replica in replicas for b in plan.batches]:
            pairs = zip(batch.seq_ids.tolist(), batch.num_computed_tokens.tolist(), strict=True)
            for seq, num_computed in pairs:
                computed.setdefault(seq, num_computed)
        for seq, num_computed in computed.items():
            num_losses, furthest = self._found.get(seq, (0, 0))
            self._found[seq] = num_losses + 1, max(furthest, num_computed)

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
        """Forget all: no request is unfinished."""
        self._found.clear()
