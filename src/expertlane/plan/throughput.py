"""From steps to what a user sees: tokens a second, TPOT and TTFT of a deployment under traffic.

Sequences are served without end: as soon as one is finished another begins. In one pool a token of
every running sequence costs a decode step and its share of the prefills that go on meanwhile. In
two pools both run side by side, and the slower one sets the pace.

The first token is computed by the last step of a prompt, so TTFT ends there; in two pools its keys
and values travel after that, which delays the second token and counts in TPOT.
"""

from dataclasses import dataclass

import numpy as np

from expertlane.cost.step.operation import Floats, Ints
from expertlane.plan.setting import Goals, Traffic
from expertlane.plan.structure import Prompts
from expertlane.spec.layout import Layout

LIKELY = 1


@dataclass(frozen=True, eq=False)
class Steps:
    """A deployment's steps; bounds: low, likely, high.

    Attributes:
        num_seqs: [N]; sequences in a decode step, over the whole system.
        decode_s: [3, N].
        prefill_s: [3]; one step, of `prompts` on each data-parallel rank.
        most_seqs: that are there at once, over the whole system; fewer than data-parallel ranks
            leave some idle.
    """

    layout: Layout
    num_seqs: Ints
    decode_s: Floats
    prefill_s: Floats
    prompts: Prompts
    most_seqs: int

    @property
    def num_caches(self) -> int:
        """Data-parallel ranks that have any sequence."""
        return min(self.layout.replicas * self.layout.dp, self.most_seqs)

    @property
    def num_prompts(self) -> int:
        """In a prefill step, over the whole system."""
        return min(self.prompts.num_seqs * self.num_caches, self.most_seqs)

    @property
    def prefill_tps(self) -> Floats:
        """[3]; prompt tokens a second while nothing is decoded; of the low time first."""
        tps: Floats = self.num_prompts * self.prompts.num_new / self.prefill_s
        return tps


@dataclass(frozen=True, eq=False)
class Served:
    """A deployment under traffic, at N numbers of running sequences; bounds: low, likely, high.

    Attributes:
        num_seqs: [N]; over the whole system.
        tps: [3, N]; output tokens a second over the whole system.
        tpot_s: [3, N]; mean time of a sequence's tokens after the first, others' prefills, or the
            transfer from another pool, included.
        ttft_s: [3, N]; from a prompt's arrival to its last step's end, with its wait in the queue;
            infinite where prefill takes all of the time.
    """

    num_seqs: Ints
    tps: Floats
    tpot_s: Floats
    ttft_s: Floats

    def best(self, goals: Goals) -> int | None:
        """The place with most tokens a second among those that keep the goals; None if none."""
        keeps = self.breach(goals) <= 1
        if not keeps.any():
            return None
        return int(np.where(keeps, self.tps[LIKELY], -1).argmax())

    def breach(self, goals: Goals) -> Floats:
        """[N]; by what factor the worse limit is missed; 1 or less where both are kept."""
        worst = np.zeros(len(self.num_seqs))
        for limit, value in ((goals.max_tpot_s, self.tpot_s), (goals.max_ttft_s, self.ttft_s)):
            if limit is not None:
                worst = np.maximum(worst, value[LIKELY] / limit)
        return worst


def one_pool(steps: Steps, traffic: Traffic) -> Served:
    """A pool that does both."""
    per_token = traffic.prompt_len / traffic.output_len
    prefill_s = per_token / steps.prefill_tps[:, None]  # of one sequence, for each output token
    tpot_s = steps.decode_s + steps.num_seqs * prefill_s
    busy = steps.num_seqs * prefill_s / tpot_s
    return Served(
        num_seqs=steps.num_seqs,
        tps=(steps.num_seqs / tpot_s)[::-1],
        tpot_s=tpot_s,
        ttft_s=steps.decode_s + _prompt_s(steps, traffic, busy),
    )


def two_pools(prefill: Steps, decode: Steps, transfer_s: Floats, traffic: Traffic) -> Served:
    """A pool for prompts, and one for the rest.

    No more sequences are in both together than the traffic has: while a prompt is computed and
    travels, its sequence is not decoded.

    Args:
        transfer_s: [3]; of a prompt's keys and values.
    """
    could_tps = decode.num_seqs / decode.decode_s
    fed_tps = prefill.prefill_tps[:, None] / traffic.prompt_len * traffic.output_len
    before_s = prefill.prompts.num_steps * prefill.prefill_s + transfer_s
    of_sequence_s = decode.decode_s + before_s[:, None] / traffic.output_len
    tps = np.minimum(np.minimum(could_tps, fed_tps), traffic.num_sequences / of_sequence_s)
    # A pool that is fed less has fewer sequences running; a step of fewer is taken to be as long.
    busy = tps / fed_tps
    num_later = max(traffic.output_len - 1, 1)
    return Served(
        num_seqs=decode.num_seqs,
        tps=tps[::-1],
        tpot_s=decode.decode_s + transfer_s[:, None] / num_later,
        ttft_s=_prompt_s(prefill, traffic, np.minimum(busy, _MOST_BUSY)),
    )


_MOST_BUSY = 0.95  # a queue that is never empty has no mean wait; admission keeps it short


def _prompt_s(steps: Steps, traffic: Traffic, busy: Floats) -> Floats:
    """[3, N]; a prompt's own steps and its wait: M/D/1, a server for each data-parallel rank.

    Args:
        busy: [3, N]; the share of the time in which prompts are computed.
    """
    own_s = traffic.prompt_len * steps.num_caches / steps.prefill_tps[:, None]
    with np.errstate(divide="ignore"):
        wait_s = np.where(busy < 1, own_s * busy / (2 * (1 - busy)), np.inf)
    whole: Floats = wait_s + steps.prompts.num_steps * steps.prefill_s[:, None]
    return whole
