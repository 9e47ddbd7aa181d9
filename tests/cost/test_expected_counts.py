"""Contract 8 for expected counts: one rank that stands for all counts what ranks do on average."""

from dataclasses import replace

import numpy as np
import pytest

from cost.tiny_models import MODELS
from expertlane.balance.copies import CopyChoice
from expertlane.balance.placement import Placement
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.batch_sizes import PartSizes, Scenarios
from expertlane.cost.step.counts import StageMesh, count_dispatch
from expertlane.cost.step.expected_counts import ExpectedFanOut, busiest_counts, mean_counts
from expertlane.cost.step.layer import embedding_steps, head_steps, layer_steps
from expertlane.cost.step.operation import NumberTypes, Operation
from expertlane.cost.step.step_list import KERNEL_SETS, ExpectedStepList, StepList
from expertlane.spec.deployment import DISPATCH_FORMS, is_by_node_on
from expertlane.spec.layout import Layout
from expertlane.spec.names import Link
from expertlane.spec.ranges import LIKENESS

FORMS = tuple(DISPATCH_FORMS)
SAMPLE_TOKENS = 2048  # of which expected counts are means
# Layouts with ranks of a node, and redundant experts; all ranks' shares are equal.
PLACES = (
    ("tp=1", 8, 0),
    ("tp=2", 1, 0),
    ("dp=4,ep=4", 2, 0),
    ("dp=4,ep=4", 2, 4),
    ("tp=4,ep=2", 2, 2),
    ("dp=2,tp=2,ep=4", 2, 8),
    ("dp=8,ep=8", 4, 8),
    ("dp=4,tp=2,ep=4", 4, 0),
    ("pp=2,dp=2,tp=2,ep=2", 4, 2),
)
EVEN = {"moe_intermediate_size": 16, "vocab_size": 32, "num_key_value_heads": 4}
MODEL_NAMES = ("plain", "full_norm", "latent", "windows")


def model_of(name):
    """Sizes that all ranks have equal shares of."""
    sizes = dict(EVEN)
    if MODELS[name].shared_expert_intermediate_size:
        sizes["shared_expert_intermediate_size"] = 16
    return MODELS[name].with_overrides(**sizes)


class Stage:
    """Steps of one layer of a stage, from sampled and from expected counts of the same tokens."""

    def __init__(self, model, place, form, kernels, num_new, payload="model"):
        layout, ranks_per_node, redundant = place
        layout = Layout.parse(layout)
        self.mesh = StageMesh.of(layout, 0, 0, ranks_per_node)
        self.placement = Placement.linear(model.num_experts, layout.ep, redundant)
        self.routing = PowerLawRouting.of(model, 0.7, num_sampled_layers=1)
        self.form = form
        self._model, self._kernels, self._payload = model, kernels, payload
        given = self.mesh, self.placement, self.routing, 1
        self._fan_out = ExpectedFanOut.of_sample(*given)
        self._num_seqs = SAMPLE_TOKENS // self.mesh.size * layout.tp // num_new
        self._num_new = num_new

    @property
    def part(self):
        layout = self.mesh.layout
        return PartSizes.even(layout.dp, layout.tp, self._num_seqs, self._num_new, 20)

    @property
    def scenarios(self):
        layout = self.mesh.layout
        num = np.array([self._num_seqs])
        new, cached = np.array([self._num_new]), np.array([20])
        return Scenarios(layout.tp, num, new, cached, num * layout.dp)

    def sampled(self, first=0):
        owned = self.part.owned
        of_ranks = self.mesh.ep_rank, self.mesh.nodes_of_ep_group
        choice = CopyChoice(self.placement, *of_ranks)
        ids = self.routing.topk_ids(1, first, np.zeros_like(owned), owned)
        return count_dispatch(ids, owned, choice, self.mesh, by_node=self._by_node)

    @property
    def _by_node(self):
        return is_by_node_on(self.mesh.layout, self.form)

    def expected(self, counts=mean_counts):
        layout = self.mesh.layout
        return counts(self._fan_out, self.scenarios, layout, by_node=self._by_node)

    def steps(self, counts, part, out):
        """Embedding, an MoE layer and the head."""
        embedding_steps(out, self._model, part)
        layer_steps(out, self._model, self._model.kind_of_layer(1), part, counts, self._payload)
        head_steps(out, self._model, part)
        return out.steps

    def of_ranks(self):
        return self.steps(
            self.sampled(),
            self.part,
            StepList(self.mesh, NumberTypes(), self.form, self._kernels),
        )

    def of_one_rank(self, counts=mean_counts):
        scenarios = self.scenarios
        out = ExpectedStepList(self.mesh, scenarios.size, NumberTypes(), self.form, self._kernels)
        return self.steps(self.expected(counts), scenarios, out)


