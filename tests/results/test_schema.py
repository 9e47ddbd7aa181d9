from dataclasses import replace

import pytest

import example_results as example
from expertlane.errors import UserError
from expertlane.results.layout_sizes import LayoutSizes
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase


def test_sources_do_not_mix() -> None:
    given = example.usual()
    reported = replace(given.deployments[1], source="reported")
    with pytest.raises(UserError, match="mix sources: measured, reported"):
        replace(given, deployments=(given.deployments[0], reported))


def test_no_deployment_and_one_name_twice() -> None:
    given = example.usual()
    with pytest.raises(UserError, match="without a deployment"):
        replace(given, deployments=())
    with pytest.raises(UserError, match="one deployment twice"):
        replace(given, deployments=given.deployments[:1] * 2)


def test_cause_shares_add_up_to_1() -> None:
    for deployment in example.usual().deployments:
        for phase in Phase:
            assert sum(deployment.cause_shares(phase).values()) == pytest.approx(1)


def test_layout_sizes_round_trip() -> None:
    layout = Layout(replicas=2, pp=3, dp=4, tp=5, ep=10)
    assert LayoutSizes.of(layout).layout == layout


def test_oversubscription() -> None:
    assert example.machine(num_cores=2).is_oversubscribed
    assert example.machine(num_cores=2).ranks_per_core == 8
    assert not example.machine(num_cores=16).is_oversubscribed
    assert not replace(example.machine(), device="NVIDIA H100").is_oversubscribed
