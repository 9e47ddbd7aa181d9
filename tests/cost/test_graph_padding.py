"""Padding to the next size of graph costs little, by the H100 profile's law of dense products."""

import numpy as np
import pytest

from expertlane.cost.laws.device import DeviceModel
from expertlane.cost.laws.profile import read_profile
from expertlane.cost.step.operation import OpKind
from expertlane.spec.deployment import MOST_IN_GRAPHS, GraphLimits

SIZES = np.array(GraphLimits(MOST_IN_GRAPHS, 1).sizes)


@pytest.mark.parametrize(
    ("n", "k"), [(6144, 4096), (4096, 4096), (24576, 7168), (28672, 4096), (128256, 4096)]
)
def test_what_padding_adds(n, k):
    """Widths of queries, keys and values; output; an MLP's; the head's."""
    device = DeviceModel(read_profile("h100"))

    def seconds(num_rows):
        sizes = {"m": num_rows.astype(float), "n": float(n), "k": float(k)}
        return device.times(OpKind.GEMM, "bfloat16", sizes).seconds

    num_seqs = np.arange(1, MOST_IN_GRAPHS + 1)
    padded = SIZES[np.searchsorted(SIZES, num_seqs)]
    more = seconds(padded) / seconds(num_seqs) - 1
    for low, high, most, mean in (
        (0, 128, 0.02, 0.01),
        (128, 256, 0.04, 0.015),
        (256, 1024, 0.12, 0.04),
    ):
        assert more[low:high].max() <= most
        assert more[low:high].mean() <= mean