def sent_by_link(transfer, node):
    """[num_kinds_of_traffic, num_links]; mean over ranks."""
    is_near = node[:, None] == node
    sent = np.zeros((len(transfer.sent_bytes), len(Link)))
    sent[:, Link.INTRA_NODE] = (transfer.sent_bytes * is_near).sum(axis=(1, 2))
    sent[:, Link.INTER_NODE] = (transfer.sent_bytes * ~is_near).sum(axis=(1, 2))
    return sent / len(node)


def check_equal_in_the_mean(stage):
    of_ranks, of_one = stage.of_ranks(), stage.of_one_rank()
    kinds = [[(each.kind, each.stage, each.num_kernels) for each in s] for s in (of_ranks, of_one)]
    assert kinds[0] == kinds[1]
    for exact, expected in zip(of_ranks, of_one, strict=True):
        if isinstance(exact, Operation):
            for name in ("flops", "weight_bytes", "kv_bytes"):
                mean = getattr(exact, name).mean()
                assert getattr(expected, name) == pytest.approx([mean], rel=1e-9), (exact, name)
            for name, size in exact.sizes.items():
                of_one_rank = np.broadcast_to(expected.sizes[name], 1)
                assert of_one_rank == pytest.approx([np.mean(size)], rel=1e-9), (exact, name)
        else:
            sent = sent_by_link(exact, stage.mesh.node)
            np.testing.assert_allclose(expected.sent_bytes[..., 0], sent, rtol=1e-9)
            np.testing.assert_array_equal(expected.load.group_size, exact.load.group_size[:1])
            np.testing.assert_array_equal(expected.load.num_nodes, exact.load.num_nodes[:1])


def cases():
    for number, place in enumerate(PLACES):
        for form in FORMS:
            yield pytest.param(place, form, MODEL_NAMES[number % 4], id=f"{place}-{form}")


@pytest.mark.smoke(36)
@pytest.mark.parametrize("kernels", KERNEL_SETS, ids=lambda each: each.name)
@pytest.mark.parametrize(("place", "form", "name"), list(cases()))
def test_one_rank_counts_the_mean_of_all(place, form, name, kernels):
    for num_new in (1, 4):
        check_equal_in_the_mean(Stage(model_of(name), place, form, kernels, num_new))


@pytest.mark.parametrize("redundant", [0, 4])
@pytest.mark.parametrize("form", FORMS)
def test_experts_that_compute_nothing(form, redundant):
    model = model_of("plain").with_overrides(num_zero_experts=4, num_experts_per_tok=5)
    stage = Stage(model, ("dp=4,tp=2,ep=4", 4, redundant), form, KERNEL_SETS[0], 1)
    check_equal_in_the_mean(stage)
    mean = stage.expected()
    drawn = stage.sampled()
    assert mean.pairs_computed[0] == pytest.approx(drawn.pairs_of_ep_rank.mean())
    assert mean.pairs_computed[0] < 0.75 * 5 * mean.stage_tokens[0] / 4


@pytest.mark.parametrize("payload", ["bfloat16", "float8"])
@pytest.mark.parametrize("form", FORMS)
def test_narrow_payloads(form, payload):
    place = ("dp=4,tp=2,ep=4", 4, 4)
    model = model_of("plain").with_overrides(hidden_size=160)
    check_equal_in_the_mean(Stage(model, place, form, KERNEL_SETS[0], 1, payload))


