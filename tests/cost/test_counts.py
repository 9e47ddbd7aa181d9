"""Contract 8: programs add up to what real ranks count of the same step, exactly."""

from dataclasses import fields, replace
from itertools import product
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest

from cost.plans import BLOCK_SIZE, CHUNKS, DECODE, MAX_POSITIONS, MAX_SEQS, PREFILL, random_plan
from cost.tiny_models import MODELS
from distributed.running import runner_on
from expertlane.balance.holding import placements_of
from expertlane.cost.routing import GivenRouting
from expertlane.cost.step.operation import NumberTypes, Transfer, TransferKind
from expertlane.cost.step.program import ProgramBuilder, StepProgram, count
from expertlane.cost.step.step_list import ENGINE, GPU_LIBRARIES
from expertlane.engine.ranks.commands import DescribeMachine, SetDispatch
from expertlane.results.step_record import RankCounts
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import (
    DISPATCH_FORMS,
    Deployment,
    DispatchMode,
    DispatchRow,
    DispatchTable,
    Options,
)
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase, Stage

FORMS = tuple(DISPATCH_FORMS)
PHASES = (PREFILL, PREFILL + CHUNKS + DECODE, DECODE)
MOST_RANKS = 8
WITHOUT_DUMMIES = replace(GPU_LIBRARIES, dummy_batches=False)  # the engine computes none


class Case(NamedTuple):
    """A layout on nodes.

    Attributes:
        redundant: copies of experts.
        is_even: equally many ranks of an `ep` group on each node.
    """

    layout: str
    ranks_per_node: int
    redundant: int = 0
    is_even: bool = True


CASES = (
    Case("tp=1", 8),
    Case("tp=2", 1),
    Case("dp=2", 8),
    Case("dp=2,ep=2", 1),
    Case("tp=4,ep=4", 2, redundant=5),
    Case("dp=4,ep=4", 2, redundant=3),
    Case("tp=4,ep=2", 2),
    Case("dp=2,tp=2,ep=4", 2, redundant=2),
    Case("dp=2,tp=2,ep=2", 4, redundant=1),
    Case("pp=2,dp=2,ep=2", 2, redundant=2),
    Case("pp=3,tp=2", 2),
    Case("dp=4,tp=2,ep=4", 4, redundant=6),
    Case("dp=8,ep=8", 4, redundant=8),
    Case("replicas=2,dp=2,ep=2", 2),
    Case("pp=2,dp=2,tp=2,ep=4", 4),
    Case("dp=3,ep=3", 3),
    Case("dp=2,tp=4,ep=8", 3, redundant=16, is_even=False),
    Case("dp=2,tp=2,ep=2", 3, redundant=4, is_even=False),
)


class Counting:
    """Runs plans on ranks and counts them without."""

    def __init__(self, pools, model, case, options, dtype="float32", table=None):
        layout = Layout.parse(case.layout)
        num_ranks = MOST_RANKS if dtype == "float32" else layout.world_size
        pool = pools.pool(num_ranks, dtype)
        limits = Limits(
            model.vocab_size, MAX_POSITIONS, MAX_SEQS * MAX_POSITIONS // BLOCK_SIZE, BLOCK_SIZE
        )
        deployment = Deployment("case", layout, options)
        self._runner = runner_on(
            pool, model, deployment, limits, ranks_per_node=case.ranks_per_node
        )
        if table is not None:
            ranks = range(layout.world_size)
            pool.call(SetDispatch(table), ranks=ranks)
        self._model, types = model, NumberTypes.of_engine(dtype, options)
        if pool.call(DescribeMachine())[0].keeps_narrow:
            types = NumberTypes.kept_as(dtype, options, None)
        self._builders = [
            ProgramBuilder(
                model,
                layout,
                placements_of(model, layout, options),
                types=types,
                dispatch=table
                or DispatchTable.fixed(options.dispatch, options.overlap, options.prefill_dispatch),
                payload=options.payload,
                ranks_per_node=case.ranks_per_node,
                kernels=kernels,
            )
            for kernels in (ENGINE, WITHOUT_DUMMIES)
        ]

    def check(self, plan):
        """Records of a step, after comparing them to what is counted."""
        records = self._runner.collect(self._runner.submit(plan)).records
        routing = GivenRouting([record.topk_ids for record in records])
        program, of_libraries = (builder.build(plan, routing) for builder in self._builders)
        self._compare(program, records)
        left_out = dict(FUSED) if self._model.latent is not None else {}
        if reduces_to_all(of_libraries):
            left_out = {name: {*left_out.get(name, ()), *stages} for name, stages in WHOLE.items()}
        self._compare(without_counts(of_libraries), self._count(without_counts(program)), left_out)
        return records

    def _count(self, program):
        return count(program, self._model.num_hidden_layers, self._model.num_experts)

    def _compare(self, program, expected, left_out=MappingProxyType({})):
        counted = self._count(program)
        assert len(counted) == len(expected)
        for of_engine, of_rank in zip(expected, counted, strict=True):
            for name in (field.name for field in fields(RankCounts)):
                values = np.array(getattr(of_rank, name)), np.array(getattr(of_engine, name))
                if name in left_out:
                    stages = list(left_out[name])
                    values = tuple(np.delete(each, stages, axis=0) for each in values)
                message = f"{name} of rank {of_engine.rank}"
                np.testing.assert_array_equal(*values, message, strict=True)


