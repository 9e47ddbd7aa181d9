from dataclasses import replace

import example_projection
import example_results as example
from cli.screen import in_order, tells
from expertlane.report.sections import report_of
from expertlane.spec.deployment import Deployment
from expertlane.spec.layout import Layout
from report.shown import section, tables, words


def test_every_deployment_has_evidence() -> None:
    given = example.usual()
    report = report_of(given)
    names = [each.name for each in given.select("measured", "experiment")]
    for heading in ("Experts at once", "Scaling"):
        assert [row[1] for row in tables(section(report, heading))[-1].rows] == names


def test_the_evidence() -> None:
    report = report_of(example.usual())
    parallelism, scaling = section(report, "Experts at once"), section(report, "Scaling")
    assert tells(words(parallelism), "16 #3 #4")
    (table,) = tables(parallelism)
    assert table.rows[0][2:] == ("1", "1", "100%", "16", "1/8", "2.00 kB")
    assert table.rows[1][2:] == ("1", "2", "100%", "16", "1/8", "2.00 kB")
    assert table.rows[2][2:] == ("16", "16", "100%", "1", "all", "2.00 kB")
    overlap = section(report, "Communication hidden by overlap")
    assert "1 of 1" in words(overlap)
    assert tables(overlap)[0].rows == (
        ("#3, #4", "160", "120", "46.0", "25%", "0 B", "33%"),
    )  # fmt: skip
    assert in_order(scaling.parts[0], "1 ep=1 16 ep=16 TPS 0.0781× TPS rank 0.0781× 0.625× 1.00×")
    same_work, same_share, _ = tables(scaling)
    assert same_work.title == "Growing ep"
    assert tells(same_share.title, "Growing ep same sequences")
    assert same_share.rows == (
        ("1", "1", "10.0", "10.0", "1.00×", "100", "1.00×"),  # one sequence each 0.1 s
        ("16", "16", "100", "6.25", "0.625×", "62.5", "0.625×"),
    )


def test_overlap_that_costs_time_is_reported_so() -> None:
    given = example.results([(example.EXPERT, 0.1), (example.OVERLAP, 0.12)])
    overlap = section(report_of(given), "Communication hidden by overlap")
    assert "0 of 1" in words(overlap)
    assert tables(overlap)[0].rows[0][4] == "0%"


def test_nothing_to_overlap_or_to_scale() -> None:
    report = report_of(example.results([(example.TENSOR, 0.1)]))
    assert tells(words(section(report, "Communication hidden")), "No overlap")
    assert tells(section(report, "Scaling").parts[0], "no layouts ep")


def test_uneven_experts() -> None:
    report = report_of(example.results([(Deployment("EP 3", Layout(dp=3, ep=3)), 0.1)]))
    assert tables(section(report, "Experts at once"))[0].rows[0][5] == "5–6"


def test_a_projection_has_the_same_tables_in_sections_of_its_own() -> None:
    results = example_projection.usual()
    report = report_of(results)
    parallelism = section(report, "Projected: experts at once")
    assert tells(words(parallelism), "16 #3 #4")
    assert tables(parallelism)[0].rows[0][2:] == ("1", "1", "1/8", "6.00 GB")
    overlap = tables(section(report, "Projected: communication hidden by overlap"))[0].rows[0]
    assert overlap == ("#3, #4", "8.00", "7.60", "1.60", "5.0%", "0 B", "5.3%")
    scaling = words(section(report, "Projected: scaling"))
    assert "TPS per GPU becomes 0.250×" in scaling
    assert tells(scaling, "memory ep=1 72.0 GB weights GPU 70.0")
    assert tells(scaling, "GPUs redundant experts")
    alone = replace(results, deployments=results.select("projected", "experiment"))
    assert tells(words(section(report_of(alone), "Projected: scaling")), "no layouts ep")
