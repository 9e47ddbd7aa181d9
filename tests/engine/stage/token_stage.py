"""A rank's stage without a model: its cache holds token ids, its logits are drawn from them."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import torch

from expertlane.balance.transition import Arrangement
from expertlane.engine.model.head import HeadResult, ScoredPrompts
from expertlane.engine.model.sampler import Sampler
from expertlane.engine.stage.deployed_stage import DeployedStage, UncommittedChanges, with_chosen
from expertlane.spec.layout import Members
from expertlane.spec.sampling import SamplingParams
from schedule.paged import UNWRITTEN, sequences

POISON = 25
CPU = torch.device("cpu")
PARAMS = (
    None,
    SamplingParams(temperature=0, repetition_penalty=1.8),
    SamplingParams(temperature=0.8, frequency_penalty=0.7, presence_penalty=-0.3),
    SamplingParams(top_k=5, top_p=0.9, repetition_penalty=1.2, logprobs=2),
)


class TokenStage(DeployedStage):
    """A stage whose cache holds token ids and whose logits are drawn from all before them.

    Args:
        can_fail: sequences with `POISON` get logits that are not finite.
        before_output: called in the middle of a step, when the cache is written; it may raise.
    """

    def __init__(
        self,
        layout,
        limits,
        *,
        can_fail=False,
        rank=0,
        placements=0,
        before_output=lambda: None,
        members=None,
    ):
        self.at = layout.coordinates(rank)
        members = members or Members(layout)
        arrangement = Arrangement.alike(members, (), layout.world_size)
        self.spec = SimpleNamespace(layout=layout, members=members, arrangement=arrangement)
        self.stage = SimpleNamespace(leave_cache=lambda: self._cache, held_weights=lambda: None)
        self._recorder = SimpleNamespace(
            begin_step=lambda *args, **kwargs: None,
            set_micro_batch=lambda number: None,
            enter=lambda stage: None,
            end_step=lambda: None,
        )
        self._mesh = SimpleNamespace(
            is_last_stage=self.at.pp_rank == layout.pp - 1, at=self.at, renew=lambda: None
        )
        self._await_device = None  # there is none
        self.migration = StubMigration(placements)
        self._phase = None
        self._sends = deque()
        self._vocab_size = limits.vocab_size
        self._sampler = Sampler(limits.vocab_size, CPU)
        self._changes = UncommittedChanges(self._sampler, {})
        self._cache = np.full((limits.num_blocks, limits.block_size), UNWRITTEN)
        self._can_fail, self._before_output = can_fail, before_output

    def take(self, left):
        """Go on with what a stage before it on this rank has left."""
        if left.caches is not None:
            self._cache = left.caches
            self._sampler = left.sampler
            self._changes = UncommittedChanges(self._sampler, left.tokens)

    def _begin_input(self, micro_batch, chosen):
        return [with_chosen(micro_batch.own, chosen)], None

    def _run_micro_batch(self, parts, arriving):
        (batch,) = parts
        size, seq_ids = self._cache.shape[1], []
        logits = [torch.empty(0, self._vocab_size)]
        for seq, start, fed, table, yields in sequences(batch):
            positions = np.arange(start + len(fed))
            places = table[positions // size], positions % size
            self._cache[places[0][start:], places[1][start:]] = fed
            known = self._cache[places].tolist()
            assert UNWRITTEN not in known, "it reads what was never written"
            if yields:
                seq_ids.append(seq)
                logits.append(self._logits(known))
        self._before_output()
        if not self._mesh.is_last_stage:
            return []
        rows = torch.cat(logits)
        return [(seq_ids, HeadResult(None, rows, rows, self._score(batch)))]

    def _score(self, batch):
        """Log-probabilities of prompt tokens, made up of the token and its place."""
        scored = ScoredPrompts.of_batch(batch, self._sampler.state)
        if scored is None:
            return {}
        places = np.concatenate(
            [
                start + np.arange(end - begin)
                for start, begin, end in zip(
                    scored.starts, scored.borders[:-1], scored.borders[1:], strict=True
                )
            ]
        )
        drawn = -(scored.token_ids + places / 64).astype(np.float32)
        top = np.zeros((len(drawn), max(scored.num_top_of)))
        columns = drawn, places.astype(np.int32), top.astype(np.int32), top.astype(np.float32)
        return scored.parts([tuple(map(torch.from_numpy, columns))])

    def _logits(self, known):
        drawn = np.random.default_rng(known).normal(size=(1, self._vocab_size))
        logits = torch.from_numpy(drawn).float()
        return logits * torch.nan if self._can_fail and POISON in known else logits

    def state(self):
        """All that outlives a step."""
        sampled = {
            seq: each.as_committed().output_token_ids.tolist()
            for seq, each in self._sampler._admitted.items()
        }
        return self.migration.now, sampled, self._cache.tolist()


class StubMigration:
    """Placements are numbers."""

    def __init__(self, placements):
        self.now = placements

    def apply_placements(self, placements):
        before, self.now = self.now, placements
        return before

    def restore(self, before):
        self.now = before

    def forget(self):
        pass
