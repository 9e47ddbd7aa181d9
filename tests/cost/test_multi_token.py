"""Several tokens a step: what goes through the model, and what is guessed for the next one."""

from dataclasses import replace

import numpy as np
import pytest

from cost.families import CONFIGS, placed, published
from cost.projected import MODEL, builder_of, make_scheduler, program_of
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.operation import OpKind
from expertlane.cost.throughput import MultiToken, MultiTokenAdapter
from expertlane.errors import SpecError
from expertlane.schedule.plan import Batch
from expertlane.schedule.request import Limits
from expertlane.spec.from_hf import from_hf
from expertlane.spec.mixers import Mixing
from expertlane.spec.model import LayerKind
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


FULL = Mixing()
CHOSEN = Mixing(choice="own")
DRAFTS = {
    "deepseek-v3": [(FULL, "experts")],
    "glm-4.5-air": [(FULL, "experts")],
    "glm-4.7-flash": [(FULL, "experts")],
    "ernie-4.5-21b-a3b": [(FULL, "dense")],
    "qwen3-next-80b-a3b": [(FULL, "experts")],
    "qwen3.5-397b-a17b": [(FULL, "experts")],
    "deepseek-v3.2": [(CHOSEN, "experts")],
    "glm-5": [(CHOSEN, "experts")],
    "glm-5.2": [(CHOSEN, "experts")],
    "deepseek-v4-flash": [(Mixing(window=128), "experts")],
    "nemotron-3-super-120b-a12b": [(FULL, "none"), (None, "experts")],
    "ling-3.0-flash": [(FULL, "experts")],
    "longcat-flash": [(FULL, "dense")],
    "hy3-preview": [(FULL, "experts")],
    "mimo-v2-flash": [(Mixing(window=129), "dense")],
    "step-3.5-flash": [(Mixing(window=512), "dense")],
}


@pytest.mark.parametrize("name", DRAFTS)
def test_layers_of_a_published_draft(name):
    model = published(name)
    kinds = tuple(LayerKind(*kind) for kind in DRAFTS[name])
    assert model.draft_kinds == kinds
    drafting, num = model.with_draft(), model.num_hidden_layers
    assert drafting.num_hidden_layers == num + len(kinds)
    found = [drafting.kind_of_layer(layer) for layer in range(drafting.num_hidden_layers)]
    assert found == [*map(model.kind_of_layer, range(num)), *kinds]


def test_a_draft_that_no_list_of_layers_names():
    config = CONFIGS["step-3.5-flash"]
    listed = config["layer_types"][: config["num_hidden_layers"]]
    model = from_hf(config | {"layer_types": listed}, "step", weights=False)
    assert model.draft_kinds == (LayerKind(Mixing(window=512), "dense"),)


def test_a_draft_with_a_window_and_no_experts_is_held_and_priced_as_such():
    model = published("mimo-v2-flash")
    plain = placed(model)
    drafting = plain.with_drafts(2)
    limits = Limits(model.vocab_size, 1024, 64)
    before, after = (each.rank_memory(limits, 0, 1) for each in (plain, drafting))
    # 64 heads of 192, 8 of 192 + 128, 64 of 128; 64 sinks; a dense MLP; two norms.
    matrices = 4096 * (64 * 192 + 8 * (192 + 128) + 64 * 128 + 3 * 16384)
    assert after.weight_bytes - before.weight_bytes == 2 * matrices + 4 * (64 + 2 * 4096)
    assert after.kv_bytes - before.kv_bytes == (9 + 1) * 16 * 8 * (192 + 128) * 2
    sizes = PartSizes.even(1, 1, 4, 1, 1000)
    sections = program_of("tp=1", sizes, model, num_drafts=1).stages[0][0].parts[0]
    kinds = [step.kind for section in sections[-3:] for step in section.steps]
    assert OpKind.EXPERTS not in kinds
    # The core reads the window alone.
    (core,) = (step for step in sections[-2].steps if step.kind is OpKind.DECODE_ATTENTION)
    assert core.sizes["positions"].tolist() == [4 * 129]


def test_each_token_that_is_verified_writes_a_state():
    model = published("qwen3-next-80b-a3b")
    plain = placed(model)
    states = plain._kept(0).sequence
    assert plain.with_drafts(3)._kept(0).sequence == 4 * states
    sizes = PartSizes.even(1, 1, 4, 1, 1000, 3)

    def moved(**more):
        sections = program_of("tp=1", sizes, model, **more).stages[0][0].parts[0]
        kind = OpKind.GATED_DELTA_DECODE
        return next(s for each in sections for s in each.steps if getattr(s, "kind", "") is kind)

    step = moved(num_drafts=3)
    of_state = 32 * 128 * 128 * 4
    assert step.kv_bytes.tolist() == [(4 + 16) * of_state]
