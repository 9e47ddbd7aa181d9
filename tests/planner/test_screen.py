"""One rank that stands for all, against every rank's own counts."""

from dataclasses import replace

import numpy as np
import pytest

from expertlane.balance.holding import check_experiment
from expertlane.balance.planner import plan_placement
from expertlane.balance.trace import RoutingTrace
from expertlane.cost.laws.profile import Execution
from expertlane.cost.projector import Projector, StepSize
from expertlane.cost.routing import PowerLawRouting, TraceRouting
from expertlane.cost.step.expected_counts import sampled_layers
from expertlane.planner.candidates import Candidate, candidates_of
from expertlane.planner.records import experiment_text
from expertlane.planner.screen import Screen, fitting
from expertlane.simulator.simulator import ServingSetup, Simulator
from expertlane.spec.deployment import Options
from expertlane.spec.experiment import read_experiment
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.workload import LengthRange, Load, Workload
from golden.cases import DEEPSEEK
from planner.requests import MIXED, PAPER, agrees_with_the_whole_model, request_of, search_of


@pytest.mark.smoke(1)
@pytest.mark.parametrize("execution", [Execution.GRAPH, Execution.EAGER])
@pytest.mark.parametrize(("model", "num_devices"), [(MIXED, 4), (PAPER, 16)])
def test_steps_without_overlap_agree_with_the_whole_model(model, num_devices, execution):
    # Many tokens, so that one sample of their routing is like another.
    workload = Workload(num_sequences=1024, prompt_len=512, output_len=128)
    search = search_of(model, num_devices, workload, execution=execution)
    plain = [each for each in fitting(search.screen()) if not each.candidate.options.overlap]
    for each in plain[:: max(1, len(plain) // 12)]:
        agrees_with_the_whole_model(each, search.request)
        low, likely, high = each.steps.decode_s[:, -1]
        assert low <= likely <= high


@pytest.mark.parametrize("num_sequences", [1, 3, 12])
def test_idle_ranks_agree_with_the_whole_model(num_sequences):
    # Without expert parallelism: which experts so few tokens choose is chance.
    workload = Workload(num_sequences, prompt_len=512, output_len=128)
    search = search_of(PAPER, 8, workload)
    cluster, setting = search.request.cluster, search.request.setting
    of_candidate = {str(each.candidate): each for each in fitting(search.screen())}
    for layout in ("dp=8", "tp=8", "replicas=2,dp=4", "dp=2,tp=4"):
        each = of_candidate[f"{layout}; plain"]
        projector = Projector(PAPER, *each.candidate[:2], cluster, setting)
        step = projector.step(StepSize(num_sequences, 1, workload.mean_context))
        assert each.steps.decode_s[1, -1] == pytest.approx(step.round_s.value, rel=0.15)


def steps_of(options, skew):
    request = request_of(PAPER, 16, Workload(1024, 128, 128), skew=skew)
    candidate = Candidate(Layout(dp=16, ep=16), options)
    (found,) = Screen(request).run([candidate], lambda _: None)
    return found.steps


def test_skew_slows_expert_parallelism_less_where_experts_are_placed_by_load():
    even = steps_of(Options(), 0.0)
    in_order = steps_of(Options(), 1.0)
    by_load = steps_of(Options(placement="load", num_redundant_experts=16), 1.0)
    assert in_order.prefill_s[1] > 1.5 * even.prefill_s[1]
    assert by_load.prefill_s[1] < 0.7 * in_order.prefill_s[1]


def test_experts_that_no_ranks_divide_are_placed_once_for_all(monkeypatch, tmp_path):
    """DeepSeek's 288 slots on nine nodes: screened, in full, simulated and written."""
    made = []

    def plan(load, *others, **more):
        made.append(others)
        return plan_placement(load, *others, **more)

    monkeypatch.setattr("expertlane.cost.routing.plan_placement", plan)
    layout, num_redundant = Layout(dp=72, ep=72), 32
    model = from_hf(DEEPSEEK | {"num_hidden_layers": 5}, "DeepSeek-V3")
    request = request_of(model, 72, Workload(9216, 2000, 100), dtype="float8", skew=0.8)
    cluster, setting = request.cluster, request.setting
    candidate = next(
        each
        for each in candidates_of(layout, model, 8, "float8")
        if each.options.num_redundant_experts == num_redundant
    )
    (screened,) = Screen(request).run([candidate], lambda _: None)
    assert made == [(72, 8, num_redundant)]
    size = StepSize(int(screened.steps.num_seqs[-1]), 1, request.workload.mean_context)
    step = Projector(model, *candidate[:2], cluster, setting).step(size)
    assert screened.steps.decode_s[1, -1] == pytest.approx(step.round_s.value, rel=0.15)
    setup = ServingSetup(
        layout, None, candidate.options, setting.types, setting.execution, setting.routing
    )
    load = Load(144, LengthRange(16, 16), LengthRange(2, 4), 144)
    outcome = Simulator(model, cluster, setup, load).run(0)
    assert len(outcome.served) == 144
    assert len(made) == 1
    path = tmp_path / "experiment.toml"
    path.write_text(experiment_text(request, "wide", None, [screened], "by a test"))
    (written,) = read_experiment(path).deployments
    assert written.options.is_by_load
    assert written.options.num_redundant_experts == num_redundant
    (placements,) = check_experiment(read_experiment(path))
    assert {each.num_slots for each in placements if each is not None} == {288}


def test_a_trace_is_judged_by_several_layers():
    """The first layer's tokens are spread evenly, all others' choose the same experts."""
    num_tokens, top_k = 256, PAPER.num_experts_per_tok
    even = np.arange(num_tokens * top_k).reshape(num_tokens, top_k) % PAPER.num_experts
    hot = np.broadcast_to(np.arange(top_k), even.shape)
    layers = tuple(range(PAPER.num_hidden_layers))
    ids = np.stack([even, *[hot] * (len(layers) - 1)]).astype(np.int16)
    trace = RoutingTrace("paper", PAPER.num_experts, layers, ids, np.arange(num_tokens))
    request = request_of(PAPER, 8, Workload(512, 512, 128))
    candidates = [Candidate(Layout(dp=8, ep=8), Options())]
    seconds = {}
    for name, routing in (
        ("trace", TraceRouting(trace)),
        ("even", PowerLawRouting(PAPER.num_experts, top_k)),
    ):
        setting = replace(request.setting, routing=routing)
        (found,) = Screen(replace(request, setting=setting)).run(candidates, lambda _: None)
        projector = Projector(PAPER, *candidates[0][:2], request.cluster, setting)
        step = projector.step(StepSize(512, 512, 0))
        seconds[name] = found.steps.prefill_s[1], step.round_s.value
    screened, in_full = (seconds["trace"][k] / seconds["even"][k] for k in (0, 1))
    assert in_full > 3
    assert 0.6 * in_full < screened < 1.4 * in_full


def test_layers_of_one_sample_stand_once():
    routing = PowerLawRouting(PAPER.num_experts, 2, num_sampled_layers=3)
    assert sampled_layers(PAPER, routing) == [0, 1, 2]
    dense_first = MIXED  # its first layer has no experts
    assert sampled_layers(dense_first, PowerLawRouting(32, 4, num_sampled_layers=1)) == [1]
