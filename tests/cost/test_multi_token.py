"""Several tokens a step: what goes through the model, and what is guessed for the next one."""

from dataclasses import replace

import numpy as np
import pytest

from cost.projected import MODEL, builder_of, make_scheduler
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.throughput import MultiToken, MultiTokenAdapter
from expertlane.errors import SpecError
from expertlane.schedule.plan import Batch
from expertlane.spec.names import Stage


def batch(num_new, num_cached, yields):
    return Batch(
        seq_ids=np.arange(len(num_new)),
        num_scheduled_tokens=np.array(num_new),
        num_computed_tokens=np.array(num_cached),
        token_ids=np.zeros(sum(num_new), dtype=np.int64),
        block_tables=np.zeros((len(num_new), 1), dtype=np.int32),
        yields_token=np.array(yields),
    )


MIXED = batch([1, 5, 4, 1], [9, 0, 3, 7], [True, False, True, False])


def test_drafts_go_through_the_model_with_every_decode():
    plain = PartSizes.of([MIXED], 2)
    drafted = PartSizes.of([MIXED], 2, num_drafts=2)
    assert drafted.num_new.tolist() == [3, 5, 4, 1]  # the last is a chunk of a prompt
    assert (drafted.tokens - plain.tokens).tolist() == [2, 2]
    assert plain.num_yielding.tolist() == [2, 2]
    assert drafted.num_yielding.tolist() == [4, 4]  # three of the decode, one of the prompt
    assert drafted.owned_yielding.sum() == 4
    sizes = drafted.attention(None)
    assert (sizes.num_queries, sizes.decode_seqs.tolist()) == (3, [1, 1])
    assert sizes.decode_positions.tolist() == [12, 12]  # read once for all three


def test_further_passes_take_one_token_of_each_that_goes_on():
    sizes = PartSizes.of([MIXED], 2, num_drafts=2).further(1)
    assert sizes.num_new.tolist() == [1, 1]
    assert sizes.num_cached.tolist() == [13, 8]
    assert sizes.num_drafts == 0


def test_a_program_has_a_pass_for_each_draft():
    layout = "pp=2,dp=2,ep=2"

    def heads(num_drafts):
        builder = builder_of(layout, num_drafts=num_drafts)
        scheduler = make_scheduler(layout, num_requests=4)
        plan = scheduler.next_plan()
        assert plan is not None
        routing = PowerLawRouting(MODEL.num_experts, MODEL.num_experts_per_tok)
        program = builder.build(plan, routing)
        steps = [
            [step for section in of_stage[0].sections() for step in section.steps]
            for of_stage in program.stages
        ]
        return [
            sum(step.stage is stage for step in of_stage)
            for of_stage in steps
            for stage in (Stage.HEAD, Stage.EXPERTS)
        ]

    plain, drafted = heads(0), heads(2)
    assert drafted[:2] == plain[:2]  # the first stage has none
    assert drafted[2] == 3 * plain[2]
    assert drafted[3] == plain[3] / 2 * 4  # two layers, and one twice more


@pytest.mark.parametrize(("acceptance", "tokens", "steps"), [(0, 1, 11), (1, 3, 5), (0.5, 1.75, 7)])
def test_tokens_a_step(acceptance, tokens, steps):
    drafts = MultiToken(2, acceptance)
    assert drafts.tokens_per_step == tokens
    assert drafts.num_steps(11) == steps
    assert drafts.num_steps(1) == 1


def test_positions_grow_by_what_a_step_yields():
    adapter = MultiTokenAdapter(MultiToken(1, 0.5))
    plan = make_scheduler(num_requests=1).next_plan()
    assert plan is not None
    seen = []
    for step in range(4):
        decode = batch([1], [5 + step], [True])
        adapted = adapter.adapt(replace(plan, micro_batches=((decode,),)))
        seen.append(int(adapted.micro_batches[0][0].num_computed_tokens[0]))
    assert seen == [5, 6, 8, 10]  # 5 + 1.5 steps, rounded to even


@pytest.mark.parametrize("given", [(-1, 0.5), (17, 0.5), (1, -0.1), (1, float("nan"))])
def test_numbers_that_cannot_be(given):
    with pytest.raises(SpecError):
        MultiToken(*given)
