"""Copies are balanced where a trial says that it pays; a discarded step goes as it went."""

from dataclasses import replace

import numpy as np
import pytest

from cli.screen import telling, tells
from distributed.running import Balancing, deployment, run_deployment
from expertlane import LLM, SamplingParams
from expertlane.balance.holding import check_deployment
from expertlane.balance.rebalance import CopyDecision
from expertlane.engine.elastic.copy_switch import TRIAL_STEPS, CopySwitch
from expertlane.errors import UserError
from expertlane.schedule.plan import StepPlan
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS, Routing
from expertlane.spec.names import Phase, Stage
from expertlane.spec.workload import Workload
from records import rank_record

SKEWED = replace(PRESETS["paper-tiny"], routing=Routing(router_bias=True, router_skew=1.5))


def plan(step, phase=Phase.DECODE, replica=0):
    return StepPlan(step, replica, phase, micro_batches=(), record=False)


def record(rank, *, is_balanced, num_saved=30, copies_s=1e-3):
    """Of two ranks the first has 100 pairs more where copies are not balanced; 10 µs each."""
    pairs = 200 if is_balanced else 250 - 100 * rank
    made = rank_record(
        rank,
        cpu={(0, 0, Stage.EXPERTS): 1e-3 + 1e-5 * pairs},
        tokens=[[pairs]],
        num_pairs_saved=num_saved if is_balanced else 0,
    )
    return replace(made, copies_s=copies_s if is_balanced else 0.0)


def tried(copies_s):
    """A switch after a trial, its lines, and which steps were balanced and recorded."""
    lines, modes = [], []
    switch = CopySwitch(Layout.parse("dp=2,ep=2"), lines.append)
    for step in range(TRIAL_STEPS + 2):
        own = plan(step)
        sent, is_balanced = switch.before_step(own)
        assert switch.before_step(own)[1] is is_balanced  # as when it is discarded and runs again
        modes.append((is_balanced, sent.record))
        if sent.record:
            records = [
                record(rank, is_balanced=is_balanced, copies_s=copies_s) for rank in range(2)
            ]
            switch.after_step(own, records)
            switch.after_step(own, records)
    return switch, lines, modes


def test_it_is_on_where_the_gain_exceeds_the_cost():
    switch, lines, modes = tried(copies_s=1e-4)
    assert modes[:4] == [(False, True), (True, True)] * 2
    assert modes[TRIAL_STEPS:] == [(True, False)] * 2
    (decision,) = switch.decisions
    assert decision.decision.gain_s == pytest.approx(30 * 1e-5)
    (line,) = lines
    assert tells(line, "step 23 copies 0.3 ms 30 pairs 0.1 on")
    # Another phase, and a replica whose experts have moved, are tried anew.
    assert switch.before_step(plan(99, Phase.PREFILL))[0].record
    switch.forget(0)
    assert switch.before_step(plan(100))[0].record


def test_it_is_off_where_sharing_costs_more():
    _, lines, modes = tried(copies_s=1e-3)
    assert modes[TRIAL_STEPS:] == [(False, False)] * 2
    assert lines[0].endswith("costs 1 ms: off")


def test_a_decision_that_saves_nothing_is_off():
    nothing = CopyDecision(Phase.DECODE, num_saved=0.0, pair_s=1e-5, cost_s=0.0)
    assert not nothing.pays


@pytest.mark.smoke(1)
@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather", "hierarchical"])
def test_tokens_stay_the_same_and_loads_even(pools, dispatch):
    """In a trial every other step is balanced."""
    workload = Workload(num_sequences=16, prompt_len=9, output_len=TRIAL_STEPS + 6, seed=3)
    sizes = {"num_redundant_experts": 8, "dispatch": dispatch}
    pool = pools.pool(4)
    runs = {
        copies: run_deployment(
            pool,
            SKEWED,
            deployment("dp=4,ep=4", copies=copies, **sizes),
            workload,
            ranks_per_node=2,
            record=True,
        )
        for copies in ("nearest", "balanced")
    }
    assert runs["balanced"].tokens.tolist() == runs["nearest"].tokens.tolist()
    decodes = [
        [step for step in run.steps if step.plan.phase is Phase.DECODE] for run in runs.values()
    ]
    of_step = [step.outcome.records[0].num_pairs_saved for step in decodes[1]]
    assert not any(of_step[:TRIAL_STEPS:2])
    assert sum(of_step[1:TRIAL_STEPS:2]) > 0
    for near, even in zip(*decodes, strict=True):
        fullest = [
            sum(
                np.array([each.num_tokens_per_expert.sum(axis=1) for each in step.outcome.records])
                .max(axis=0)
                .tolist()
            )
            for step in (near, even)
        ]
        assert fullest[1] == fullest[0] - even.outcome.records[0].num_pairs_saved


def test_nothing_to_balance_is_refused():
    with pytest.raises(UserError, match=telling("expert two")):
        check_deployment(SKEWED, deployment("dp=2,ep=2", copies="balanced"), 2)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_each_pair_is_computed_once(dispatch):
    """As every dispatch is proved to do where all is checked."""
    options = Options(num_redundant_experts=4, copies="balanced", dispatch=dispatch)
    settings = {"dtype": "float32", "num_blocks": 64, "block_size": 4, "check": "full"}
    with LLM("paper-tiny", layout="dp=2,ep=2", options=options, **settings) as llm:
        llm._runner.copy_switch = Balancing()
        prompts = [[number + 1, 7, *range(number)] for number in range(8)]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6))
        assert all(len(output.token_ids) == 6 for output in outputs)
