"""Layers of whole models with our Triton kernels, against torch's operations; and the choice.

Without a GPU the kernels run in Triton's interpreter.
"""

import numpy as np
import pytest
import torch

from cli.screen import telling

pytest.importorskip("triton")

from engine.model.families import save_checkpoint
from engine.model.quantised import save_fp8, save_mxfp4
from engine.ops.cuda.near import DEVICE, needs_kernels
from engine.ops.cuda.tiny_models import MODELS, USERS
from expertlane.balance.placement import Placement
from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.collectives import interleave
from expertlane.engine.comm.mesh import Meshes, ParallelMesh
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.model.checkpoint import Checkpoint
from expertlane.engine.model.forward_batch import ForwardBatch
from expertlane.engine.model.transformer import TransformerStage
from expertlane.engine.model.weights import CheckpointWeights, SeededWeights
from expertlane.engine.ops import backend as choice
from expertlane.engine.ops.cuda import backend as module
from expertlane.engine.ops.cuda.backend import CudaBackend, multiplies_narrow, reads_float8, why_not
from expertlane.engine.ops.cuda.parts import CudaNarrowLinear
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.errors import UserError
from expertlane.schedule.plan import Batch
from expertlane.spec.layout import Layout

pytestmark = needs_kernels


def seeded(model, weights="model"):
    return lambda: SeededWeights(model, torch.float32, DEVICE, lambda: None, weights)


def logits_of(model, ops, monkeypatch, source=None) -> torch.Tensor:
    """Of a step with two prompts, and of one that goes on with both."""
    for user in USERS:
        monkeypatch.setattr(user, "backend_for", lambda device: ops)
    recorder = Recorder(0, 1, 1, ProgressBoard(1).reporter(0), HostClock(), world_size=1)
    mesh = ParallelMesh(Layout(), Meshes(), 0, 1, recorder)
    source = (source or seeded(model))()
    placement = Placement.linear(model.num_experts, 1)
    layers_ = range(model.num_hidden_layers)
    placements = {each: None if model.is_dense(each) else placement for each in layers_}
    stage = TransformerStage(model, placements, source, mesh)
    stage.allocate_cache(8, 4)
    found, computed = [], np.zeros(2, dtype=np.int64)
    for new in (np.array([9, 3]), np.array([1, 1]), np.array([2, 1])):
        batch = Batch(
            seq_ids=np.arange(2),
            num_scheduled_tokens=new,
            num_computed_tokens=computed,
            token_ids=np.arange(new.sum()) * 7 % model.vocab_size,
            block_tables=np.array([[5, 0, 3, 7], [6, 1, -1, -1]], dtype=np.int32),
            yields_token=np.ones(2, dtype=np.bool_),
        )
        at = mesh.layout.coordinates(0)
        part = ForwardBatch(batch, [batch.num_tokens], mesh.layout, at, DEVICE, 4)
        (result,) = interleave([stage.forward(stage.embed(part), part, needs_logits=True)])
        found.append(result.logits)
        computed = computed + new
    return torch.cat(found)


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_models_are_those_of_torch(name, monkeypatch):
    expected, found = (
        logits_of(MODELS[name], ops, monkeypatch) for ops in (TorchBackend(), CudaBackend())
    )
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def kept(monkeypatch):
    """Whether each narrow weight is kept so, in the order in which they are asked for."""
    found, suits = [], CudaNarrowLinear.suits

    def remember(weight):
        found.append(suits(weight))
        return found[-1]

    monkeypatch.setattr(CudaNarrowLinear, "suits", staticmethod(remember))
    return found


@pytest.mark.full
@pytest.mark.parametrize("name", ["normed heads, shared expert", "latent, dense layer"])
def test_models_rounded_to_int8(name, kept, monkeypatch):
    model = MODELS[name]
    expected, found = (
        logits_of(model, ops, monkeypatch, seeded(model, "int8"))
        for ops in (TorchBackend(), CudaBackend())
    )
    assert kept
    assert all(kept)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["float8", "mxfp4"])
