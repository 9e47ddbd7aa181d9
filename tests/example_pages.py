"""Results of every kind that a page is made of."""

from dataclasses import replace

import example_projection
import example_results
import example_timelines
from example_plan import PLAN
from example_serving import POINT, RECORD, RESULTS
from example_simulation import SIMULATION
from expertlane.results.estimate import Estimate
from expertlane.results.record import EXPERIMENT, DeploymentRecord
from expertlane.results.results import Results


def projected() -> Results:
    """The paper's experiment, projected alone: with batch sizes, timelines and the planner's."""
    found = example_projection.usual()
    usual = found.conditions[0]
    context = example_projection.CONTEXT

    def closer(record: DeploymentRecord) -> DeploymentRecord:
        if EXPERIMENT not in record.roles or record.conditions != usual:
            return record
        of_all = record.decode_of(context, example_projection.NUM_SEQS)
        timeline = example_timelines.timeline(16)
        steps = [
            replace(step, timeline=timeline) if step in (record.prefill, of_all) else step
            for step in record.steps
        ]
        fewer = (example_projection.step(batch / 100, context, batch) for batch in (1, 64))
        return replace(record, steps=(*steps, *fewer))

    front = example_projection.front(usual)
    return replace(found, deployments=(*map(closer, found.deployments), *front))


def both() -> Results:
    """Measured, with a projection beside it."""
    return example_results.usual().beside(projected())


def serving() -> Results:
    """Three loads on one layout."""
    points = tuple(
        replace(POINT, batch=batch, rate=None, output_tps=Estimate(100.0 * batch))
        for batch in (1, 8, 32)
    )
    return replace(RESULTS, deployments=(replace(RECORD, serving=points),))


KINDS = {
    "measured": example_results.usual,
    "projected": projected,
    "both": both,
    "plan": lambda: PLAN,
    "simulation": lambda: SIMULATION,
    "bench": serving,
    "bench at rates": lambda: RESULTS,
}