@pytest.mark.parametrize("redundant", [0, 8])
def test_active_experts_of_few_tokens(redundant):
    """So few that most experts have none; each expected number against many steps' mean."""
    model = model_of("plain").with_overrides(num_experts=32, num_experts_per_tok=2)
    stage = Stage(model, ("dp=4,ep=4", 2, redundant), "all_to_all", KERNEL_SETS[0], 1)
    stage._num_seqs = 2  # 8 tokens of the stage
    steps = [stage.sampled(8 * step).active_experts for step in range(SAMPLE_TOKENS // 8)]
    mean, most = np.mean(steps), np.mean([each.max() for each in steps])
    expected, busiest = (
        stage.expected(each).active_experts[0] for each in (mean_counts, busiest_counts)
    )
    # Copies take turns by rank and step, which spreads few tokens further than chance would.
    assert expected == pytest.approx(mean, rel=0.1)
    assert mean < busiest
    assert most - 0.5 < busiest < most + 1.5  # rounded up


# Experts, choices and skew of a model; ranks, redundant experts and how they are placed.
LIKE_PROMPTS = (
    (128, 4, 0.45, 8, 0, "linear"),
    (256, 8, 0.55, 32, 32, "load"),
    (64, 6, 0.35, 4, 0, "load"),
)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("case", LIKE_PROMPTS)
def test_prompts_whose_tokens_are_alike(case):
    """Over many draws, the mean is that of independent tokens, and the busiest rank as replayed."""
    experts, top_k, skew, ep, redundant, how = case
    layout = Layout(dp=ep, ep=ep)
    mesh = StageMesh.of(layout, 0, 0, 8)
    of_ranks = mesh.ep_rank, mesh.nodes_of_ep_group
    sizes = ((1, 1024), (ep, 128), (8 * ep, 64), (32 * ep, 2), (32 * ep, 1))  # prompts, tokens
    found = {size: ([], []) for size in sizes}
    for seed in range(8):
        source = PowerLawRouting(experts, top_k, skew, seed, 1, likeness=LIKENESS)
        placement = Placement.linear(experts, ep, redundant)
        if how == "load":
            (placement,) = source.placements([0], layout, redundant, 8)
        choice = CopyChoice(placement, *of_ranks)
        alike, independent = (
            ExpectedFanOut.of_sample(mesh, placement, each, 0)
            for each in (source, replace(source, likeness=0.0))
        )
        for num, length in sizes:
            num_new, owned = np.full(num, length), np.zeros(ep, dtype=np.int64)
            np.add.at(owned, np.arange(num) * ep // num, length)
            of_rank = np.array([-(-num // ep)])
            part = Scenarios(1, of_rank, num_new[:1], num_new[:1], np.array([num]))
            one, other = (mean_counts(each, part, layout) for each in (alike, independent))
            for name in ("pairs_computed", "rows_computed", "active_experts"):
                assert getattr(one, name) == getattr(other, name)
            one, other = (
                busiest_counts(each, part, layout).pairs_computed[0]
                for each in (alike, independent)
            )
            assert one == other if length == 1 else one >= other
            for place in range(4):
                ids = source.topk_ids(0, place * num * length, 0 * owned, owned, num_new)
                drawn = count_dispatch(ids, owned, choice, mesh).pairs_computed
                assert drawn.sum() == ids.size
                found[num, length][0].append(drawn.max())
            found[num, length][1].append(one)
    for (num, length), (drawn, expected) in found.items():
        bound = 0.12 if num == 1 else 0.04 if length > 2 else 0.08
        assert np.mean(expected) == pytest.approx(np.mean(drawn), rel=bound)


@pytest.mark.parametrize("num_seqs", [0, 1])
def test_no_prompt_and_one(num_seqs):
    model = model_of("plain").with_overrides(num_experts=32, num_experts_per_tok=2)
    stage = Stage(model, ("dp=8,ep=8", 4, 8), "all_to_all", KERNEL_SETS[0], 64)
    routing = replace(stage.routing, likeness=LIKENESS)
    fan_out = ExpectedFanOut.of_sample(stage.mesh, stage.placement, routing, 1)
    num = np.array([num_seqs])
    for length in (1, 64):
        part = Scenarios(1, num, np.array([length]), np.array([0]), num, dp=0)
        busiest = busiest_counts(fan_out, part, stage.mesh.layout)
        mean = mean_counts(fan_out, part, stage.mesh.layout)
        assert mean.pairs_computed == num * length * 2 / 8
        assert mean.pairs_computed <= busiest.pairs_computed <= num * length * 2
