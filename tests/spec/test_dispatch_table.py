"""Which form a step takes."""

from expertlane.spec.dispatch_table import DispatchRow, DispatchTable

TABLE = DispatchTable(
    (
        DispatchRow(1, {"all_to_all": 2.0, "all_gather": 1.0}),
        DispatchRow(16, {"all_to_all": 2.0, "all_gather": 1.5}),
        DispatchRow(64, {"all_to_all": 2.0, "all_gather": 3.0}),
    )
)


def test_the_first_row_with_so_many_tokens_counts():
    forms = [TABLE.choose(num_tokens) for num_tokens in (0, 1, 16, 17, 64, 10_000)]
    assert forms == ["all_gather"] * 3 + ["all_to_all"] * 3
    assert TABLE.forms == ("all_gather", "all_to_all")


def test_words():
    assert str(TABLE) == "all-gather up to 16, then all-to-all"
    assert str(DispatchTable.fixed("hierarchical")) == "hierarchical"
