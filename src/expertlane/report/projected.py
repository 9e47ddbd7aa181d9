"""A projection's sections: what a cluster model says, apart from anything measured or reported."""

from expertlane.report.document import Section, Table, text
from expertlane.report.paper import is_papers_experiment
from expertlane.report.projected_goals import goals
from expertlane.report.projected_paper import judged, reported_verdict
from expertlane.report.projected_planner import planner
from expertlane.report.projected_speed import conditions, memory, speed
from expertlane.report.projected_verdict import verdict
from expertlane.report.projected_why import rests_on, why
from expertlane.results.projection import Projection
from expertlane.results.schema import Results


def projected_sections(results: Results) -> tuple[Section, ...]:
    """All of them, the verdict first; none without a projection."""
    projection = results.projection
    if projection is None:
        return ()
    is_papers = is_papers_experiment(results)
    return (
        verdict(projection, reported_verdict(projection) if is_papers else ()),
        *(speed(projection, top_k) for top_k in projection.top_ks),
        conditions(projection),
        memory(projection),
        why(projection),
        rests_on(projection),
        *goals(projection),
        *(judged(projection) if is_papers else ()),
        planner(projection),
        _assumptions(projection),
    )


def _assumptions(projection: Projection) -> Section:
    rows = tuple((each.name, each.value, each.why) for each in projection.assumptions)
    columns = (text("what"), text("here"), text("changed by, and why"))
    return Section("Projected: assumptions", (Table("", columns, rows),))
