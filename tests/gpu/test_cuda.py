"""What only a GPU can show; skipped where there is none (docs/validation.md lists it)."""

import pytest
import torch

from expertlane.engine.local_ranks import LocalRanks
from expertlane.engine.model_runner import ModelRunner
from expertlane.engine.pool import RankPool
from expertlane.model.reference import ReferenceModel
from expertlane.schedule.drive import drive
from expertlane.schedule.fixed import FixedScheduler
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload
from parity.contract import check_contract

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

FLOAT16_BOUND = 2e-2  # eight bits of mantissa less than float32 and four layers; not yet measured


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-5), ("float16", FLOAT16_BOUND)], ids=["float32", "float16"]
)
def test_contract_1_over_nccl_on_every_gpu(dtype: str, bound: float, overlap: bool) -> None:
    num_gpus = min(torch.cuda.device_count(), 4)
    model, workload = PRESETS["paper-tiny"], Workload(5, 7, 6, seed=1)
    prompts = workload.prompt_token_ids(model.vocab_size)
    reference = ReferenceModel(model, 0).generate(prompts, workload.output_len)
    deployment = Deployment("ep", Layout(dp=num_gpus, ep=num_gpus), Options(overlap=overlap))
    with RankPool(LocalRanks(num_gpus, 60.0, dtype), 60.0) as pool:
        runner = ModelRunner(pool, model, deployment, workload, seed=0, ranks_per_node=8)
        scheduler = FixedScheduler(
            workload, deployment, prompts, forced=reference.tokens, return_logits=True
        )
        steps = list(drive(scheduler, runner))
        if scheduler.start_decode():
            steps += drive(scheduler, runner)
    logits = torch.stack(
        [
            torch.stack([torch.from_numpy(step.outcome.logits[seq]) for step in steps])
            for seq in range(workload.num_sequences)
        ]
    ).numpy()
    tokens = torch.tensor([scheduler.outputs[seq] for seq in range(workload.num_sequences)])
    check_contract(reference, logits, tokens.numpy(), bound=bound)
