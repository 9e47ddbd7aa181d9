"""What only a GPU can show; skipped where there is none (docs/validation.md lists it)."""

import pytest
import torch

from distributed.running import run_deployment
from expertlane.engine.local_ranks import LocalRanks
from expertlane.engine.pool import RankPool
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload
from parity.contract import check_contract
from parity.reference import ReferenceModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

FLOAT16_BOUND = 2e-2  # eight bits of mantissa less than float32 and four layers; not yet measured


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-5), ("float16", FLOAT16_BOUND)], ids=["float32", "float16"]
)
def test_contract_1_over_nccl_on_every_gpu(dtype: str, bound: float, overlap: bool) -> None:
    num_gpus = min(torch.cuda.device_count(), 4)
    model, workload = PRESETS["paper-tiny"], Workload(5, 7, 6, seed=1)
    reference = ReferenceModel(model, 0).generate(
        workload.prompt_token_ids(model.vocab_size), workload.output_len
    )
    deployment = Deployment("ep", Layout(dp=num_gpus, ep=num_gpus), Options(overlap=overlap))
    with RankPool(LocalRanks(num_gpus, 60.0, dtype), 60.0) as pool:
        run = run_deployment(
            pool, model, deployment, workload, forced=reference.tokens, return_logits=True
        )
    assert run.logits is not None
    check_contract(reference, run.logits, run.tokens, bound=bound)
