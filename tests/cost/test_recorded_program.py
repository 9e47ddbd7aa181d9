"""What real ranks recorded, replayed by a profile's laws: what the same profile projects."""

import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest

from cli.screen import telling
from cost.projected import DRIVER_S, PROFILE
from cost.tiny_models import MODELS
from distributed.running import runner_on
from expertlane.balance.holding import placements_of
from expertlane.cost.laws.profile import Execution, Terms, read_profile
from expertlane.cost.memory import workload_limits
from expertlane.cost.pricing import Pricing
from expertlane.cost.recorded_program import PricedRecording
from expertlane.cost.routing import GivenRouting
from expertlane.cost.runner import CostRunner
from expertlane.cost.step.operation import NumberTypes, TransferKind
from expertlane.cost.step.program import ProgramBuilder
from expertlane.cost.virtual import VirtualClock, VirtualLinks
from expertlane.results.step_record import Action
from expertlane.schedule.request import Request
from expertlane.schedule.scheduler import ContinuousScheduler, FinishedStep, drive, step_records
from expertlane.spec.deployment import Deployment, DispatchTable, Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage
from expertlane.spec.workload import Workload

WORKLOAD = Workload(num_sequences=8, prompt_len=6, output_len=4)
RANKS_PER_NODE = 2
ROTATING = {"num_micro_batches": 2, "micro_batch_schedule": "rotating"}
# Layout, options, model, profile, and how the host launches.
CASES = [
    ("tp=1", {}, "latent", "made-up", Execution.EAGER),
    ("tp=4", {}, "full_norm", "made-up", Execution.EAGER),
    ("tp=2", {"overlap": True}, "windows", "made-up", Execution.GRAPH),
    ("dp=4,ep=4", {"dispatch": "all_gather", "overlap": True}, "plain", "h100", Execution.GRAPH),
    ("dp=4,ep=4", {}, "head_norm", "h100", Execution.EAGER),
    ("dp=4,ep=4", {"overlap": True}, "plain", "h100", Execution.EAGER),
    ("dp=4,ep=4", {"dispatch": "hierarchical"}, "plain", "h100", Execution.GRAPH),
    ("dp=2,tp=2,ep=4", {"dispatch": "hierarchical", "overlap": True}, "plain", "h100", "graph"),
    ("dp=2,tp=2,ep=2", {"overlap": True}, "latent", "made-up", Execution.SERIAL),
    ("pp=2,tp=2", {}, "plain", "made-up", Execution.GRAPH),
    ("pp=2,dp=2,ep=2", {"num_micro_batches": 2}, "plain", "h100", Execution.EAGER),
    ("pp=2,dp=2,ep=2", ROTATING | {"overlap": True}, "plain", "made-up", Execution.EAGER),
    ("pp=3", ROTATING, "plain", "made-up", Execution.SERIAL),
]


@dataclass(eq=False)
class Ran:
    """A workload that ran on real ranks, and how to do the same without them."""

    layout: Layout
    options: Options
    model: object
    limits: object
    steps: list[FinishedStep]
    builder: ProgramBuilder

    @classmethod
    def on(cls, pool, layout, options, model, **flags):
        layout, options, model = Layout.parse(layout), Options(**options), MODELS[model]
        limits = workload_limits(WORKLOAD, model, layout)
        made = Deployment("case", layout, options)
        runner = runner_on(pool, model, made, limits, ranks_per_node=RANKS_PER_NODE)
        builder = ProgramBuilder(
            model,
            layout,
            placements_of(model, layout, options),
            types=NumberTypes.all_of("float32"),
            dispatch=DispatchTable.fixed(options.dispatch, options.overlap),
            payload=options.payload,
            ranks_per_node=RANKS_PER_NODE,
            block_size=limits.block_size,
        )
        ran = cls(layout, options, model, limits, [], builder)
        flags = {"record_operations": True, "record_routing": True} | flags
        ran.steps = list(drive(ran.scheduler(**flags), runner))
        return ran

    def scheduler(self, **flags):
        scheduler = ContinuousScheduler(self.layout, self.options, self.limits, **flags)
        for seq, prompt in enumerate(WORKLOAD.prompt_token_ids(self.model.vocab_size)):
            scheduler.add(Request(str(seq), prompt, max_tokens=WORKLOAD.output_len))
        return scheduler

    def projected(self, pricing, terms):
        """The steps as a projection has them that is told the same choices of experts."""
        runner = CostRunner(self.builder, Repeated(self.steps), pricing, terms)
        return [step.outcome for step in drive(self.scheduler(), runner)]

    def replayed(self, laws_of, profile, types, execution, scale=1.0):
        records = list(step_records(self.steps))
        plans = {record: step.plan for record, step in zip(records, self.steps, strict=True)}
        laws = PricedRecording(self.builder, plans, laws_of, types, execution)
        links = VirtualLinks(profile, (scale / 2, scale, 2 * scale))
        num_layers = self.model.num_hidden_layers
        clock = VirtualClock(self.layout, num_layers, links, RANKS_PER_NODE, laws)
        return clock.replay(records)


