"""The fewest devices that serve a load."""

import pytest

import expertlane
from expertlane.planner.sizing import cluster_sizes
from expertlane.results.record import BEST
from expertlane.results.serving_record import is_served

ASKED = {"batch": 64, "prompt_len": 100, "output_len": 12, "skew": 0.8}


def num_served(results):
    chosen = results.faster_pools or results.select("projected", BEST)[0]
    return chosen.serving[0].num_running


def test_sizes_are_powers_of_two_in_a_node_then_whole_nodes():
    sizes = cluster_sizes(8)
    assert sizes[:7] == [1, 2, 4, 8, 16, 24, 32]
    assert sizes[-1] == 4096
    assert cluster_sizes(4)[:4] == [1, 2, 4, 8]
    assert cluster_sizes(1)[:3] == [1, 2, 3]


@pytest.mark.full
def test_the_smallest_cluster_serves_all_and_the_next_smaller_does_not():
    on_one = expertlane.plan("paper-small", cluster="h100x1", **ASKED)
    limit_s = 0.8 * on_one.select("projected", BEST)[0].serving[0].tpot_s.mean.value
    asked = ASKED | {"slo": f"tpot.mean={1e3 * limit_s:.6g}ms"}
    found = expertlane.plan("paper-small", cluster="h100xauto", **asked)
    num, fewer = found.cluster.num_devices, found.plans[0].fewer_devices
    sizes = cluster_sizes(8)
    assert sizes.index(num) == sizes.index(fewer.num_devices) + 1
    assert fewer.num_served < 64
    assert " ".join(found.headline.split()).startswith(
        f"{num} GPUs serve all 64 at once within the limits, {fewer.num_devices} "
    )
    smaller = expertlane.plan("paper-small", cluster=f"h100x{fewer.num_devices}", **asked)
    assert num_served(smaller) == fewer.num_served
    same = expertlane.plan("paper-small", cluster=f"h100x{num}", **asked)
    assert same.deployments[0] == found.deployments[0]


@pytest.mark.full
def test_the_smallest_cluster_for_a_rate_serves_it_and_the_next_smaller_does_not(monkeypatch):
    monkeypatch.setattr("expertlane.planner.candidates._MOST_SEQS", 16)
    asked = {key: value for key, value in ASKED.items() if key != "batch"}
    one = expertlane.plan("paper-small", cluster="h100x1", rate=1, **asked)
    rate = 1.5 * one.deployments[0].serving[0].output_tps.value / ASKED["output_len"]
    found = expertlane.plan("paper-small", cluster="h100xauto", rate=rate, **asked)
    num, fewer = found.cluster.num_devices, found.plans[0].fewer_devices
    sizes = cluster_sizes(8)
    assert sizes.index(num) == sizes.index(fewer.num_devices) + 1
    assert fewer.requests_per_s < rate
    assert " ".join(found.headline.split()).startswith(f"{num} GPUs serve {rate:,g} requests/s, ")
    served = found.faster_pools or found.deployments[0]
    assert is_served(served.serving[-1])
    assert served.serving[-1].requests_per_s.value == pytest.approx(rate)


def test_one_device_may_be_enough():
    found = expertlane.plan("paper-tiny", cluster="h100xauto", batch=2, prompt_len=8, output_len=8)
    assert found.cluster.num_devices == 1
    assert found.headline.startswith("1 GPU serves all 2 at once. Use ")
    assert found.question["projection"]["cluster"] == "h100x1"


def test_a_limit_that_no_cluster_keeps_gets_one_line():
    with pytest.raises(expertlane.UserError) as caught:
        expertlane.plan(
            "paper-tiny", cluster="h100xauto", slo="tpot.mean=0.001ms", **ASKED | {"prompt_len": 8}
        )
    assert str(caught.value).startswith("no cluster of up to ")
    assert "\n" not in str(caught.value)
