"""A quick calibration on two ranks: a profile that can be read, and projected with."""

import os
from dataclasses import replace

import numpy as np
import pytest

from cost.projected import at_bound
from expertlane.balance.holding import placements_of
from expertlane.calibrate import run as calibrate
from expertlane.calibrate.run import CPU_GRID, GPU_GRID
from expertlane.calibrate.steps import limits_for, phase_times, run_batch
from expertlane.cost.laws.device import DeviceModel
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import Execution, Terms, read_profile, write_profile
from expertlane.cost.laws.times import Basis
from expertlane.cost.pricing import Pricing
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.runner import CostRunner
from expertlane.cost.step.operation import (
    OF_MIXERS,
    SIZES,
    HandOver,
    NumberTypes,
    OpKind,
    RankGroups,
    Transfer,
    TransferKind,
    flops_of,
)
from expertlane.cost.step.program import ProgramBuilder
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.pool import RankPool
from expertlane.spec.deployment import Deployment, DispatchTable, Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Stage

_MEASURED = set(OpKind) - set(OF_MIXERS)
TINY = replace(
    CPU_GRID,
    gemm_m=(1, 16),
    gemm_nk=((256, 256), (512, 256)),
    router_nk=((8, 256),),
    expert_tokens=(1, 4),
    expert_counts=(1, 2),
    expert_shapes=((256, 256),),
    memory_bytes=(1024, 65536),
    heads=((4, 4, 64),),
    latent_heads=((4, 576, 512),),
    latent_seqs=(1,),
    decode_seqs=(1, 4),
    decode_positions=(16, 64),
    prefill_seqs=(1,),
    prefill_tokens=(16, 32),
    transfer_bytes=(64, 65536),
    contended_bytes=(4096,),
    num_rounds=1,
    point_s=1e-4,
    step_seqs=(2,),
    step_layers=(1, 2),
)
MODEL = PRESETS["paper-tiny"]


@pytest.fixture(
    scope="module", params=[pytest.param("float32", marks=pytest.mark.full), "bfloat16"]
)
def profile(request, tmp_path_factory):
    """As read from the file that a calibration wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_MOST_TRIES", 1)
        patch.setenv("EXPERTLANE_PIN", "1")  # other tests run beside this one
        with RankPool(LocalRanks(2, 60.0, request.param), 60.0) as pool:
            calibration = calibrate.Calibration(pool, 2, TINY)
            calibration.run()
            found = calibration.profile("test")
    assert len(calibration.measured.operations) == 1
    path = tmp_path_factory.mktemp("profiles") / "test.toml"
    return read_profile(write_profile(found, path)), request.param


@pytest.mark.full
def test_every_law_is_measured_and_says_where(profile):
    found, dtype = profile
    kinds = {str(kind) if kind is OpKind.MEMORY else f"{kind}.{dtype}" for kind in _MEASURED}
    transfers = {"all_gather", "reduce_scatter", "all_to_all", "send"}
    links = {f"{kind}.all_links" for kind in transfers}
    assert set(found.surfaces) == kinds | links | {"gemm.float32"}
    for law in [*found.surfaces.values(), *found.terms.values()]:
        assert law.basis is Basis.MEASURED
        assert f"2 ranks at once, each on a core of its own, {dtype}" in law.origin or (
            (os.cpu_count() or 1) < 2
        )
    assert found.ranks_per_node == 2


def test_the_device_and_its_links_are_priced(profile):
    found, dtype = profile
    device, links = DeviceModel(found), LinkModel(found)
    for kind in _MEASURED:
        times = device.times(kind, dtype, {name: np.array([64.0]) for name in SIZES[kind]})
        assert 0 < times.low[0] <= times.seconds[0] <= times.high[0]
    sent = np.zeros((3, 2, 2), dtype=np.int64)
    sent[0, 0, 1] = sent[0, 1, 0] = 4096
    nodes = np.zeros(2, dtype=np.int64)
    for kind in (TransferKind.ALL_TO_ALL, TransferKind.ALL_GATHER, TransferKind.REDUCE_SCATTER):
        transfer = Transfer(kind, Stage.DISPATCH, RankGroups(nodes, nodes), sent)
        assert links.times(transfer).basis is Basis.MEASURED
        assert 0 <= np.max(links.contention(transfer, 2)) <= 1
    handed = links.hand_over(HandOver(np.array([4096]), np.array([False])))
    assert handed.basis is Basis.MEASURED
    assert handed.seconds[0] > 0


def test_what_is_between_steps_is_the_drivers(profile):
    """Not lost in the time that recording adds to a step's stages."""
    found, _ = profile
    assert found.terms["driver_s"].value > 0


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (Layout(), Options()),
        (Layout(tp=2), Options()),
        (Layout(dp=2, ep=2), Options(overlap=True)),
        (Layout(pp=2), Options(num_micro_batches=2)),
    ],
    ids=str,
)
def test_a_deployment_is_projected_by_it(profile, layout, options):
    found, dtype = profile
    deployment = Deployment("projected", layout, options)
    types = NumberTypes.all_of(dtype)
    builder = ProgramBuilder(
        MODEL,
        layout,
        placements_of(MODEL, layout, options),
        types=types,
        dispatch=DispatchTable.fixed(options.dispatch, options.overlap),
        ranks_per_node=2,
    )
    routing = PowerLawRouting(MODEL.num_experts, MODEL.num_experts_per_tok)
    terms = Terms.of(found, Execution.EAGER)
    assert terms.execution is Execution.SERIAL
    runner = CostRunner(builder, routing, Pricing(found, types), terms)
    limits = limits_for(deployment, 4, 24, MODEL.vocab_size)
    prompts = np.arange(4 * 16).reshape(4, 16) % MODEL.vocab_size
    steps = run_batch(runner, deployment, limits, prompts, 8)
    low, likely, high = (phase_times(at_bound(runner, steps, bound)) for bound in range(3))
    for each in zip(low, likely, high, strict=True):
        assert 0 < each[0] <= each[1] <= each[2]


def test_grids_are_of_sizes_that_fit():
    for grid in (CPU_GRID, GPU_GRID):
        for dtype in ("float32", "bfloat16"):
            points = grid.points(dtype)
            assert {point.kind for point in points} == _MEASURED
            assert len(set(points)) == len(points)
            assert max(flops_of(each.kind, each.by_name) for each in points) <= grid.most_flops
    counts = {point.num_ranks for point in CPU_GRID.transfers(6)}
    assert counts == {2, 4, 6}
    assert CPU_GRID.transfers(1) == []
