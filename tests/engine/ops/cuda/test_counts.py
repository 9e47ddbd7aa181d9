"""Contract 8 with our Triton kernels: a layer's record, and its launches, against what is priced.

Without a GPU the kernels run in Triton's interpreter.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from engine.model.families import save_checkpoint
from engine.model.quantised import COMPRESSED, save_compressed
from engine.ops.cuda.near import DEVICE, needs_kernels
from engine.ops.cuda.tiny_models import MODELS, USERS
from expertlane.balance.placement import Placement
from expertlane.cost.routing import GivenRouting
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.operation import NumberTypes, Operation
from expertlane.cost.step.program import ProgramBuilder, count
from expertlane.cost.step.step_list import ENGINE, ENGINE_ON_GPUS
from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.collectives import interleave
from expertlane.engine.comm.mesh import Meshes, ParallelMesh
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.model.checkpoint import Checkpoint
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.transformer import TransformerStage
from expertlane.engine.model.weights import CheckpointWeights, SeededWeights
from expertlane.engine.ops.cuda import launch
from expertlane.engine.ops.cuda.backend import CudaBackend
from expertlane.engine.ops.cuda.compiled import Compiled
from expertlane.schedule.plan import Batch
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage

pytestmark = needs_kernels

BLOCK_SIZE = 4
STEPS = {"prompts": ([9, 3], [0, 0]), "chunk and decode": ([5, 1], [0, 7])}
# Torch's operations that launch nothing beside views.
_NO_KERNEL = ("empty", "empty_strided", "new_empty", "detach", "_local_scalar_dense")


@dataclass
class Launches:
    """Kernels launched by stage: ours, and one for each of torch's operations that computes."""

    recorder: Recorder
    by_stage: Counter = field(default_factory=Counter)


class CountTorch(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self, launches):
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(
            each.alias_info and not each.alias_info.is_write for each in func._schema.returns
        )
        if not is_view and func._schema.name.split("::")[1] not in _NO_KERNEL:
            self._launches.by_stage[self._launches.recorder.stage] += 1
        return func(*args, **(kwargs or {}))


def counted_run(launches, run):
    """A launch that counts, of a kernel that an interpreter runs or that torch compiles."""

    def counted(*given, **named):
        launches.by_stage[launches.recorder.stage] += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return run(*given, **named)

    return counted


class OneRank:
    """A stage of a model on one rank with our kernels, its records and its launches."""

    def __init__(self, model, monkeypatch, source=None, types=None):
        for user in USERS:
            monkeypatch.setattr(user, "backend_for", lambda device: CudaBackend())
        self.model, layers = model, model.num_hidden_layers
        clock, board = HostClock(), ProgressBoard(1)
        self.recorder = Recorder(
            0, layers, model.num_experts, board.reporter(0), clock, world_size=1
        )
        self.mesh = ParallelMesh(Layout(), Meshes(), 0, 1, self.recorder)
        source = source or partial(SeededWeights, model)
        source = source(torch.float32, DEVICE, lambda: None)
        self.types = types or NumberTypes.all_of("float32")
        placement = Placement.linear(model.num_experts, 1)
        self.placements = [None if model.is_dense(each) else placement for each in range(layers)]
        self.stage = TransformerStage(model, self.placements, source, self.mesh)
        self.stage.set_forms(("all_to_all",), "model")
        self.stage.allocate_cache(8, BLOCK_SIZE)
        self.launches = Launches(self.recorder)
        for of, name in ((launch, "_run"), (Compiled, "__call__")):
            monkeypatch.setattr(of, name, counted_run(self.launches, getattr(of, name)))

    def run(self, batch):
        """The step's record, and its launches by stage, not recorded."""
        records = []
        for record in (True, False):
            at = self.mesh.layout.coordinates(0)
            part = ForwardBatch(batch, [batch.num_tokens], self.mesh.layout, at, DEVICE, BLOCK_SIZE)
            self.recorder.begin_step(0, 1, record=record, count_idle=False, record_routing=record)
            self.launches.by_stage.clear()
            with CountTorch(self.launches):
                interleave([self.stage.forward(self.stage.embed(part), part, False)])
            records.append(self.recorder.end_step())
        return records[0], dict(self.launches.by_stage)

    def program(self, batch, record, kernels):
        """What is priced of the same step."""
        builder = ProgramBuilder(
            self.model,
            self.mesh.layout,
            self.placements,
            types=self.types,
            block_size=BLOCK_SIZE,
            kernels=kernels,
        )
        sizes = PartSizes.of([batch], 1, block_size=BLOCK_SIZE)
        return builder.build_sized([("all_to_all", [sizes])], GivenRouting([record.topk_ids]))


