"""Whole models on a GPU against the reference; docs/validation.md lists what only a GPU can show.

Each notes its error, which `make gpu` collects.
"""

from dataclasses import replace

import bench_one_rank
import numpy as np
import pytest
import torch
from one_rank import OneRank

from cost.tiny_models import MODELS
from distributed.running import deployment, run_deployment
from expertlane.spec.deployment import DISPATCH_FORMS
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload
from parity.contract import check_contract
from parity.reference import ReferenceModel

pytestmark = pytest.mark.gpu

HAS_GPU = torch.cuda.is_available()
TINY = PRESETS["paper-tiny"]
WORKLOAD = Workload(5, 7, 6, seed=1)
# Every expert is chosen, so that no rounding sends a token elsewhere.
BOUNDS = {
    "float32": 2e-5,  # of two that are each within 1e-5
    "bfloat16": 0.07,  # twice what the largest is on a CPU, 0.034 of `latent`
    "float16": 0.07 / 4,  # three bits more; not yet measured
}
FULL_BOUND = 0.05  # of bfloat16 through some dozen layers; not yet measured
ON_HOST = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def reference():
    """What the reference generates, and its logits."""
    prompts = WORKLOAD.prompt_token_ids(TINY.vocab_size)
    return ReferenceModel(TINY, 0).generate(prompts, WORKLOAD.output_len)


def fed(pool, model, chosen, tokens, **flags):
    """A run that is fed these tokens."""
    return run_deployment(pool, model, chosen, WORKLOAD, forced=tokens, return_logits=True, **flags)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_in_float32(ranks_of, reference, record_property, overlap):
    chosen = deployment("tp=1", overlap=overlap)
    run = fed(ranks_of(1, "float32"), TINY, chosen, reference.tokens)
    found = check_contract(reference, run.logits, run.tokens)
    record_property("error", found.error)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_every_kind_of_model(ranks_of, record_property, dtype, name):
    """Against the same engine on the CPU in float32, which is held against transformers."""
    routing = replace(MODELS[name].routing, n_group=1, topk_group=1)
    num_experts = MODELS[name].num_experts
    model = MODELS[name].with_overrides(num_experts_per_tok=num_experts, routing=routing)
    on_host = ranks_of(1, "float32", **ON_HOST)
    expected = run_deployment(on_host, model, deployment("tp=1"), WORKLOAD, return_logits=True)
    run = fed(ranks_of(1, dtype), model, deployment("tp=1"), expected.tokens)
    error = float(np.abs(run.logits - expected.logits).max() / np.abs(expected.logits).max())
    record_property("error", error)
    assert error <= BOUNDS[dtype]


def test_contract_1_over_nccl_on_every_gpu(ranks_of, reference, record_property):
    num_gpus = min(torch.cuda.device_count(), 4)
    if num_gpus < 2:
        pytest.skip("nccl needs two GPUs")
    pool = ranks_of(num_gpus, "float32")
    layouts = "dp={0},ep={0}", "tp={0}", "tp={0},ep={0}", "pp={0}"
    for layout in (each.format(num_gpus) for each in layouts):
        for overlap in (False, True):
            run = fed(pool, TINY, deployment(layout, overlap=overlap), reference.tokens)
            found = check_contract(reference, run.logits, run.tokens)
            record_property("error", found.error)


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_several_ranks_on_one_gpu(ranks_of, reference, record_property, transport):
    """Expert parallelism for real: each rank's kernels on the same GPU, rows by way of the host."""
    pool = ranks_of(4, "float32", EXPERTLANE_TRANSPORT=transport)
    for layout in ("dp=4,ep=4", "dp=2,tp=2,ep=4", "tp=4", "pp=2,dp=2,ep=2"):
        for form in DISPATCH_FORMS if layout == "dp=4,ep=4" else ["all_to_all"]:
            chosen = deployment(layout, dispatch=form, overlap=form == "all_to_all")
            run = fed(pool, TINY, chosen, reference.tokens, ranks_per_node=2)
            found = check_contract(reference, run.logits, run.tokens)
            record_property("error", found.error)


def test_narrow_payloads_on_one_gpu(ranks_of, reference):
    """Float8 rows, converted on the GPU: most tokens are still the reference's."""
    pool = ranks_of(4, "float32", EXPERTLANE_TRANSPORT="gloo")
    run = fed(pool, TINY, deployment("dp=4,ep=4", payload="float8"), reference.tokens)
    error = np.abs(run.logits - reference.logits).max(axis=-1) / np.abs(reference.logits).max()
    assert np.isfinite(run.logits).all()
    assert np.median(error) <= 0.05


def test_a_model_that_fills_the_card(record_property, with_torch):
    """Our kernels against torch's operations, one after the other, with weights drawn on it.

    All experts of a token are computed, so that no rounding sends it elsewhere.
    """
    device = bench_one_rank.DEVICE
    if HAS_GPU:
        model = bench_one_rank.fitting(bench_one_rank.MIXTRAL, torch.cuda.mem_get_info()[0])
    else:
        small = {"hidden_size": 64, "moe_intermediate_size": 32, "vocab_size": 128}
        model = bench_one_rank.MIXTRAL.with_overrides(num_hidden_layers=2, head_dim=16, **small)
    model = model.with_overrides(num_experts_per_tok=model.num_experts)
    logits = []
    for choose in (lambda: None, with_torch):
        choose()
        torch.manual_seed(0)
        with torch.inference_mode():
            one = OneRank(model, Layout(), 0, torch.bfloat16, device)
            logits.append(one.step(3, 0, 33)().logits.float().cpu())
        del one
        if HAS_GPU:
            torch.cuda.empty_cache()
    found, expected = logits
    error = float((found - expected).abs().max() / expected.abs().max())
    record_property("error", error)
    assert 0 < float(expected.abs().max()) < float("inf")
    assert error <= FULL_BOUND
