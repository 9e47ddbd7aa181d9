"""The closed form of a step against every candidate priced by itself, and against the replay."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from expertlane.cost.closed_form import Pipelining, step_estimates
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import Execution, Terms
from expertlane.cost.projector import Projector, StepSize
from expertlane.cost.routing import placed
from expertlane.cost.shared_parts import price
from expertlane.cost.step.batch_sizes import Scenarios
from expertlane.cost.step.counts import StageMesh
from expertlane.cost.step.expected_counts import ExpectedFanOut, busiest_counts, sampled_layers
from expertlane.cost.step.layer import arrival_steps, embedding_steps, head_steps, layer_steps
from expertlane.cost.step.operation import HandOver
from expertlane.cost.step.step_list import GPU_LIBRARIES, ExpectedStepList
from expertlane.cost.throughput import Goals
from expertlane.planner.candidates import Candidate, PlanRequest
from expertlane.planner.screen import fitting
from expertlane.planner.search import Search
from expertlane.spec.deployment import Options, is_by_node_on
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.workload import Workload
from planner.requests import (
    CHOOSING,
    COMPRESSED,
    HYBRID,
    MIXED,
    PAPER,
    WINDOWED,
    cluster_of,
    setting_of,
)

LATENT = from_hf(
    {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 5,
        "hidden_size": 2048,
        "moe_intermediate_size": 512,
        "max_position_embeddings": 65536,
    },
    "latent",
)


def step_s(request, candidate, num_seqs, num_new, num_cached, how):
    """[3]; a step, all layers of every stage priced one after the other."""
    layout, options, _ = candidate
    model, setting, profile = request.model, request.setting, request.cluster.profile
    mesh = StageMesh.of(layout, 0, 0, profile.ranks_per_node)
    placements = placed(model, layout, options, setting.routing, profile.ranks_per_node)
    fan_out = ExpectedFanOut.mean(
        [
            ExpectedFanOut.of_sample(mesh, placements[layer], setting.routing, layer)
            for layer in sampled_layers(model, setting.routing)
        ]
    )
    fullest = -(-request.workload.num_sequences // layout.replicas)
    sizes = num_seqs, num_new, num_cached, min(num_seqs * layout.dp, fullest)
    part = Scenarios(layout.tp, *(np.array([each]) for each in sizes), 0, layout.dp)
    by_node = is_by_node_on(layout, options.dispatch)
    counts = busiest_counts(fan_out, part, layout, by_node=by_node)
    terms, links, stages = Terms.of(profile, setting.execution), LinkModel(profile), []
    for pp_rank in range(layout.pp):
        out = ExpectedStepList(mesh, 1, setting.types, options.dispatch, GPU_LIBRARIES)
        (arrival_steps if pp_rank else embedding_steps)(out, model, part)
        for layer in layout.layers_of_stage(model.num_hidden_layers, pp_rank):
            of_layer = None if model.is_dense(layer) else counts
            layer_steps(out, model, model.kind_of_layer(layer), part, of_layer, options.payload)
        if pp_rank == layout.pp - 1:
            head_steps(out, model, part)
        stages.append((1, price(profile, setting.types, terms, [out])[0]))
    nodes = np.arange(layout.replica_size) // profile.ranks_per_node
    is_remote = (nodes[: -mesh.size] != nodes[mesh.size :]).any()
    num_bytes = part.owned * (model.carried_size * setting.types.activation_bytes)
    sent_s = links.hand_over(HandOver(num_bytes, np.array([is_remote]))).bounds
    return step_estimates(
        stages,
        sent_s if layout.pp > 1 else np.zeros((3, 1)),
        terms.step_s(layout)[:, None],
        terms,
        how.schedule,
        np.array([how.num_micro_batches]),
        np.array([how.overlap]),
        model.num_hidden_layers,
    )[:, 0]


@pytest.mark.smoke(1)
@pytest.mark.parametrize("execution", [Execution.GRAPH, Execution.EAGER])
@pytest.mark.parametrize(
    ("model", "num_devices", "sizes"),
    [
        (MIXED, 4, (64, 512, 128)),
        (MIXED, 12, (5, 700, 33)),
        (PAPER, 16, (1024, 20_000, 64)),
        (LATENT, 24, (100, 9000, 500)),
        (HYBRID, 12, (50, 900, 200)),
        (WINDOWED, 12, (50, 900, 200)),
        (CHOOSING, 12, (50, 900, 200)),
        (COMPRESSED, 12, (50, 900, 200)),
    ],
)
def test_shared_parts_add_up_to_the_same(model, num_devices, sizes, execution):
    setting = setting_of(model, execution=execution, skew=0.8)
    request = PlanRequest(model, cluster_of(num_devices), Workload(*sizes), Goals(), setting)
    found = fitting(Search(request).screen())
    drawn = np.random.default_rng(num_devices).choice(len(found), 24, replace=False)
    for each in (found[place] for place in drawn):
        layout, how = each.candidate.layout, Pipelining.of(each.candidate.options)
        of_rank = -(-int(each.steps.num_seqs[0]) // (layout.replicas * layout.dp))
        size = -(-of_rank // how.num_parts), 1, request.workload.mean_context
        exact = step_s(request, each.candidate, *size, how)
        np.testing.assert_allclose(each.steps.decode_s[:, 0], exact, rtol=1e-9)
        prompts = each.steps.prompts
        if how == Pipelining() and prompts.num_seqs > 1:
            size = prompts.num_seqs, prompts.num_new, prompts.num_cached
            exact = step_s(request, each.candidate, *size, how)
            np.testing.assert_allclose(each.steps.prefill_s, exact, rtol=1e-9)


STEPS = ((1, 1000, 512), (1, 77, 256), (512, 0, 64))  # new and cached positions, sequences
AXES = ((1, 1, 1), (1, 1, 8), (1, 8, 1), (1, 2, 4), (2, 1, 4), (4, 1, 2))  # pp, dp, tp
EVENLY_ROUTED = [
    (model, Layout(1, pp, dp, tp, ep), schedule, step, execution)
    for model, (pp, dp, tp) in product((PAPER, MIXED, LATENT), AXES)
    for ep in sorted({1, dp * tp})
    for schedule in (("drained", "rotating") if pp > 1 else ("drained",))
    for step, execution in product(STEPS, (Execution.GRAPH, Execution.EAGER))
]


@pytest.mark.smoke(24)
@pytest.mark.parametrize(("model", "layout", "schedule", "step", "execution"), EVENLY_ROUTED)
def test_the_closed_form_is_the_replay_where_routing_is_even(
    model, layout, schedule, step, execution
):
    num_new, num_cached, num_seqs = step
    options = Options(dispatch="all_gather" if layout.dp == 1 else "all_to_all")
    if layout.pp > 1:
        options = replace(options, num_micro_batches=layout.pp, micro_batch_schedule=schedule)
    sizes = num_new, num_cached
    setting, cluster = setting_of(model, execution=execution), cluster_of(layout.world_size)
    workload = Workload(num_seqs, 512, 128)
    request, how = PlanRequest(model, cluster, workload, Goals(), setting), Pipelining.of(options)
    of_part = -(-num_seqs // (layout.dp * how.num_parts))
    found = step_s(request, Candidate(layout, options, 0), of_part, *sizes, how)
    replayed = Projector(model, layout, options, cluster, setting).step(StepSize(num_seqs, *sizes))
    # Of all but chance in who is chosen, and the first launches of a pipeline or of eager steps.
    is_exact = (layout.pp, layout.ep, execution) == (1, 1, Execution.GRAPH)
    fills = layout.pp > 1 and schedule == "drained" and execution is Execution.EAGER
    expected = replayed.round_s
    bounds = (expected.low, expected.value, expected.high)
    close = {"rtol": 1e-9} if is_exact else {"rtol": 0.07 if fills else 0.02, "atol": 1e-4}
    np.testing.assert_allclose(found, bounds, **close)
