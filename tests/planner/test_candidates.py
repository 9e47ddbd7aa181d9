import pytest

from expertlane.balance.placement import Placement
from expertlane.planner.candidates import Candidate, candidates_of, valid_layouts
from expertlane.spec.deployment import Options
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from golden.cases import DEEPSEEK

PAPER = PRESETS["paper"]


def test_all_layouts_of_two_devices():
    layouts = {str(layout) for layout in valid_layouts(PAPER, 2)}
    assert layouts == {"replicas=2", "pp=2", "tp=2", "tp=2,ep=2", "dp=2", "dp=2,ep=2"}


@pytest.mark.parametrize("num_devices", [1, 6, 16])
def test_layouts_use_every_device_and_fit_the_model(num_devices):
    layouts = valid_layouts(PAPER, num_devices)
    assert len(set(layouts)) == len(layouts)
    for layout in layouts:
        assert layout.world_size == num_devices
        layout.check_model(PAPER)


def test_heads_and_layers_bound_layouts():
    assert all(layout.tp in (1, 2, 4, 8, 16) for layout in valid_layouts(PAPER, 48))
    assert max(layout.pp for layout in valid_layouts(PAPER, 8)) == 4


def options_of(layout: str, ranks_per_node: int) -> list[Options]:
    return [each.options for each in candidates_of(Layout.parse(layout), PAPER, ranks_per_node)]


def test_one_device_has_nothing_to_choose():
    assert options_of("tp=1", 8) == [Options()]


def test_forms_that_come_down_to_another_are_left_out():
    forms = {
        layout: {options.dispatch for options in options_of(layout, 8)}
        for layout in ("tp=8", "dp=8,ep=8", "dp=16,ep=16", "dp=2,tp=8,ep=2")
    }
    assert forms == {
        "tp=8": {"all_to_all"},
        "dp=8,ep=8": {"all_to_all", "all_gather"},
        "dp=16,ep=16": {"all_to_all", "all_gather", "hierarchical"},
        "dp=2,tp=8,ep=2": {"all_to_all", "all_gather"},  # one rank of each group a node
    }


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("dp=3,ep=3", {2, 5}),  # 16 experts: 6 or 7 on each rank
        ("dp=16,ep=16", {0, 16}),
        ("dp=32,ep=32", {16, 48}),  # fewer experts than ranks: every expert two or three times
        ("dp=2,ep=2", {0}),  # no more ranks than a token has experts
        ("dp=8,tp=2", {0}),
    ],
)
def test_redundant_experts_fill_every_rank_alike(layout, expected):
    found = options_of(layout, 8)
    assert {options.num_redundant_experts for options in found} == expected
    for num_redundant in expected:
        placement = Placement.linear(PAPER.num_experts, Layout.parse(layout).ep, num_redundant)
        assert len(set(map(len, placement.experts_of_rank))) == 1


def test_the_slots_of_deepseek_on_nine_nodes():
    model = from_hf(DEEPSEEK, "DeepSeek-V3")
    found = candidates_of(Layout.parse("dp=72,ep=72"), model, 8)
    assert {each.options.num_redundant_experts for each in found} == {32, 104}


def test_experts_are_placed_by_load():
    assert {options.placement for options in options_of("dp=16,ep=16", 8)} == {"load"}
    assert {options.placement for options in options_of("dp=16", 8)} == {"linear"}


def test_pipelines_have_micro_batches():
    found = options_of("pp=2", 8)
    cut = {(each.num_micro_batches, each.micro_batch_schedule) for each in found}
    assert cut == {
        (1, "drained"),
        (2, "drained"),
        (4, "drained"),
        (2, "rotating"),
        (4, "rotating"),
    }
    assert not any(each.overlap for each in found)  # a stage of one rank sends nothing


def test_a_candidate_reads_as_it_is_written():
    assert str(Candidate(Layout.parse("dp=2,ep=2"), Options(overlap=True))) == (
        "dp=2,ep=2; overlap"
    )
