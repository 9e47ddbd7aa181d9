"""How like the paper's a small model's step is, against sums by hand; the script that prints it."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

import example_results
from cli.screen import tells
from expertlane.comparison.assumptions import (
    BASELINE,
    PAPER_CONTEXT,
    PROPOSAL,
    FlopsPerByte,
    flops_per_byte,
    is_of_the_papers_kind,
    likeness,
    measured_assumptions,
    step_work,
)
from expertlane.cost.memory import workload_limits
from expertlane.cost.step.operation import NumberTypes
from expertlane.spec.experiment import Experiment, read_experiment, shipped_experiments
from expertlane.spec.layout import Layout
from expertlane.spec.workload import Workload

SCRIPT = Path(__file__).parents[2] / "experiments" / "paper" / "likeness.py"
FLOAT32, BFLOAT16 = NumberTypes.all_of("float32"), NumberTypes.all_of("bfloat16")
LAYOUTS = pytest.mark.parametrize("layout", [BASELINE, PROPOSAL], ids=str)


def shipped(name: str) -> Experiment:
    return read_experiment(shipped_experiments()[name])


def test_flops_over_bytes_are_those_of_a_sum_by_hand():
    model, num_seqs, context = shipped("paper-small").model, 1024, 5
    found = flops_per_byte(step_work(model, PROPOSAL, FLOAT32, num_seqs, context))
    layers, hidden, attention = 4, model.hidden_size, model.attention_size
    flops = layers * num_seqs * 2 * 4 * hidden * model.moe_intermediate_size
    experts = 16 * 2 * hidden * model.moe_intermediate_size
    others = 16 * (4 * hidden * attention + 16 * hidden)  # a copy of attention and router a rank
    weights = layers * (experts + others) + 16 * hidden * model.vocab_size  # and of the head
    assert found.weights == pytest.approx(flops / (4 * weights))
    keys_and_values = layers * num_seqs * (context + 1) * 2 * attention
    assert found.keys_and_values == pytest.approx(flops / (4 * keys_and_values))
    # There and back a row of hidden states for each pair but those that stay, about 1 of 16.
    rows = layers * num_seqs * 2 * 15 / 16
    assert found.dispatch == pytest.approx(flops / (4 * 2 * rows * hidden), rel=0.15)


@LAYOUTS
def test_the_paper_is_like_itself(layout):
    paper = shipped("paper")
    at_context = replace(paper, workload=Workload(1024, PAPER_CONTEXT, 1))
    found = likeness(at_context, layout, NumberTypes.all_of("float16"))
    assert found == FlopsPerByte(1.0, 1.0, 1.0)


@LAYOUTS
def test_fewer_tokens_of_an_expert_and_longer_prompts_are_seen(layout):
    usual = shipped("paper-small")
    half = replace(usual, workload=replace(usual.workload, num_sequences=512))
    long = replace(usual, workload=replace(usual.workload, prompt_len=6))  # 8 positions for 4
    found, halved, longer = (likeness(each, layout, FLOAT32) for each in (usual, half, long))
    assert halved.weights == pytest.approx(found.weights / 2)
    assert longer.keys_and_values == pytest.approx(found.keys_and_values / 2)
    assert longer.dispatch == found.dispatch


@LAYOUTS
def test_the_small_experiment_is_as_like_the_paper_as_its_file_says(layout):
    found = likeness(shipped("paper-small"), layout, FLOAT32)
    assert found.weights == pytest.approx(0.5, rel=0.01)
    assert found.keys_and_values == pytest.approx(1, rel=0.01)
    assert 0.055 < found.dispatch < 0.065  # 2 × inner width / bytes of a value: 1/16 of the paper's
    assert likeness(shipped("paper-small"), layout, BFLOAT16).weights == pytest.approx(1, rel=0.01)


def test_a_comparison_prints_it_where_its_model_is_a_small_copy_of_the_papers():
    def rows(experiment):
        limits = {
            each.name: workload_limits(experiment.workload, experiment.model, each.layout)
            for each in experiment.deployments + experiment.scaling
        }
        found = measured_assumptions(experiment, example_results.machine(), limits)
        return [each.value for each in found if each.name == "expert FLOPs per byte"]

    small = shipped("paper-small")
    (value,) = rows(small)
    assert "dp=16,ep=16, 1,024 tokens of context" in value
    assert "0.500× for weights read, 0.0580× for dispatch" in value
    others = tuple(each for each in small.deployments if each.layout != PROPOSAL)
    wide = small.model.with_overrides(num_experts=32)
    for other in (replace(small, deployments=others), replace(small, model=wide)):
        assert not is_of_the_papers_kind(other)
        assert rows(other) == []


def test_the_script_prints_both_layouts(capsys):
    main = runpy.run_path(str(SCRIPT), run_name="likeness")["main"]
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "**pp=2,tp=8**" in printed
    assert "| keys and values | 63.9 | 1.00× | 2.00× |" in printed
    assert main(["--dtype", "float32", "--context", "2049"]) == 0
    assert "| keys and values | 32.0 | 2.00× |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such"], "no-such file experiment's"),
        (["--dtype", "int3"], "weights int3 float32"),
        (["--context", "-1"], "--context -1 0"),
    ],
)
def test_a_mistake_gets_one_line(arguments, said, capsys):
    main = runpy.run_path(str(SCRIPT), run_name="likeness")["main"]
    assert main(arguments) == 2
    assert tells(capsys.readouterr().err, said)


def test_every_size_has_as_many_sequences_a_rank():
    small = shipped("paper-small")
    of_sizes = [small.num_sequences_alike(Layout(dp=n, ep=n)) for n in (1, 2, 4, 8, 16)]
    assert of_sizes == [64, 128, 256, 512, 1024]
    few = replace(small, workload=replace(small.workload, num_sequences=3))
    assert few.num_sequences_alike(Layout(dp=2, ep=2)) == 2  # one each, whatever is left over
