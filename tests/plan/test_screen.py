"""One rank that stands for all, against every rank's own counts."""

import numpy as np
import pytest

from expertlane.cost.execution import Execution
from expertlane.plan.candidates import candidates_of, valid_layouts
from expertlane.plan.project import Projector, StepSize
from expertlane.plan.screen import Screen
from expertlane.plan.setting import Traffic
from expertlane.spec.names import ProjectedCause
from plan.questions import MIXED, PAPER, TRAFFIC, cluster_of, setting_of

CAUSES = list(ProjectedCause)


def screened(model, num_devices, traffic=TRAFFIC, **setting):
    cluster, chosen = cluster_of(num_devices), setting_of(model, **setting)
    candidates = [
        candidate
        for layout in valid_layouts(model, num_devices)
        for candidate in candidates_of(layout, model, cluster.profile.ranks_per_node)
    ]
    return Screen(model, cluster, traffic, chosen).run(candidates, lambda _: None), cluster, chosen


@pytest.mark.parametrize("execution", [Execution.GRAPH, Execution.EAGER])
@pytest.mark.parametrize(("model", "num_devices"), [(MIXED, 4), (PAPER, 16)])
def test_steps_without_overlap_agree_with_the_whole_model(model, num_devices, execution):
    # Many tokens, so that one sample of their routing is like another.
    traffic = Traffic(num_sequences=1024, prompt_len=512, output_len=128)
    found, cluster, setting = screened(model, num_devices, traffic, execution=execution)
    plain = [each for each in found if not each.candidate.options.overlap and each.decode]
    for each in plain[:: max(1, len(plain) // 12)]:
        layout, options = each.candidate
        projector = Projector(model, layout, options, cluster, setting)
        num_caches = layout.replicas * layout.dp
        place = len(each.num_seqs) - 1
        size = StepSize(int(each.num_seqs[place]) * num_caches, 1, traffic.mean_context)
        step = projector.step(size)
        assert each.decode.seconds[1, place] == pytest.approx(step.step_s.value, rel=0.1)
        low, likely, high = each.decode.seconds[:, place]
        assert low <= likely <= high
        prompts = each.prompts
        size = StepSize(prompts.num_seqs * num_caches, prompts.num_new, prompts.num_cached)
        assert each.prefill.seconds[1, 0] == pytest.approx(
            projector.step(size).step_s.value, rel=0.12
        )


@pytest.mark.parametrize("num_sequences", [1, 3, 12])
def test_idle_ranks_agree_with_the_whole_model(num_sequences):
    # Without expert parallelism: which experts so few tokens choose is chance.
    traffic = Traffic(num_sequences, prompt_len=512, output_len=128)
    found, cluster, setting = screened(PAPER, 8, traffic)
    of_candidate = {str(each.candidate): each for each in found}
    for layout in ("dp=8", "tp=8", "replicas=2,dp=4", "dp=2,tp=4"):
        each = of_candidate[f"{layout}; plain"]
        projector = Projector(PAPER, *each.candidate, cluster, setting)
        step = projector.step(StepSize(num_sequences, 1, traffic.mean_context))
        assert each.decode.seconds[1, -1] == pytest.approx(step.step_s.value, rel=0.15)


def test_causes_add_up_to_the_step():
    found, _, _ = screened(MIXED, 4)
    for each in found:
        if each.decode is None:
            continue
        for steps in (each.decode, each.prefill):
            np.testing.assert_allclose(steps.by_cause_s.sum(axis=0), steps.seconds[1], rtol=1e-6)
            assert (steps.by_cause_s >= -1e-12).all()


def test_skew_slows_expert_parallelism_and_is_called_waiting():
    of_skew = {}
    for skew in (0.0, 1.0):
        found, _, _ = screened(PAPER, 16, Traffic(1024, 128, 128), skew=skew)
        of_skew[skew] = next(
            each
            for each in found
            if str(each.candidate) == "dp=16,ep=16; plain" and each.decode is not None
        )
    even, skewed = of_skew[0.0], of_skew[1.0]
    assert skewed.prefill.seconds[1, 0] > 1.5 * even.prefill.seconds[1, 0]
    waiting = [
        each.prefill.by_cause_s[CAUSES.index(ProjectedCause.IMBALANCE), 0]
        for each in (even, skewed)
    ]
    assert waiting[1] > 5 * waiting[0]


def test_what_does_not_fit_has_no_estimate():
    huge = PAPER.with_overrides(num_hidden_layers=32)
    found, _, _ = screened(huge, 4)
    assert all(each.decode is None for each in found if each.candidate.layout.replicas == 4)
    assert all(each.capacity.max_seqs == 0 for each in found if each.decode is None)
