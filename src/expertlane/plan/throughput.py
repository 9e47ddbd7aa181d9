"""From steps to what a user sees: tokens a second, TPOT and TTFT of a deployment under traffic.

Sequences are served without end: as soon as one is finished another begins. In one pool a token of
every running sequence costs a decode step and its share of the prefills that go on meanwhile; in
two pools both run side by side, and the slower one sets the pace.
"""

from dataclasses import dataclass

import numpy as np

from expertlane.cost.operation import Floats, Ints
from expertlane.plan.setting import Goals, Traffic
from expertlane.plan.structure import Screened

_LIKELY = 1


@dataclass(frozen=True, eq=False)
class Served:
    """A deployment at N numbers of running sequences; bounds: low, likely, high.

    Attributes:
        num_seqs: [N]; over the whole system.
        tps: [3, N]; output tokens a second over the whole system, low the fewest.
        tpot_s: [3, N]; a running sequence's mean time of a token, others' prefills included.
        ttft_s: [3, N]; of a prompt that arrives, with its wait in the queue; infinite where
            prefill takes all of the time.
        step_s: [3, N]; a decode step alone.
        prefill_tps: [3]; prompt tokens a second while nothing is decoded.
    """

    num_seqs: Ints
    tps: Floats
    tpot_s: Floats
    ttft_s: Floats
    step_s: Floats
    prefill_tps: Floats

    def best(self, goals: Goals) -> int | None:
        """The place with most tokens a second among those that keep the goals; None if none."""
        keeps = self.breach(goals) <= 1
        if not keeps.any():
            return None
        return int(np.where(keeps, self.tps[_LIKELY], -1).argmax())

    def breach(self, goals: Goals) -> Floats:
        """[N]; by what factor the worse limit is missed; 1 or less where both are kept."""
        worst = np.zeros(len(self.num_seqs))
        for limit, value in ((goals.max_tpot_s, self.tpot_s), (goals.max_ttft_s, self.ttft_s)):
            if limit is not None:
                worst = np.maximum(worst, value[_LIKELY] / limit)
        return worst


def served(screened: Screened, traffic: Traffic) -> Served:
    """One pool that does both."""
    assert screened.decode is not None, "it fits"
    assert screened.prefill is not None, "it fits"
    layout = screened.candidate.layout
    num_caches = layout.replicas * layout.dp
    num_seqs = np.minimum(screened.num_seqs * num_caches, max(traffic.num_sequences, num_caches))
    step_s, prefill_s = screened.decode.seconds, screened.prefill.seconds[:, 0]
    prefill_tps = screened.prefill_tokens * num_caches / prefill_s  # [3]; of the low time first
    prefill_share_s = traffic.prompt_len / traffic.output_len / prefill_tps[:, None]
    tpot_s = step_s + num_seqs * prefill_share_s
    tps = num_seqs / tpot_s
    # Of a server whose prompts wait for each other (M/D/1), and for the step under way.
    busy = np.minimum(num_seqs * prefill_share_s / tpot_s, 1)
    alone_s = screened.num_prompt_steps * prefill_s[:, None]
    own_s = traffic.prompt_len * num_caches / prefill_tps[:, None]
    with np.errstate(divide="ignore"):
        wait_s = np.where(busy < 1, busy / (2 * np.maximum(1 - busy, 1e-9)) * own_s, np.inf)
    return Served(
        num_seqs=num_seqs,
        tps=tps[::-1],
        tpot_s=tpot_s,
        ttft_s=step_s + wait_s + alone_s,
        step_s=step_s,
        prefill_tps=prefill_tps[::-1],
    )