# What differs with GPU libraries' kernels, by stage, beside the numbers of rows that are told in no
# transfer of their own: of latent attention, for all prompts attend to keys and values made from
# the latent, also those for which that takes more FLOPs; and where a whole stage adds up by
# all-reduce, the transfers, and routers of all tokens.
FUSED = {name: {Stage.ATTENTION} for name in ("flops", "weight_bytes")}
WHOLE = {
    **{name: {Stage.ROUTER} for name in ("flops", "weight_bytes")},
    **{name: {*Stage} for name in ("sent_bytes", "num_collectives")},
}


def reduces_to_all(program):
    """Whether ranks keep all tokens, and so add up by all-reduce."""
    steps = (step for stage in program.of_stages() for step, _ in stage.distinct_steps())
    return any(isinstance(e, Transfer) and e.kind is TransferKind.ALL_REDUCE for e in steps)


def tells_counts(step):
    """Whether a step is the exchange of counts alone."""
    return getattr(step, "syncs_host", False) and step.kind is TransferKind.ALL_GATHER


def without_counts(program):
    """The program of a step without the exchanges that tell numbers of rows."""
    kept = {}

    def section_of(section):
        if id(section.steps) not in kept:  # layers that do the same stay one
            steps = (each for each in section.steps if not tells_counts(each))
            kept[id(section.steps)] = tuple(steps)
        return replace(section, steps=kept[id(section.steps)])

    def stage_of(stage):
        parts = (tuple(map(section_of, part)) for part in stage.parts)
        return replace(stage, parts=tuple(parts))

    return StepProgram(tuple(tuple(map(stage_of, of_stage)) for of_stage in program.stages))


def options_of(case, form, overlap, payload="model"):
    """Options; a placement that is not the plain one where there are copies."""
    return Options(
        dispatch=form,
        overlap=overlap,
        num_redundant_experts=case.redundant,
        placement="round_robin" if case.redundant % 2 else "linear",
        payload=payload,
    )


def check_case(pools, model, case, form, overlap, seed):
    layout = Layout.parse(case.layout)
    counting = Counting(pools, model, case, options_of(case, form, overlap))
    rng = np.random.default_rng(seed)
    for step, kinds in enumerate(PHASES):
        num_micro_batches = int(rng.integers(1, 4))
        plan = random_plan(rng, layout.dp, num_micro_batches, model.vocab_size, kinds, step=step)
        counting.check(replace(plan, replica=step % layout.replicas))


def _cases():
    for number, (case, form) in enumerate(product(CASES, FORMS)):
        if case.is_even or form != "hierarchical":
            yield number, case, form


