import example_results as example
from expertlane.report.sections import report_of
from report.shown import section, tables, words


def test_overlap_that_costs_time_is_reported_so() -> None:
    given = example.results([(example.EXPERT, 0.1), (example.OVERLAP, 0.12)])
    overlap = section(report_of(given), "Communication hidden by overlap")
    assert "0 of 1" in words(overlap)
    assert tables(overlap)[0].rows[0][4] == "0%"
