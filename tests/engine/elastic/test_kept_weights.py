"""What ranks are counted to hold of a checkpoint whose weights stay as they are stored."""

from dataclasses import replace

import pytest
import torch

from cli.stub_llm import MACHINE
from engine.model.families import save_checkpoint
from engine.model.quantised import save_mxfp4
from expertlane.balance.placement import Placement
from expertlane.engine.launch import LoadPlan
from expertlane.engine.model.checkpoint import Checkpoint
from expertlane.engine.model.weights import CheckpointWeights
from expertlane.engine.ops.narrow import Mxfp4Weight
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.tensors import expert_name

DTYPE = torch.bfloat16
KEEPS = replace(MACHINE, dtype="bfloat16", keeps_narrow=True, keeps_mxfp4=True)
PARTS = ("gate", "up", "down")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt_oss")
    source = save_checkpoint("gpt_oss", folder / "source", num_hidden_layers=2)
    save_mxfp4(source, folder / "mxfp4", folder / "plain")
    return folder / "mxfp4"


def weight_bytes(folder, machine, layout="tp=1", options=None):
    """Of rank 0."""
    model, layout = Checkpoint(folder).model, Layout.parse(layout)
    placements = [Placement.linear(model.num_experts, layout.ep)] * model.num_hidden_layers
    plan = LoadPlan(model, layout, options or Options(), placements, folder)
    placed = plan.placed(machine)
    return placed.rank_memory(Limits(8, 1, 1, 1, 16), 0).weight_bytes


def experts_of(folder, *, keeps_mxfp4):
    checkpoint = Checkpoint(folder)
    source = CheckpointWeights(
        checkpoint.model, DTYPE, torch.device("cpu"), lambda: None, checkpoint=checkpoint
    )
    source._keeps_mxfp4 = keeps_mxfp4  # whatever computes here
    names = [
        expert_name(layer, expert, part)
        for layer in range(2)
        for expert in range(checkpoint.model.num_experts)
        for part in PARTS
    ]
    return source, [source.matrix(name) for name in names]


def test_experts_in_mxfp4_are_counted_as_they_are_kept(folder):
    source, kept = experts_of(folder, keeps_mxfp4=True)
    assert {type(each) for each in kept} == {Mxfp4Weight}
    wide_source, wide = experts_of(folder, keeps_mxfp4=False)
    assert all(torch.equal(x.widened(), y) for x, y in zip(kept, wide, strict=True))
    widened = replace(KEEPS, keeps_mxfp4=False)
    saved = weight_bytes(folder, widened) - weight_bytes(folder, KEEPS)
    assert saved == wide_source.num_bytes - source.num_bytes > 0


def test_experts_in_mxfp4_that_are_cut_are_widened(folder):
    """So are all that are to be rounded to int8."""
    source, _ = experts_of(folder, keeps_mxfp4=True)
    assert isinstance(source.matrix(expert_name(0, 0, "up"), range(16)), torch.Tensor)
    widened = replace(KEEPS, keeps_mxfp4=False)
    for layout, options in (("tp=2", None), ("tp=1", Options(weights="int8"))):
        of_both = (weight_bytes(folder, each, layout, options) for each in (KEEPS, widened))
        assert len(set(of_both)) == 1
