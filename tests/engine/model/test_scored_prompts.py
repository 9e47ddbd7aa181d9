"""Prompt tokens to be scored: those of chunks, in pieces that fit into memory."""

import numpy as np
import torch

from expertlane.engine.model.head import ScoredPrompts
from expertlane.schedule.plan import Batch
from expertlane.spec.sampling import SamplingParams, SamplingState

PROMPT = np.array([5, 3, 4, 1, 0, 2, 5, 5])
NONE = np.zeros(0, dtype=np.int64)


def state(num_top, output=NONE):
    return SamplingState(SamplingParams(prompt_logprobs=num_top), 0, PROMPT, output)


def batch(*seqs):
    """Of (sequence, computed tokens, new ones)."""
    ids, computed, new = map(np.array, zip(*seqs, strict=True))
    tokens = np.concatenate([PROMPT[c : c + n] for _, c, n in seqs])
    yields = computed + new == len(PROMPT)
    return Batch(ids, new, computed, tokens, np.zeros((len(seqs), 1), np.int32), yields)


def test_what_is_scored():
    states = {1: state(0), 2: state(2), 3: state(1, np.array([4])), 4: None, 5: state(2)}
    given = batch((1, 0, 3), (4, 0, 8), (2, 2, 6), (3, 0, 8), (5, 7, 1), (2, 0, 1))
    scored = ScoredPrompts.of_batch(given, states.get)
    assert scored.seq_ids == [1, 2, 2]
    assert scored.starts == [1, 3, 1]
    assert scored.rows.tolist() == [0, 1, 2, 11, 12, 13, 14, 15, 26]
    assert scored.token_ids.tolist() == [3, 4, 1, 1, 0, 2, 5, 5, 3]
    assert ScoredPrompts.of_batch(batch((4, 0, 8), (3, 0, 8)), states.get) is None
    assert ScoredPrompts.of_batch(batch((5, 7, 1)), states.get) is None


def test_pieces_are_as_the_whole():
    scored = ScoredPrompts.of_batch(batch((1, 0, 3), (2, 1, 7)), {1: state(1), 2: state(3)}.get)
    logits = torch.randn(len(scored.rows), 6, generator=torch.Generator().manual_seed(0))
    whole = scored.parts([scored.score(logits, slice(None))])
    chunks = scored.chunks(1 << 22)
    assert len(chunks) == 5
    pieces = scored.parts([scored.score(logits[chunk], chunk) for chunk in chunks])
    expected = logits.log_softmax(1).numpy()
    for seq_id, first, num_top in ((1, 0, 1), (2, 3, 3)):
        part, other = whole[seq_id], pieces[seq_id]
        assert part.top_ids.shape[1] == num_top
        for name in ("logprobs", "ranks", "top_ids", "top_logprobs"):
            np.testing.assert_array_equal(getattr(part, name), getattr(other, name), name)
        rows = expected[first : first + len(part.logprobs)]
        targets = scored.token_ids[first : first + len(rows)]
        np.testing.assert_allclose(part.logprobs, rows[np.arange(len(rows)), targets], rtol=1e-5)
        above = (rows > part.logprobs[:, None] + 1e-6).sum(1)
        np.testing.assert_array_equal(part.ranks, 1 + above)
