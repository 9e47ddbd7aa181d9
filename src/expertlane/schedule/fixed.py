"""The scheduler of a fixed workload: every sequence present from the start, lengths known."""

from collections import deque

import numpy as np

from expertlane.schedule.plan import Batch, StepOutcome, StepPlan
from expertlane.spec.deployment import Deployment
from expertlane.spec.names import Phase
from expertlane.spec.partition import partition
from expertlane.spec.workload import Workload


class _Group:
    """Sequences of one replica that step together: the micro-batches of one plan."""

    def __init__(self, replica: int, micro_batches: list[list[list[int]]]) -> None:
        self.replica = replica
        self.micro_batches = micro_batches  # [num_micro_batches][dp] lists of sequence ids
        self.num_decoded = 0  # outcomes taken since the prefill


class FixedScheduler:
    """Prefill of all sequences, then decoding, one `Phase` at a time.

    Sequences are shared out near-equally: over replicas, then data-parallel ranks, then
    micro-batches. Drained, a step holds all micro-batches and only one step a replica is in
    flight. Rotating, each micro-batch is a step of its own, with up to `pp` in flight.

    Args:
        prompts: [num_sequences, prompt_len].
        forced: [num_sequences, output_len]; tokens fed back in place of those sampled.
    """

    def __init__(
        self,
        workload: Workload,
        deployment: Deployment,
        prompts: np.ndarray,
        *,
        forced: np.ndarray | None = None,
        return_logits: bool = False,
        record: bool = True,
    ) -> None:
        self._output_len = workload.output_len
        self._prompts = prompts
        self._forced = forced
        self._flags = {"return_logits": return_logits, "record": record}
        self._outputs: dict[int, list[int]] = {}
        self._slots: dict[int, int] = {}
        self._phase = Phase.PREFILL
        self._num_steps = 0
        layout, options = deployment.layout, deployment.options
        rotating = options.micro_batch_schedule == "rotating"
        self._max_in_flight = layout.pp if rotating else 1
        self._in_flight = [0] * layout.replicas
        self._groups: list[_Group] = []
        for replica, seqs in enumerate(partition(len(prompts), layout.replicas)):
            micro_batches = self._share_out(seqs, layout.dp, options.num_micro_batches)
            # One without any sequence would only cost time; the batches of some ranks may be empty.
            micro_batches = [micro_batch for micro_batch in micro_batches if any(micro_batch)]
            if rotating:
                self._groups += [_Group(replica, [micro_batch]) for micro_batch in micro_batches]
            elif micro_batches:
                self._groups.append(_Group(replica, micro_batches))
        self._ready: list[deque[_Group]] = [deque() for _ in range(layout.replicas)]
        self._running: dict[int, _Group] = {}
        for group in self._groups:
            self._ready[group.replica].append(group)

    def _share_out(self, seqs: range, dp: int, num_micro_batches: int) -> list[list[list[int]]]:
        micro_batches: list[list[list[int]]] = [[] for _ in range(num_micro_batches)]
        for of_dp_rank in partition(len(seqs), dp):
            mine = seqs[of_dp_rank.start : of_dp_rank.stop]
            self._slots |= {seq: slot for slot, seq in enumerate(mine)}
            for micro_batch, part in zip(
                micro_batches, partition(len(mine), num_micro_batches), strict=True
            ):
                micro_batch.append(list(mine[part.start : part.stop]))
        return micro_batches

    @property
    def outputs(self) -> dict[int, list[int]]:
        """The tokens generated so far, by sequence id."""
        return self._outputs

    def start_decode(self) -> bool:
        """Go from prefill to decode; False where a prefill gave all the tokens asked for."""
        self._phase = Phase.DECODE
        if self._output_len == 1:
            return False
        for group in self._groups:
            self._ready[group.replica].append(group)
        return True

    def next_plan(self) -> StepPlan | None:
        """The next step, or None while no more may be in flight or the phase is done."""
        for replica, ready in enumerate(self._ready):
            if ready and self._in_flight[replica] < self._max_in_flight:
                group = ready.popleft()
                self._in_flight[replica] += 1
                plan = StepPlan(
                    step=self._num_steps,
                    replica=replica,
                    phase=self._phase,
                    micro_batches=tuple(
                        tuple(self._batch(seqs, group.num_decoded) for seqs in micro_batch)
                        for micro_batch in group.micro_batches
                    ),
                    **self._flags,
                )
                self._running[plan.step] = group
                self._num_steps += 1
                return plan
        return None

    def _batch(self, seqs: list[int], num_decoded: int) -> Batch:
        prompt_len = self._prompts.shape[1]
        if self._phase is Phase.PREFILL:
            num_new, num_computed = prompt_len, 0
            token_ids = self._prompts[seqs].reshape(-1)
        else:
            num_new, num_computed = 1, prompt_len + num_decoded
            source = self._forced if self._forced is not None else self._outputs
            token_ids = np.array([source[seq][num_decoded] for seq in seqs], dtype=np.int64)
        return Batch(
            seq_ids=np.array(seqs, dtype=np.int64),
            slots=np.array([self._slots[seq] for seq in seqs], dtype=np.int64),
            num_scheduled_tokens=np.full(len(seqs), num_new, dtype=np.int64),
            num_computed_tokens=np.full(len(seqs), num_computed, dtype=np.int64),
            token_ids=token_ids,
        )

    def finish(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Take in the tokens of a finished step."""
        group = self._running.pop(plan.step)
        self._in_flight[plan.replica] -= 1
        for seq, token in outcome.token_ids.items():
            self._outputs.setdefault(seq, []).append(token)
        if plan.phase is Phase.DECODE:
            group.num_decoded += 1
            if group.num_decoded < self._output_len - 1:
                self._ready[group.replica].append(group)
