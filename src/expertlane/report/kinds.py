"""A report of any kind of results: its heading and its sections."""

from expertlane.report import content, plan, serving, simulation
from expertlane.report.document import PageSection, Section
from expertlane.report.pages import comparison as comparison_page
from expertlane.report.pages import plan as plan_page
from expertlane.report.pages import serving as serving_page
from expertlane.report.pages import simulation as simulation_page
from expertlane.results.file import AnyResults
from expertlane.results.plan import PlanResults
from expertlane.results.schema import Results
from expertlane.results.simulation import Simulation


def title(results: AnyResults) -> str:
    """The report's heading."""
    match results:
        case Results():
            return content.title(results)
        case PlanResults():
            return plan.title(results)
        case Simulation():
            return simulation.title(results)
        case _:
            return serving.title(results)


def sections(results: AnyResults, *, traffic: bool = False) -> tuple[Section, ...]:
    """Everything below the heading; with `traffic`, a comparison's in detail."""
    match results:
        case Results():
            return content.sections(results, traffic=traffic)
        case PlanResults():
            return plan.sections(results)
        case Simulation():
            return simulation.sections(results)
        case _:
            return serving.sections(results)


def headline(results: AnyResults) -> str:
    """What was found, in a sentence or two."""
    match results:
        case Results():
            return comparison_page.headline(results)
        case PlanResults():
            return plan_page.headline(results)
        case Simulation():
            return simulation_page.headline(results)
        case _:
            return serving_page.headline(results)


def page_sections(results: AnyResults) -> tuple[PageSection, ...]:
    """The plots of a page."""
    match results:
        case Results():
            return comparison_page.sections(results)
        case PlanResults():
            return plan_page.sections(results)
        case Simulation():
            return simulation_page.sections(results)
        case _:
            return serving_page.sections(results)


def source(results: AnyResults) -> str:
    """`measured`, `projected` or both."""
    match results:
        case Results(machine=None) | PlanResults() | Simulation():
            return "projected"
        case Results(projection=None):
            return "measured"
        case Results():
            return "measured, and projected apart"
        case _:
            return "measured"