@pytest.mark.smoke(6)
@pytest.mark.parametrize(
    ("number", "case", "form"),
    [
        pytest.param(*each, id=f"{each[1].layout}-{each[1].ranks_per_node}-{each[2]}")
        for each in _cases()
    ],
)
def test_layouts_and_forms(pools, number, case, form):
    """Families and overlap take turns: every layout, and every form, with overlap and without."""
    of_case, of_form = divmod(number, len(FORMS))
    overlap, names = bool((of_case + of_form) % 2), list(MODELS)
    model = MODELS[names[(number + number // len(names)) % len(names)]]
    check_case(pools, model, case, form, overlap, seed=number)


@pytest.mark.parametrize(
    ("decode", "prefill"), [("all_to_all", "hierarchical"), ("hierarchical", "all_gather")]
)
def test_prompts_take_a_form_of_their_own(pools, decode, prefill):
    case, model = Case("dp=4,ep=4", 2), MODELS["plain"]

    def sent(options):
        counting = Counting(pools, model, case, options)
        rng = np.random.default_rng(1)
        plan = random_plan(rng, 4, 1, model.vocab_size, DECODE, share_empty=0)
        found = {}
        for step, phase in enumerate(Phase):
            records = counting.check(replace(plan, step=step, phase=phase))
            found[phase] = np.stack([record.sent_bytes for record in records])
        return found

    apart = sent(Options(dispatch=decode, prefill_dispatch=prefill))
    same = sent(Options(dispatch=decode))
    np.testing.assert_array_equal(apart[Phase.DECODE], same[Phase.DECODE])
    assert (apart[Phase.PREFILL] != same[Phase.PREFILL]).any()


@pytest.mark.parametrize("payload", ["bfloat16", "float8"])
@pytest.mark.parametrize("form", FORMS)
def test_narrow_payloads(pools, form, payload):
    case = Case("dp=4,tp=2,ep=4", 4, redundant=2)
    model = MODELS["plain"].with_overrides(name="wide", hidden_size=160)
    counting = Counting(pools, model, case, options_of(case, form, False, payload))
    plan = random_plan(np.random.default_rng(1), 4, 1, model.vocab_size, PREFILL)
    records = counting.check(plan)
    assert sum(record.payload_squares[1] for record in records) > 0


@pytest.mark.parametrize("family", MODELS)
def test_bfloat16(pools, family):
    """Half as wide; bfloat16 as the payload is then no narrower."""
    case = Case("dp=2,tp=2,ep=4", 2)
    rng = np.random.default_rng(2)
    for payload in ("bfloat16", "float8"):
        options = options_of(case, "hierarchical", True, payload)
        counting = Counting(pools, MODELS[family], case, options, dtype="bfloat16")
        counting.check(random_plan(rng, 2, 1, MODELS[family].vocab_size, PREFILL))


@pytest.mark.parametrize("family", MODELS)
def test_weights_and_a_cache_of_one_byte(pools, family):
    case = Case("dp=2,tp=2,ep=2", 2)
    options = replace(options_of(case, "all_to_all", False), weights="int8", kv_dtype="float8")
    counting = Counting(pools, MODELS[family], case, options)
    kinds = PREFILL + DECODE
    plan = random_plan(np.random.default_rng(5), 2, 1, MODELS[family].vocab_size, kinds)
    counting.check(plan)


def test_steps_without_tokens(pools):
    """A part, or a whole micro-batch, that is empty on all ranks of a stage is left out."""
    case, rng = Case("pp=2,dp=2,ep=2", 2), np.random.default_rng(3)
    counting = Counting(pools, MODELS["plain"], case, options_of(case, "all_to_all", True))
    vocab_size = MODELS["plain"].vocab_size
    full = random_plan(rng, 2, 1, vocab_size, DECODE, share_empty=0.0)
    empty = random_plan(rng, 2, 1, vocab_size, DECODE, share_empty=1.0)
    for micro_batches in (
        empty.micro_batches,
        empty.micro_batches + full.micro_batches + empty.micro_batches,
    ):
        records = counting.check(replace(full, micro_batches=micro_batches))
    assert sum(record.num_collectives.sum() for record in records) > 0


def test_modes_by_number_of_tokens(pools):
    """A measured table picks form and overlap for every micro-batch."""
    case, model = Case("dp=2,tp=2,ep=2", 2), MODELS["plain"]
    table = DispatchTable(
        (DispatchMode("all_gather"), DispatchMode("hierarchical", True)),
        (DispatchRow(4, (1.0, 2.0)), DispatchRow(20, (2.0, 1.0))),
    )
    options = Options(dispatch="hierarchical")  # for its groups
    counting = Counting(pools, model, case, options, table=table)
    rng = np.random.default_rng(5)
    for kinds in (PREFILL, DECODE, PHASES[1]):
        counting.check(random_plan(rng, 2, 3, model.vocab_size, kinds))
