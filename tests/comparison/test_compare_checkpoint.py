"""A comparison on real ranks whose model is a checkpoint."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from cli.screen import in_order, tells
from distributed.running import deployment
from engine.model.families import run_greedy
from expertlane.comparison.run import run_comparison
from expertlane.comparison.turns import Repeats
from expertlane.progress import Progress
from expertlane.report import markdown
from expertlane.report.sections import report_of
from expertlane.results.file import read, write
from expertlane.spec.experiment import Experiment
from expertlane.spec.from_hf import read_model
from expertlane.spec.workload import Workload

FAMILY = "qwen2_moe"  # windows, a shared expert, and one layer without experts
WORKLOAD = Workload(num_sequences=5, prompt_len=12, output_len=4, seed=1)


@pytest.fixture(scope="module")
def experiment(checkpoints):
    folder = checkpoints.folder(FAMILY)
    return Experiment(
        name="checkpoint",
        model=read_model(folder, str(folder)),
        workload=WORKLOAD,
        deployments=(
            replace(deployment("pp=2,tp=2"), is_baseline=True),
            deployment("dp=4,ep=4"),
            replace(deployment("dp=2,ep=2", overlap=True), name="overlap"),
        ),
        checkpoint=str(folder),
    )


@pytest.fixture(scope="module")
def results(experiment, pools):
    once = Repeats(1)
    return run_comparison(experiment, pools.pool(4), Progress(), command="", repeats=once)


def test_all_deployments_compute_what_transformers_does(results, checkpoints):
    prompts = WORKLOAD.prompt_token_ids(97)
    tokens = np.array(
        [
            run_greedy(checkpoints.folder(FAMILY), prompt.tolist(), WORKLOAD.output_len).token_ids
            for prompt in prompts
        ]
    )
    digest = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
    assert [each.tokens_sha256 for each in results.deployments] == [digest] * 3


def test_a_layer_without_experts_counts_for_none(results):
    tensor, expert, _ = results.deployments
    assert [rank.num_experts_per_layer for rank in tensor.held] == [
        *[(8, 0, 0, 0)] * 2,
        *[(0, 0, 8, 8)] * 2,
    ]
    assert {rank.num_experts_per_layer for rank in expert.held} == {(2, 0, 2, 2)}
    assert expert.expert_max_over_mean[1] == 0
    # 60 prompt tokens take 3 of 8 experts each: none of the layers that have any stays idle.
    assert expert.prefill.active_expert_share > 0.9


def test_the_checkpoint_is_recorded(results, checkpoints, tmp_path):
    folder = str(checkpoints.folder(FAMILY))
    assert results.question["experiment"]["checkpoint"] == folder
    assert results.question["experiment"]["model"]["name"] == FAMILY
    assert read(write(results, tmp_path)) == results
    assert f"| weights | {folder} |" in markdown.render(report_of(results)).replace("\\_", "_")


def test_assumptions_are_true_of_a_checkpoint(results):
    found = {each.name: (each.value, each.why) for each in results.assumptions}
    assert found["experts per token"] == ("3 of 8", "the checkpoint's own")
    parts, why = found["model parts"]
    assert in_order(
        parts,
        "vocabulary 97 RMSNorm 8 heads 4 keys rotary linear sliding 2 of 4 SiLU shared 48 1 of 4",
    )
    assert why == "the checkpoint's own"
    assert tells(found["weights and prompts"][0], "checkpoint's random seed 1")
    precision, why = found["precision"]
    assert precision == "float32"
    assert tells(why, "--dtype checkpoint's float32")
    assert "random, seed" not in markdown.render(report_of(results))


def test_other_numbers_of_experts_per_token(experiment, pools):
    one = replace(
        experiment,
        model=experiment.model.with_overrides(num_experts_per_tok=1),
        deployments=experiment.deployments[1:2],
    )
    results = run_comparison(one, pools.pool(4), Progress(), command="", repeats=Repeats(1))
    assert results.assumptions[0].value == "1 of 8"
    assert tells(results.assumptions[0].why, "asked checkpoint's 3")
    loads = results.deployments[0].num_tokens_per_expert
    assert [sum(layer) for layer in loads] == [
        5 * (12 + 3),
        0,
        *[5 * (12 + 3)] * 2,
    ]  # of one repetition
