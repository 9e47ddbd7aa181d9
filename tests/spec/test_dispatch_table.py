"""How a step runs by its number of tokens, and options that are chosen so."""

import pytest

from cli.screen import telling
from expertlane.errors import SpecError
from expertlane.spec.deployment import (
    DISPATCH_FORMS,
    DispatchMode,
    DispatchRow,
    DispatchTable,
    Options,
    dispatch_forms,
    form_on,
    is_by_node_on,
)
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase

FLAT, GATHER = DispatchMode("all_to_all"), DispatchMode("all_gather")
FLAT_OVERLAP = DispatchMode("all_to_all", overlap=True)
TABLE = DispatchTable(
    (FLAT, GATHER, FLAT_OVERLAP),
    (
        DispatchRow(1, (2.0, 1.0, 2.0)),
        DispatchRow(16, (2.0, 1.5, 3.0)),
        DispatchRow(64, (2.0, 3.0, 1.0)),
    ),
)


def test_the_fastest_of_times_between_rows():
    # On the way from 16 to 64 all-gather takes as long as flat at 32, overlap at 40.
    chosen = [TABLE.choose(num_tokens) for num_tokens in (0, 1, 16, 31, 33, 40, 41, 64, 10_000)]
    assert chosen == [GATHER] * 4 + [FLAT] * 2 + [FLAT_OVERLAP] * 3
    assert set(TABLE.forms) == {"all_gather", "all_to_all"}


def test_what_cannot_be_split_takes_a_mode_without_overlap():
    chosen = [TABLE.choose(num_tokens, can_split=False) for num_tokens in (1, 16, 41, 64)]
    assert chosen == [GATHER, GATHER, FLAT, FLAT]
    only = DispatchTable.fixed("hierarchical", overlap=True)
    assert only.choose(1, can_split=False) == DispatchMode("hierarchical", overlap=True)


def test_forms_that_only_an_unsplit_batch_takes_are_made_ready():
    table = DispatchTable((GATHER, FLAT_OVERLAP), (DispatchRow(1, (2.0, 1.0)),))
    assert [table.choose(5), table.choose(5, can_split=False)] == [FLAT_OVERLAP, GATHER]
    assert set(table.forms) == {"all_to_all", "all_gather"}


def test_of_equals_the_first():
    assert DispatchTable((GATHER, FLAT), (DispatchRow(4, (1.0, 1.0)),)).choose(9) == GATHER


def test_words():
    assert str(TABLE) == "all-gather up to 31, all-to-all up to 40, then all-to-all with overlap"
    assert str(DispatchTable.fixed("hierarchical")) == "hierarchical"
    assert str(DispatchTable.fixed("all_gather", overlap=True)) == "all-gather with overlap"


def test_a_row_without_a_time_for_each_mode():
    with pytest.raises(SpecError, match=telling("dispatch 2 1")):
        DispatchTable((FLAT, GATHER), (DispatchRow(1, (1.0, 2.0)), DispatchRow(4, (1.0,))))
    with pytest.raises(SpecError, match=telling("dispatch 1 no times")):
        DispatchTable((FLAT,), ())


@pytest.mark.parametrize("overlap", ["on", 1, None])
def test_overlap_is_a_truth_or_auto(overlap):
    with pytest.raises(SpecError, match=telling(f"overlap {overlap!r} true false")):
        Options(overlap=overlap)


def test_options_in_words():
    assert str(Options(overlap=True)) == "overlap"
    assert str(Options(overlap="auto", dispatch="auto")) == "auto overlap, auto dispatch"
    assert str(Options(dispatch="all_gather", overlap="auto")) == "auto overlap, all-gather"
    assert str(Options(payload="float8")) == "payload float8"


def test_payload_is_one_of_three_types():
    with pytest.raises(SpecError, match="payload is 'int8'; valid: model, bfloat16, float8"):
        Options(payload="int8")