class Repeated:
    """What was chosen in the steps of a run, step by step in the order of their plans."""

    likeness = 0.0

    def __init__(self, steps):
        self._steps, first = {}, 0
        for plan, outcome in sorted(steps, key=lambda step: step.plan.step):
            self._steps[first] = GivenRouting([record.topk_ids for record in outcome.records])
            first += sum(batch.num_tokens for batch in plan.batches)

    def sample_of(self, layer):
        return layer

    def topk_ids(self, layer, first, before, owned, num_new=None):
        return self._steps[first].topk_ids(layer, first, before, owned, num_new)


def laws(name, execution):
    """Profile, and the types that its laws are looked up by."""
    if name == "h100":
        return read_profile(name), NumberTypes()
    if execution is Execution.SERIAL:
        overhead = {"overhead_s": PROFILE.terms["launch_s"]}
        return replace(PROFILE, terms=PROFILE.terms | overhead), NumberTypes.all_of("float32")
    return PROFILE, NumberTypes.all_of("float32")


@pytest.mark.smoke(5)
@pytest.mark.parametrize(("layout", "options", "model", "name", "execution"), CASES, ids=str)
def test_a_record_by_laws_is_what_is_projected(pools, layout, options, model, name, execution):
    ran = Ran.on(pools.pool(8), layout, options, model)
    execution = Execution(execution)
    profile, types = laws(name, execution)
    projected = ran.projected(Pricing(profile, types), Terms.of(profile, execution))
    replayed = ran.replayed(profile, profile, types, execution)
    assert len(projected) == len(replayed) >= 4
    found, expected = (
        np.array([[step.submitted_s, step.finished_s] for step in steps])
        for steps in ([each.step for each in replayed], projected)
    )
    took_s = [each[:, 1] - each[:, 0] for each in (found, expected)]
    np.testing.assert_allclose(*took_s, rtol=1e-6)  # the bar is 1 %
    np.testing.assert_allclose(found[-1, 1], expected[-1, 1], rtol=1e-6)
    for virtual, outcome in zip(replayed, projected, strict=True):
        for of_rank, of_model in zip(virtual.step.records, outcome.records, strict=True):
            compared = of_rank.wall_s.sum(axis=0), of_model.wall_s.sum(axis=0)
            np.testing.assert_allclose(*compared, rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def ran(pools):
    return Ran.on(pools.pool(8), "dp=4,ep=4", {"overlap": True}, "plain")


def replayed(ran, links=PROFILE, **flags):
    types = NumberTypes.all_of("float32")
    return ran.replayed(PROFILE, links, types, Execution.EAGER, **flags)


def test_links_are_those_of_the_clock(ran):
    """Computing and the launcher are the profile's; transfers, and they alone, are scaled."""
    without, with_links, slower = (
        replayed(ran, links, scale=scale)
        for links, scale in ((None, 1.0), (PROFILE, 1.0), (PROFILE, 2.0))
    )
    for free, plain, scaled in zip(without, with_links, slower, strict=True):
        assert len({step.finished_s for step in free.by_scale}) == 1
        ends = [step.finished_s for step in plain.by_scale]
        assert ends == sorted(ends)
        assert free.step.finished_s < ends[0] < ends[2]
        assert plain.step.finished_s == ends[1]
        assert scaled.by_scale[0].finished_s == pytest.approx(ends[1])
        assert scaled.by_scale[1].finished_s == pytest.approx(ends[2])
    (first, *_) = without
    in_flight_s = [record.transfers_s[0] for record in first.step.records]
    assert in_flight_s == [0.0] * 4


def test_the_launcher_takes_its_time_between_steps(ran):
    for before, after in pairwise(replayed(ran)):
        assert after.step.submitted_s == before.step.finished_s
    for each in replayed(ran):
        walls_s = [record.wall_s[..., :-1, :].sum() for record in each.step.records]
        assert each.step.finished_s - each.step.submitted_s > DRIVER_S + max(walls_s)


def changed(ran, change):
    """The run, with what `change` makes of its last step's record of rank 2."""
    *steps, (plan, outcome) = ran.steps
    records = [change(record) if record.rank == 2 else record for record in outcome.records]
    last = FinishedStep(plan, replace(outcome, records=tuple(records)))
    return replace(ran, steps=[*steps, last])


def _more(name, place):
    def change(record):
        counted = np.array(getattr(record, name))
        counted[place] += 1_000
        return replace(record, **{name: counted if counted.ndim else int(counted)})

    return change


COUNTS = {
    "flops in experts: ": _more("flops", Stage.EXPERTS),
    "weight bytes in attention: ": _more("weight_bytes", Stage.ATTENTION),
    "kv bytes: ": _more("kv_bytes", ()),
    "sent bytes in combine, payload to rank 1: ": _more("sent_bytes", (Stage.COMBINE, 0, 1)),
    "num collectives in dispatch: ": _more("num_collectives", Stage.DISPATCH),
}


@pytest.mark.parametrize("words", COUNTS)
def test_other_counts_are_refused(ran, words):
    step = ran.steps[-1].plan.step
    message = rf"^step {step}, rank 2: {words}[\d,]+ were recorded, [\d,]+ are emitted$"
    with pytest.raises(ValueError, match=message):
        replayed(changed(ran, COUNTS[words]))


def in_operations(ran, change):
    """The run, with what `change` does to the operations of all ranks in its last step."""
    *steps, (plan, outcome) = ran.steps
    records = []
    for record in outcome.records:
        operations = copy.deepcopy(record.operations)
        change(operations)
        records.append(replace(record, operations=operations))
    return replace(
        ran, steps=[*steps, FinishedStep(plan, replace(outcome, records=tuple(records)))]
    )


def _first(operations, action):
    return np.flatnonzero(operations.action == action)[0]


def _other_kind(operations):
    operations.kind[0] = list(TransferKind).index(TransferKind.ALL_TO_ALL)


def _other_bytes(operations):
    operations.sent_bytes[2, operations.sent_bytes[2] > 0] += 8


def _other_layer(operations):
    operations.layer[_first(operations, Action.POST)] = 2


def _other_order(operations):
    first, second = np.flatnonzero(operations.action == Action.WAIT)[:2]
    swapped = operations.transfer[[second, first]]
    operations.transfer[[first, second]] = swapped


def _no_end(operations):
    last = np.flatnonzero(operations.action == Action.WAIT)[-1]
    for name in ("action", "stage", "layer", "micro_batch", "cpu_s", "transfer"):
        object.__setattr__(operations, name, np.delete(getattr(operations, name), last))


SEQUENCES = [
    (_other_kind, "event 0 all_to_all all_gather"),
    (_other_bytes, "event 3 recorded all_to_all 2 dispatch emitted"),
    (_other_layer, "event 0 recorded layer 2 emitted"),
    (_other_order, "event 2 recorded 1 emitted 0"),
    (_no_end, "events recorded emitted"),
]


@pytest.mark.parametrize(("change", "words"), SEQUENCES)
def test_other_collectives_are_refused(ran, change, words):
    step = ran.steps[-1].plan.step
    with pytest.raises(ValueError, match=telling(f"step {step} ranks 0 3 micro-batch {words}")):
        replayed(in_operations(ran, change))


def test_other_plans_are_refused(ran):
    """A builder that is not of the deployment that ran."""
    other = replace(ran.builder, dispatch=DispatchTable.fixed("all_to_all", overlap=False))
    with pytest.raises(ValueError, match=r"^step 0, rank 0: .* were recorded, .* are emitted"):
        replayed(replace(ran, builder=other))


def test_a_plan_that_did_not_ask_for_the_routing_is_refused(ran):
    steps = [step._replace(plan=replace(step.plan, record_routing=False)) for step in ran.steps]
    with pytest.raises(ValueError, match=telling("step 0 plan routing")):
        replayed(replace(ran, steps=steps))


def test_replicas_and_copies_of_experts(pools):
    """Each replica has a launcher of its own, where a projection's share one."""
    options = {"num_redundant_experts": 3, "placement": "round_robin", "payload": "bfloat16"}
    ran = Ran.on(pools.pool(8), "replicas=2,dp=2,ep=2", options, "plain")
    types = NumberTypes.all_of("float32")
    terms = Terms.of(PROFILE, Execution.EAGER)
    projected = ran.projected(Pricing(PROFILE, types), terms)
    found = sorted(
        (step.plan.step, each.step.finished_s - each.step.submitted_s)
        for step, each in zip(ran.steps, replayed(ran), strict=True)
    )
    # The same tokens in each step of both replicas take about as long; the launcher is apart.
    assert [step for step, _ in found] == list(range(len(projected)))
    assert sum(took_s for _, took_s in found) == pytest.approx(
        sum(each.finished_s - each.submitted_s for each in projected), rel=0.01
    )
