"""A report of any kind of results: its heading, its sections, and the plots of its page."""

from types import ModuleType

from expertlane.report import content, plan, serving, simulation
from expertlane.report.document import PageSection, Section, printable_section
from expertlane.report.pages import comparison as comparison_page
from expertlane.report.pages import plan as plan_page
from expertlane.report.pages import serving as serving_page
from expertlane.report.pages import simulation as simulation_page
from expertlane.results.file import AnyResults
from expertlane.results.plan import PlanResults
from expertlane.results.schema import Results
from expertlane.results.serving import ServingResults
from expertlane.results.simulation import Simulation
from expertlane.spec.printable import printable

# Of each kind, what makes its words and tables, and what makes its plots.
_MAKERS: dict[type, tuple[ModuleType, ModuleType]] = {
    Results: (content, comparison_page),
    PlanResults: (plan, plan_page),
    Simulation: (simulation, simulation_page),
    ServingResults: (serving, serving_page),
}


def title(results: AnyResults) -> str:
    """The report's heading."""
    return printable(_MAKERS[type(results)][0].title(results))


def sections(results: AnyResults, *, traffic: bool = False) -> tuple[Section, ...]:
    """Everything below the heading; with `traffic`, a comparison's in detail."""
    found: tuple[Section, ...]
    if isinstance(results, Results):
        found = content.sections(results, traffic=traffic)
    else:
        found = _MAKERS[type(results)][0].sections(results)
    return tuple(map(printable_section, found))


def headline(results: AnyResults) -> str:
    """What was found, in a sentence or two."""
    return printable(_MAKERS[type(results)][1].headline(results))


def page_sections(results: AnyResults) -> tuple[PageSection, ...]:
    """The plots of a page."""
    found: tuple[PageSection, ...] = _MAKERS[type(results)][1].sections(results)
    return found


def source(results: AnyResults) -> str:
    """`measured`, `projected` or both."""
    match results:
        case Results(machine=None) | PlanResults() | Simulation():
            return "projected"
        case Results(projection=None) | ServingResults():
            return "measured"
        case Results():
            return "measured, and projected apart"