def test_models_stored_narrow(kind, kept, tmp_path, monkeypatch):
    """DeepSeek-V3 in blocks of float8, and GPT-OSS in MXFP4."""
    family = "deepseek_v3" if kind == "float8" else "gpt_oss"
    source = save_checkpoint(family, tmp_path / "source", num_hidden_layers=2)
    stored, plain = tmp_path / "stored", tmp_path / "plain"
    if kind == "float8":
        save_fp8(source, stored, plain, (32, 32))
    else:
        save_mxfp4(source, stored, plain)

    def source_of(folder):
        checkpoint = Checkpoint(folder)
        given = checkpoint.model, torch.float32, DEVICE, lambda: None
        return lambda: CheckpointWeights(*given, checkpoint=checkpoint)

    model = Checkpoint(stored).model
    expected = logits_of(model, TorchBackend(), monkeypatch, source_of(plain))
    found = logits_of(model, CudaBackend(), monkeypatch, source_of(stored))
    assert kept
    assert all(kept)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not CudaBackend(keeps_narrow=False).keeps_mxfp4


def test_narrow_weights_are_kept_where_their_products_are_right(monkeypatch):
    assert multiplies_narrow(DEVICE)
    product = CudaNarrowLinear.__call__
    for wrong in (lambda self, x: 1.1 * product(self, x), lambda self, x: x.no_such_product):
        monkeypatch.setattr(CudaNarrowLinear, "__call__", wrong)
        assert not multiplies_narrow(DEVICE)


def test_a_float8_cache_is_read_where_attention_over_it_is_right(monkeypatch):
    assert reads_float8(DEVICE)
    attend = module.attend

    def fail(query, cache, batch, params):
        raise RuntimeError("type fp8e4nv not supported in this architecture")

    for wrong in (lambda *given: 1.1 * attend(*given), fail):
        monkeypatch.setattr(module, "attend", wrong)
        assert not reads_float8(DEVICE)


def test_kernels_that_agree_with_torch_are_chosen(monkeypatch):
    monkeypatch.delenv("EXPERTLANE_BACKEND", raising=False)
    choice.backend_of_cuda.cache_clear()
    assert why_not(DEVICE) == ""
    assert isinstance(choice.backend_of_cuda(DEVICE)[0], CudaBackend)
    wrong = monkeypatch.context()
    with wrong as patch:
        patch.setattr(module, "attend", lambda query, *_: query)
        assert why_not(DEVICE) == "our kernels give other results than torch here"

    def fail(*_):
        raise RuntimeError("no device of that name\nand more")

    monkeypatch.setattr(module, "attend", fail)
    choice.backend_of_cuda.cache_clear()
    backend, reason = choice.backend_of_cuda(DEVICE)
    assert type(backend) is TorchBackend
    assert reason.endswith("cannot run our kernels here: no device of that name")
    choice.backend_of_cuda.cache_clear()


def test_torch_is_used_where_it_is_asked_for_or_triton_is_missing(monkeypatch):
    monkeypatch.setenv("EXPERTLANE_BACKEND", "torch")
    choice.backend_of_cuda.cache_clear()
    assert choice.backend_of_cuda(DEVICE)[1] == "EXPERTLANE_BACKEND=torch"
    monkeypatch.delenv("EXPERTLANE_BACKEND")
    choice.backend_of_cuda.cache_clear()
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    backend, reason = choice.backend_of_cuda(DEVICE)
    assert (type(backend), reason) == (TorchBackend, "Triton is not installed")
    choice.backend_of_cuda.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_of_gpus_need_one(monkeypatch):
    monkeypatch.setenv("EXPERTLANE_BACKEND", "cuda")
    with pytest.raises(UserError, match=telling("EXPERTLANE_BACKEND=cuda GPU rank cpu torch")):
        choice.choose_platform(0, 1, None)