def batch_of(model, new, computed):
    new, computed = np.array(new), np.array(computed)
    return Batch(
        seq_ids=np.arange(2),
        num_scheduled_tokens=new,
        num_computed_tokens=computed,
        token_ids=np.arange(new.sum()) * 7 % model.vocab_size,
        block_tables=np.array([[5, 0, 3, 7], [6, 1, 2, -1]], dtype=np.int32),
        yields_token=np.ones(2, dtype=np.bool_),
    )


def launches_priced(program):
    found = Counter()
    for stage in program.of_stages():
        for step, num in stage.distinct_steps():
            assert isinstance(step, Operation), "nothing travels"
            found[step.stage] += num * step.num_kernels
    return dict(found)


def check_counts(rank, batch, record, kernels, scales=0.0):
    """`scales`: the share of weights' bytes that those may have, which the engine counts not."""
    model = rank.model
    (counted,) = count(
        rank.program(batch, record, kernels), model.num_hidden_layers, model.num_experts
    )
    for key in ("flops", "kv_bytes", "num_collectives", "weight_bytes"):
        expected, found = (np.array(getattr(each, key)) for each in (record, counted))
        share = scales if key == "weight_bytes" else 0.0
        np.testing.assert_allclose(found, expected, rtol=share, atol=0, err_msg=key)


@pytest.mark.full
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_priced_is_what_is_recorded(name, step, monkeypatch):
    rank = OneRank(MODELS[name], monkeypatch)
    batch = batch_of(MODELS[name], *STEPS[step])
    record, launched = rank.run(batch)
    for kernels in (ENGINE, ENGINE_ON_GPUS):
        check_counts(rank, batch, record, kernels)
    if MODELS[name].expert_bias:
        return  # biases of experts are added by torch, in launches that are not priced
    priced = launches_priced(rank.program(batch, record, ENGINE_ON_GPUS))
    assert sum(priced.values()) == pytest.approx(sum(launched.values()), rel=0.25), launched
    num_layers = MODELS[name].num_hidden_layers
    if MODELS[name].latent is None:
        for stage in (Stage.ROUTER, Stage.DISPATCH, Stage.EXPERTS, Stage.HEAD):
            assert priced[stage] == pytest.approx(launched[stage], abs=3 * num_layers), stage


@pytest.mark.full
def test_inputs_in_float8_are_counted_and_launched_as_priced(tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "decoder_sparse_step": 1}
    folder = save_checkpoint("qwen3_moe", tmp_path / "source", moe_intermediate_size=16, **sizes)
    save_compressed(
        folder, tmp_path / "stored", tmp_path / "plain", COMPRESSED["float8 by channel"]
    )
    checkpoint, priced, launched = Checkpoint(tmp_path / "stored"), Counter(), Counter()
    for activations in ("model", "float8"):
        options = Options(activations=activations)
        source = partial(
            CheckpointWeights, checkpoint.model, checkpoint=checkpoint, activations=activations
        )
        types = NumberTypes.kept_as("float32", options, "float8")
        rank = OneRank(checkpoint.model, monkeypatch, source, types)
        batch = batch_of(checkpoint.model, *STEPS["chunk and decode"])
        record, by_stage = rank.run(batch)
        check_counts(rank, batch, record, ENGINE_ON_GPUS, scales=1e-3)
        sign = 1 if activations == "float8" else -1
        for totals, of_run in (
            (priced, launches_priced(rank.program(batch, record, ENGINE_ON_GPUS))),
            (launched, by_stage),
        ):
            totals.update({stage: sign * num for stage, num in of_run.items()})
    # Before attention's two products, and before experts' two, in each layer.
    more = {Stage.ATTENTION: 4, Stage.EXPERTS: 4}
    assert {stage: num for stage, num in priced.items() if num} == more
    assert {stage: num for stage, num in launched.items() if num} == more


def test_a_step_without_tokens_launches_and_counts_nothing(monkeypatch):
    rank = OneRank(MODELS["paper"], monkeypatch)
    batch = batch_of(MODELS["paper"], [0, 0], [3, 3])
    batch = Batch(
        *(each[:0] for each in (batch.seq_ids, batch.num_scheduled_tokens)),
        num_computed_tokens=batch.num_computed_tokens[:0],
        token_ids=batch.token_ids,
        block_tables=batch.block_tables[:0],
        yields_token=batch.yields_token[:0],
    )
    record, _ = rank.run(batch)
    assert record.flops.sum() == record.weight_bytes.sum() == record.kv_bytes == 0
