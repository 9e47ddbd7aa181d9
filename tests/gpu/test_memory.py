"""Memory of a GPU, loading into it, and float8 caches there; skipped where there is none."""

import re

import pytest
import torch

from expertlane import LLM, Options, SamplingParams
from expertlane.engine.ops.device import STAGED_BYTES, copier_to, memory_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

DEVICE = torch.device("cuda")


def test_the_most_that_work_has_taken() -> None:
    memory = memory_of(DEVICE)
    memory.begin()
    room = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE)
    del room
    assert memory.peak_bytes() >= 64 << 20
    free_bytes, total_bytes = memory.free_and_total()
    assert 0 < free_bytes <= total_bytes


def test_copies_through_pinned_buffers_arrive_in_order() -> None:
    copy = copier_to(DEVICE)
    values = torch.arange(STAGED_BYTES // 4).view(1024, -1).to(torch.bfloat16)
    for _ in range(4):
        to = torch.empty(values.shape, dtype=torch.float32, device=DEVICE)
        before = [torch.empty_like(to) for _ in range(4)]
        for each, offset in zip((*before, to), range(5), strict=True):
            copy(each, values + offset)
        assert torch.equal(to.cpu(), (values + 4).float())
        assert torch.equal(before[0].cpu(), values.float())


@pytest.mark.parametrize("kv_dtype", ["model", "float8"])
def test_a_measured_cache_and_what_it_gives(kv_dtype: str, capfd: pytest.CaptureFixture) -> None:
    options = Options(kv_dtype=kv_dtype)
    with LLM("paper-small", options=options, dtype="bfloat16") as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8))
        assert len(output.token_ids) == 8
    lines = capfd.readouterr().err
    assert any("weights" in line for line in lines)
    assert "(measured), CUDA graphs " in lines
    assert "CUDA graphs of decode steps: 27 batch sizes up to 256 sequences" in lines


def test_graphs_take_what_was_measured(capfd: pytest.CaptureFixture) -> None:
    """As much as the line says, and 0.2 GB at most: beside the same cache with and without."""
    free_bytes, settings = [], {"dtype": "bfloat16", "max_num_seqs": 64}
    for has_graphs in (False, True):
        options = Options(cuda_graphs=has_graphs)
        with LLM("paper-small", options=options, num_blocks=64, **settings) as llm:
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8))
            free_bytes.append(memory_of(DEVICE).free_and_total()[0])
    said = re.findall(r"CUDA graphs ([0-9.]+) GB", capfd.readouterr().err)
    assert len(said) == 1
    assert free_bytes[0] - free_bytes[1] <= 1e9 * float(said[0]) + 0.2e9
