"""A made-up cluster and what runs on it, put together for tests of runners and pools."""

from dataclasses import replace

from expertlane.balance.holding import placements_of
from expertlane.cost.laws.profile import Device, Execution, LinkSheet, Profile, Term, Terms
from expertlane.cost.laws.times import Basis
from expertlane.cost.pricing import Pricing
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.runner import CostRunner
from expertlane.cost.step.operation import NumberTypes
from expertlane.cost.step.program import ProgramBuilder
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler, FinishedStep
from expertlane.spec.deployment import DispatchTable, Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Link

MODEL = PRESETS["paper-tiny"]
TYPES = NumberTypes()
DRIVER_S = 1e-3


def term(value):
    return Term(value, value / 2, value * 2, Basis.BOUND, "made up")


PROFILE = Profile(
    "made-up",
    Device("made up", 1e9, 1e9, {"bfloat16": 1e12, "float32": 1e11}, "made up"),
    4,
    {Link.INTRA_NODE: LinkSheet(1e9, "made up"), Link.INTER_NODE: LinkSheet(1e8, "made up")},
    terms={
        "launch_s": term(1e-6),
        "graph_launch_s": term(5e-6),
        "driver_s": term(DRIVER_S),
    },
)


def builder_of(layout, model=MODEL, options=None, **more):
    """A builder of programs, with the engine's kernels and linear placements unless told."""
    layout = Layout.parse(layout) if isinstance(layout, str) else layout
    placements = placements_of(model, layout, options or Options())
    return ProgramBuilder(model, layout, placements, **{"types": TYPES} | more)


def program_of(layout, part, model=MODEL, form="all_to_all", **more):
    """The program of a step of which only sizes are known."""
    routing = PowerLawRouting(model.num_experts, model.num_experts_per_tok, num_sampled_layers=1)
    return builder_of(layout, model, **more).build_sized([(form, [part])], routing)


def make_runner(layout="tp=1", options=None, execution=Execution.GRAPH, **flags):
    options = options or Options()
    dispatch = DispatchTable.fixed(options.dispatch, bool(options.overlap))
    builder = builder_of(layout, MODEL, options, dispatch=dispatch, ranks_per_node=4)
    return CostRunner(
        builder,
        PowerLawRouting(MODEL.num_experts, MODEL.num_experts_per_tok),
        Pricing(PROFILE, TYPES),
        Terms.of(PROFILE, execution),
        **flags,
    )


def at_bound(runner, steps, bound):
    """The same steps, without records, by one bound of the runner's clock."""
    found = []
    for plan, outcome in steps:
        submitted_s, finished_s = (float(each[bound]) for each in runner.bounds[plan.step])
        outcome = replace(outcome, records=(), submitted_s=submitted_s, finished_s=finished_s)
        found.append(FinishedStep(plan, outcome))
    return found


def make_scheduler(layout="tp=1", options=None, *, num_requests=0, flags=None, **sizes):
    """With requests of 5 tokens and 3 more to generate."""
    limits = Limits(
        **{"max_model_len": 64, "num_blocks": 64, "block_size": 4} | sizes, vocab_size=97
    )
    scheduler = ContinuousScheduler(
        Layout.parse(layout), options or Options(), limits, **(flags or {})
    )
    for number in range(num_requests):
        scheduler.add(Request(str(number), [1 + number % 96] * 5, max_tokens=3))
    return scheduler
