"""Dispatch whose host waits for nothing, on a GPU; skipped where there is none."""

import numpy as np
import pytest
import torch

from engine.moe.in_process import dispatch_and_combine
from engine.moe.test_dispatch_forms import expected, random_inputs
from expertlane.balance.placement import Placement
from expertlane.engine.ops.device import waits_raise
from expertlane.spec.layout import Layout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def no_wait():
    """Whatever makes the host wait for the GPU raises."""
    return waits_raise(torch.device("cuda"))


@pytest.mark.parametrize("payload", ["model", "float8"])
@pytest.mark.parametrize("form", ["static", "all_gather"])
@pytest.mark.parametrize("layout", ["dp=2,ep=2", "dp=2,tp=2,ep=2", "dp=4,ep=4"])
def test_the_host_waits_for_nothing_and_no_padding_is_seen(layout, form, payload):
    """All ranks of the layout share the GPU and this process."""
    parsed = Layout.parse(layout)
    placement = Placement.round_robin(5, parsed.ep, 2)
    inputs = random_inputs(np.random.default_rng(1), parsed.world_size, 5, 3, 40)
    how = {"payload": payload, "device": torch.device("cuda")}
    dispatch_and_combine(layout, placement, form, inputs, **how)  # kernels are compiled
    combined, _ = dispatch_and_combine(layout, placement, form, inputs, during=no_wait, **how)
    bound = {"model": 1e-6, "float8": 2**-3}[payload]
    for found, wanted, (x, _, weights) in zip(combined, expected(inputs), inputs, strict=True):
        most = np.abs(x).max(initial=0) * 5 * weights.sum(1).max(initial=0)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=bound * most + 1e-12)
