"""Results of every kind that a page is made of."""

from dataclasses import replace

import example_projection
import example_results
import example_timelines
from example_plan import PLAN
from example_projection import row
from example_serving import POINT, RESULTS
from example_simulation import SIMULATION
from expertlane.results.file import AnyResults
from expertlane.results.projection import Estimate, Planned, Projection, ServedDeployment
from expertlane.results.schema import Results
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Phase


def projection() -> Projection:
    """With batch sizes, timelines and the planner's front."""
    found = example_projection.usual()
    closer = tuple(
        replace(
            each,
            by_batch=tuple(
                example_projection.step(batch / 100, found.context, batch)
                for batch in (1, 64, 1024)
            ),
            timelines={phase: example_timelines.timeline(16) for phase in Phase},
        )
        if each.conditions == found.conditions[0]
        else each
        for each in found.deployments
    )
    best = row("dp=4,tp=4,ep=16; plain", Layout(dp=4, tp=4, ep=16), 1.6)
    front = tuple(
        ServedDeployment(
            best.name,
            best.layout,
            best.options,
            batch,
            Estimate(1e3 * batch, 5e2 * batch, 2e3 * batch),
            Estimate(0.001 * batch, 0.0005 * batch, 0.002 * batch),
        )
        for batch in (1, 8)
    )
    planned = tuple(
        Planned(each.top_k, 10, 1, each.decode, each.served, front) for each in found.planned
    )
    return replace(found, deployments=closer, planned=planned)


def projected() -> Results:
    """The paper's experiment, projected alone."""
    model = {name: getattr(PRESETS["paper"], name) for name in vars(PRESETS["paper"])}
    return example_projection.results(model, projection())


def both() -> Results:
    """Measured, with a projection beside it."""
    return replace(example_results.usual(), projection=projection())


def serving() -> AnyResults:
    """Three loads on one layout."""
    points = tuple(
        replace(POINT, batch=batch, rate=None, output_tps=100.0 * batch) for batch in (1, 8, 32)
    )
    return replace(RESULTS, points=points)


KINDS = {
    "measured": example_results.usual,
    "projected": projected,
    "both": both,
    "plan": lambda: PLAN,
    "simulation": lambda: SIMULATION,
    "bench": serving,
    "bench at rates": lambda: RESULTS,
}
