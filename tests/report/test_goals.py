import pytest

import example_results as example
from expertlane.report.comparison import compare
from expertlane.report.document import Section, Table
from expertlane.report.goals import experts_at_once, goals, layers_at_once
from expertlane.results.schema import Results
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.layout import Layout


def goals_of(results: Results) -> tuple[Section, ...]:
    return goals(results, compare(results), results.machine)


def tables(section: Section) -> list[Table]:
    return [part for part in section.parts if isinstance(part, Table)]


@pytest.mark.parametrize(
    ("layout", "num_micro_batches", "of_layer", "layers"),
    [
        (Layout(), 1, 1, 1),
        (Layout(tp=8, pp=2), 1, 1, 1),
        (Layout(tp=8, pp=2), 4, 1, 2),
        (Layout(dp=2, tp=8, ep=2), 1, 2, 1),
        (Layout(dp=16, ep=16), 1, 16, 1),
        (Layout(replicas=2, pp=2, dp=2, ep=2), 2, 4, 2),
    ],
)
def test_experts_at_once(
    layout: Layout, num_micro_batches: int, of_layer: int, layers: int
) -> None:
    deployment = Deployment("any", layout, Options(num_micro_batches=num_micro_batches))
    (row,) = compare(example.results([(deployment, 0.1)])).rows
    assert (experts_at_once(row), layers_at_once(row)) == (of_layer, layers)


def test_every_goal_has_evidence_for_every_deployment() -> None:
    given = example.usual()
    sections = goals_of(given)
    assert len(sections) == 4
    for section in sections:
        assert [row[1] for row in tables(section)[-1].rows] == [
            deployment.name for deployment in given.deployments
        ]


def test_the_evidence() -> None:
    parallelism, contention, overlap, scaling = goals_of(example.usual())
    assert parallelism.parts[0] == (
        "By its layout, most experts of a layer computing at once: 16, with #3, #4."
    )
    assert tables(parallelism)[0].rows[1][2:] == ("1", "2", "100%")
    assert contention.parts[0] == "One expert of a layer to a rank: #3, #4."
    assert tables(contention)[0].rows[0][2:] == ("16", "1/8", "2.00 kB")
    assert tables(contention)[0].rows[2][2:] == ("1", "all", "2.00 kB")
    # Blocked: rank 0 a tenth of 160 ms, 15 ranks three tenths: 46 ms; 40 of them gone.
    assert overlap.parts[0] == (
        "Overlap hides 87%: a decode step takes 160 ms without overlap, 120 ms with it (EP 16, "
        "two-batch overlap); without it 46.0 ms of a step are blocked in dispatch and combine, "
        "waiting for other ranks included."
    )
    assert [row[5] for row in tables(overlap)[0].rows] == ["—", "—", "—", "87%"]
    assert scaling.parts[0] == (
        "From 1 rank (ep=1) to 16 ranks (ep=16), the same workload: critical-path TPS per "
        "rank goes to 0.0781×, TPS per rank to 0.0781×; linear would be 1.00×."
    )


def test_overlap_that_costs_time_is_reported_so() -> None:
    given = example.results([(example.EXPERT, 0.1), (example.OVERLAP, 0.12)])
    overlap = goals_of(given)[2]
    assert isinstance(overlap.parts[0], str)
    assert overlap.parts[0].startswith("Overlap hides nothing here and costs 20.0 ms a step: ")
    assert tables(overlap)[0].rows[1][5] == "-70%"


def test_nothing_to_overlap_or_to_scale() -> None:
    _, contention, overlap, scaling = goals_of(example.results([(example.TENSOR, 0.1)]))
    assert contention.parts[0] == "One expert of a layer to a rank: no deployment."
    assert overlap.parts[0] == (
        "No two deployments differ in overlap alone: nothing shows what it hides."
    )
    assert scaling.parts[0] == "This experiment runs no layouts of growing ep."


def test_uneven_experts() -> None:
    uneven = Deployment("EP 3", Layout(dp=3, ep=3))
    contention = goals_of(example.results([(uneven, 0.1)]))[1]
    assert tables(contention)[0].rows[0][2] == "5–6"