def test_what_is_timed():
    assert not Options(overlap=True, dispatch="hierarchical").is_timed
    assert Options(overlap="auto").is_timed
    assert Options(dispatch="auto").is_timed


@pytest.mark.parametrize(
    ("layout", "ranks_per_node", "forms"),
    [
        ("tp=2", 1, ("all_gather",)),
        ("dp=4,ep=4", 4, ("all_to_all", "all_gather")),
        ("dp=4,ep=4", 2, ("all_to_all", "all_gather", "hierarchical")),
        ("dp=4,ep=4", 3, ("all_to_all", "all_gather")),
        ("dp=4,ep=4", 1, ("all_to_all", "all_gather")),
    ],
)
def test_forms_that_make_a_difference(layout, ranks_per_node, forms):
    assert dispatch_forms(Layout.parse(layout), ranks_per_node) == forms


@pytest.mark.parametrize(
    ("layout", "options", "modes"),
    [
        ("dp=2,ep=2", {"dispatch": "auto"}, ["all-to-all", "all-gather"]),
        ("dp=2,ep=2", {"overlap": "auto"}, ["all-to-all", "all-to-all with overlap"]),
        (
            "dp=2,ep=2",
            {"dispatch": "auto", "overlap": True},
            ["all-to-all with overlap", "all-gather with overlap"],
        ),
        (
            "dp=2,ep=2",
            {"dispatch": "auto", "overlap": "auto"},
            ["all-to-all", "all-gather", "all-to-all with overlap", "all-gather with overlap"],
        ),
        (
            "tp=2",
            {"overlap": "auto", "dispatch": "auto"},
            ["all-gather", "all-gather with overlap"],
        ),
        ("pp=2", {"overlap": "auto"}, ["all-to-all"]),
    ],
)
def test_modes_to_choose_from(layout, options, modes):
    assert list(map(str, Options(**options).modes(Layout.parse(layout), 2))) == modes


def test_what_a_form_comes_down_to():
    def forms_on(layout):
        return [form_on(Layout.parse(layout), form) for form in DISPATCH_FORMS]

    assert forms_on("pp=2") == [None] * 4
    assert forms_on("dp=2") == ["all_gather"] * 4
    assert forms_on("dp=2,ep=2") == list(DISPATCH_FORMS)
    assert is_by_node_on(Layout.parse("dp=2,ep=2"), "hierarchical")
    assert not is_by_node_on(Layout.parse("dp=2"), "hierarchical")


def test_prompts_may_have_a_form_of_their_own():
    table = DispatchTable.fixed("all_to_all", overlap=True, prefill_form="hierarchical")
    chosen = [table.choose(9, phase=phase) for phase in (Phase.PREFILL, Phase.DECODE, None)]
    assert [each.form for each in chosen] == ["hierarchical", "all_to_all", "all_to_all"]
    assert all(each.overlap for each in chosen)
    assert set(table.forms) == {"all_to_all", "hierarchical"}
    assert str(table) == "all-to-all with overlap, hierarchical in prefill"


def test_options_of_a_phase():
    options = Options(dispatch="all_gather", prefill_dispatch="hierarchical")
    assert options.of_phase(Phase.PREFILL) == Options(dispatch="hierarchical")
    assert options.of_phase(Phase.DECODE) == Options(dispatch="all_gather")
    assert Options(dispatch="auto").of_phase(Phase.PREFILL) == Options(dispatch="auto")
    assert options.is_by_node
    assert str(options) == "all-gather, hierarchical in prefill"
    assert options.forms(Layout(dp=16, ep=16), 8) == ("all_gather", "hierarchical")


def test_a_form_of_prompts_that_cannot_be():
    with pytest.raises(SpecError, match=telling("dispatch auto every step")):
        Options(dispatch="auto", prefill_dispatch="all_gather")
    with pytest.raises(SpecError, match="valid: all_to_all, all_gather, hierarchical, static"):
        Options(prefill_dispatch="ring")
