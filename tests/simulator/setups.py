"""Small deployments to simulate."""

from expertlane.cost.laws.profile import Execution, parse_cluster
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.operation import NumberTypes
from expertlane.simulator.simulator import ServingSetup, Simulator
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import LengthRange, Load

MODEL = PRESETS["paper-tiny"]
ROUTING = PowerLawRouting(MODEL.num_experts, MODEL.num_experts_per_tok)


def simulator_of(
    layouts, batch, num_requests, prompt, output, *, rate=None, routing=ROUTING, **more
):
    """One pool, or those for prefill and decode; `batch` requests at once, or some at a rate."""
    *prefill, decode = map(Layout.parse, layouts)
    setup = ServingSetup(
        layout=decode,
        prefill_layout=prefill[0] if prefill else None,
        types=NumberTypes(),
        execution=Execution.GRAPH,
        routing=routing,
        **{"options": Options()} | more,
    )
    load = Load(num_requests, LengthRange(*prompt), LengthRange(*output), batch, rate)
    return Simulator(MODEL, parse_cluster("h100x8"), setup, load)
