"""Log-probabilities of prompts: transformers' own, whatever the layout, chunks and prefix cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.model.families import load_model, save_checkpoint
from expertlane.engine.llm import LLM
from expertlane.spec.deployment import Options
from expertlane.spec.sampling import SamplingParams

LENGTHS = (1, 2, 37, 20, 5)
ASKED = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=3)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A checkpoint, prompts with a common beginning, and transformers' log-probabilities."""
    folder = save_checkpoint("mixtral", tmp_path_factory.mktemp("scored"))
    rng = np.random.default_rng(0)
    common = rng.integers(2, 97, size=max(LENGTHS)).tolist()
    prompts = [common[:length] for length in LENGTHS]
    prompts[3] = [*common[:16], *rng.integers(2, 97, size=4).tolist()]
    model = load_model(folder)
    with torch.inference_mode():
        expected = [model(torch.tensor([each])).logits[0].log_softmax(-1) for each in prompts]
    return folder, prompts, [each.numpy() for each in expected]


def check(outputs, prompts, expected, num_top):
    for output, prompt, logprobs in zip(outputs, prompts, expected, strict=True):
        found = output.prompt_logprobs
        assert len(found) == len(prompt)
        assert found[0] is None
        for place, each in enumerate(found[1:], 1):
            row = logprobs[place - 1]
            assert each.token_id == prompt[place]
            assert each.logprob == pytest.approx(row[prompt[place]], abs=1e-3)
            likeliest = np.sort(row)[::-1][:num_top]
            assert [value for _, value in each.top] == pytest.approx(likeliest, abs=1e-3)
            assert [row[token] for token, _ in each.top] == pytest.approx(likeliest, abs=1e-3)
            gap = np.abs(np.delete(row, prompt[place]) - row[prompt[place]]).min()
            if gap > 2e-3:
                assert found.ranks[place] == 1 + (row > row[prompt[place]]).sum()


@pytest.mark.smoke(2)
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("tp=1", {}),
        ("tp=2,ep=2", {"overlap": True}),
        ("pp=2", {"num_micro_batches": 2}),
        ("dp=2,ep=2", {"overlap": True}),
    ],
)
def test_those_of_transformers(judged, layout, options):
    folder, prompts, expected = judged
    more = {"dtype": "float32", "num_blocks": 16, "block_size": 8, "max_num_batched_tokens": 11}
    with LLM(folder, layout=layout, options=Options(**options), **more) as llm:
        plain = [
            output.token_ids
            for output in llm.generate(prompts, replace(ASKED, prompt_logprobs=None))
        ]
        several = [replace(ASKED, prompt_logprobs=num) for num in (0, 3, 3, 3, 3)]
        outputs = llm.generate(prompts, several)  # their blocks are in the cache by now
        assert [output.token_ids for output in outputs] == plain
        assert outputs[0].prompt_logprobs[0] is None
        check(outputs[1:], prompts[1:], expected[1:], 3)
        (again,) = llm.generate([prompts[2]], replace(ASKED, prompt_logprobs=None))
        assert again.prompt_logprobs is None
        assert again.num_cached_tokens == 32
        assert outputs[2].num_cached_tokens == 0


def test_a_preempted_prompt_keeps_them(judged):
    folder, prompts, expected = judged
    params = replace(ASKED, max_tokens=30, prompt_logprobs=1, ignore_eos=True)
    with LLM(folder, dtype="float32", num_blocks=12, block_size=8) as llm:
        outputs = llm.generate([prompts[2], prompts[3]], params)
        assert sum(output.num_preemptions for output in outputs)
        check(outputs, prompts[2:4], expected[2:4], 1)
