"""The choice of experts: scores by hand, and scores that are no numbers."""

import pytest
import torch

from expertlane.engine.ops.router import route
from expertlane.spec.model import Routing


def test_by_hand():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    ids, weights = route(logits, 2, Routing(scoring_func="sigmoid", norm_topk_prob=False))
    assert ids.tolist() == [[1, 3]]
    assert weights[0].tolist() == pytest.approx([0.952574, 0.880797], abs=1e-6)
    bias = torch.tensor([0.0, -1.0, 1.0, 0.0])
    assert route(logits, 2, Routing(scoring_func="sigmoid"), bias)[0].tolist() == [[2, 3]]


@pytest.mark.parametrize("has_groups", [False, True])
def test_what_is_no_number_stays_so(has_groups):
    """With experts that exist, so that nothing else is read; another token is as it was."""
    logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    logits[0, 5] = torch.nan
    groups = {"n_group": 4, "topk_group": 2} if has_groups else {}
    ids, weights = route(logits, 3, Routing(scoring_func="sigmoid", **groups))
    assert weights[0].isnan().all()
    assert ((ids >= 0) & (ids < 8)).all()
    assert weights[1].isfinite().all()
