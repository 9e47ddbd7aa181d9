"""Ranks are lost at any moment: each request gets the tokens of an undisturbed run, each once."""

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import telling
from distributed.running import runner_on
from engine.elastic.drawn_runs import OPTIONS, draw_prompt, small_limits
from engine.ranks.fake_ranks import FakePool
from engine.stage.token_stage import PARAMS
from expertlane.engine.elastic.recovery import Recovery
from expertlane.engine.elastic.recovery_record import State
from expertlane.engine.engine import Engine
from expertlane.errors import RankError
from expertlane.schedule.request import FinishReason, Limits
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Deployment, GraphLimits, Options
from expertlane.spec.layout import Layout, Members
from expertlane.spec.model import PRESETS
from expertlane.spec.sampling import SamplingParams, Structured
from expertlane.text.tokenizer import Tokenizer
from schedule.paged import check_empty, check_tables
from text.test_grammars import byte_level

TOKENIZER = Tokenizer(byte_level(), [byte_level().token_to_id("</s>")])
VOCAB_SIZE = TOKENIZER.vocab_size
MODEL = PRESETS["paper-tiny"].with_overrides(vocab_size=VOCAB_SIZE)
SEEDED = [replace(each or SamplingParams(temperature=0), seed=5) for each in PARAMS]
ALL_PARAMS = (
    *SEEDED,
    replace(SEEDED[2], prompt_logprobs=2),
    SamplingParams(temperature=0, prompt_logprobs=0),
    SamplingParams(seed=1, structured=Structured(regex="[abc]{2,7}")),
    SamplingParams(temperature=0, structured=Structured(regex="(x|y){3}z*")),
)


class NumberedRebalancer:
    """Placements are numbers; every few steps bring others."""

    def __init__(self, arranged):
        self._arranged = arranged
        for replica in range(arranged.now.layout.replicas):
            arranged.move(replica, 0)
        self._begun = WeakKeyDictionary()
        self._before = {}

    def before_step(self, plan):
        if plan not in self._begun:
            new = plan.step if plan.step % 4 == 3 else None
            if new is not None:
                before = self._arranged.now.placements[plan.replica]
                self._before[plan.replica, plan.step] = before
                self._arranged.move(plan.replica, new)
            self._begun[plan] = new
        return self._begun[plan]

    def after_step(self, plan, records):
        self._before.pop((plan.replica, plan.step), None)

    def abandon(self, plans):
        for plan in reversed(plans):
            if (plan.replica, plan.step) in self._before:
                before = self._before.pop((plan.replica, plan.step))
                self._arranged.move(plan.replica, before)
            self._begun[plan] = None

    def begin_again(self):
        self._before.clear()


class DrawnShrinker:
    """Takes every smaller layout; what was lost is there again at some time."""

    def __init__(self, pool, runner, rng):
        self._pool, self._arranged, self._rng = pool, runner.arranged, rng

    def smaller(self, members, lost):
        return members.without(lost)

    def arrange(self, members):
        now = self._arranged.now
        kept = members.kept_caches(now.members)
        placements = [now.placements[kept[r, 0][0]] for r in range(members.layout.replicas)]
        return replace(now, members=members, placements=tuple(placements))

    def is_ready(self, members):
        if self._rng.random() < 0.1:
            self._pool.start()
        return self._pool.ahead == self._pool.absent


@dataclass(frozen=True)
class Scenario:
    layout: Layout
    options: Options
    limits: Limits
    num_requests: int
    cancel_rate: float
    seed: int

    def play(self, loss_rate, cancel_rate=None, most_losses=2, *, shrinks=False):
        """What came of each request: its output, and whether it was cancelled; and the pool."""
        rng = np.random.default_rng(self.seed)
        self_rng = np.random.default_rng(self.seed + 1)
        cancel_rate = self.cancel_rate if cancel_rate is None else cancel_rate
        deployment = Deployment("a", self.layout, self.options)
        pool = FakePool(self.layout, self.limits, self_rng, 0.0, most_losses=most_losses)
        given, records = (pool, MODEL, deployment, self.limits), self.seed % 4 == 0
        runner = runner_on(*given, ranks_per_node=1, records_ahead=records)
        runner.rebalancer = NumberedRebalancer(runner.arranged)
        scheduler = ContinuousScheduler(
            self.layout, self.options, self.limits, lookahead=self.layout.pp == 1
        )
        recovery = Recovery(pool, runner.arranged, runner.redeploy)
        recovery.settle()
        if shrinks:
            recovery.shrinker = DrawnShrinker(pool, runner, self_rng)
        if most_losses <= 2:  # two may be noticed at once
            pool.is_patient = lambda: recovery._repeated.most <= 2
        committed = set()

        def on_commit(finished):
            committed.add((pool.epoch, finished.plan.replica, finished.plan.step))
            pool.committed()

        engine = Engine(
            scheduler,
            runner,
            eos_token_ids=TOKENIZER.eos_token_ids,
            tokenizer=TOKENIZER,
            on_commit=on_commit,
            recovery=recovery,
        )
        pool._loss_rate = loss_rate
        to_come = [self._draw(rng, number) for number in range(self.num_requests)]
        outputs, chunks = {}, []

        def come_and_go():
            while to_come and self_rng.random() < 0.4:
                name, prompt, params = to_come.pop(0)
                outputs[name] = engine.add(name, prompt, params)
            if outputs and self_rng.random() < cancel_rate:
                engine.cancel(list(outputs)[self_rng.integers(len(outputs))])

        num_steps = 0
        while to_come or not engine.is_idle:
            come_and_go()
            chunks += engine.step(come_and_go)
            check_tables(scheduler, self.limits)
            num_steps += 1
            assert num_steps < 20_000, "it never ends"
        check_empty(scheduler)
        assert recovery.state in (State.SERVING, State.SHRUNK)
        assert recovery.num_recoveries + recovery.num_growths == len(recovery.records)
        self._check_chunks(outputs, chunks)
        self._check_ranks(pool, scheduler, committed)
        pool.num_growths = recovery.num_growths
        return outputs, pool, scheduler

    def _draw(self, rng, number):
        prompt = draw_prompt(rng, 60, 13)
        params = ALL_PARAMS[rng.integers(len(ALL_PARAMS))]
        return str(number), prompt.tolist(), replace(params, max_tokens=int(rng.integers(1, 10)))

    def _check_chunks(self, outputs, chunks):
        """Each token was told once, in its order, and one end."""
        for name, output in outputs.items():
            own = [chunk for chunk in chunks if chunk.request_id == name]
            tokens = [chunk.token_id for chunk in own if chunk.token_id is not None]
            if output.finish_reason is FinishReason.CANCELLED:  # its last token may be dropped
                assert tokens == output.token_ids[: len(tokens)]
            else:
                assert tokens == output.token_ids
            assert len(output.token_times_s) == len(tokens)
            assert "".join(chunk.text for chunk in own) == output.text
            assert [c.finish_reason for c in own if c.finish_reason] == [output.finish_reason]

    def _check_ranks(self, pool, scheduler, committed):
        """All ranks of a replica ran each step with the same experts, and know no old request."""
        members = Members(self.layout)
        sizes = [*GraphLimits(self.limits.max_num_seqs, 1).sizes[::-1]]
        for epoch, replica, step in committed:
            for rank in pool.placement_of_step[epoch, replica, step]:
                recorded = pool.recorded.get(epoch, {}).get(rank, [])
                assert recorded == (sizes if self.seed % 4 == 0 else [])
        for replica in range(pool.members.layout.replicas):
            before = 0
            for epoch, step in sorted((e, step) for e, r, step in committed if r == replica):
                placements = pool.placement_of_step[epoch, replica, step]
                (placement,) = set(placements.values())
                if not pool.has_shrunk:
                    assert sorted(placements) == sorted(members.of_replica[replica])
                    assert before <= placement <= step
                before = placement
            for rank in pool.members.of_replica[replica]:
                known = pool.stages[rank]._sampler._admitted
                assert set(known) <= set(scheduler._released[replica])


def facts(output):
    """What has to be the same, whatever happened."""
    scored = output.prompt_logprobs
    return (
        output.token_ids,
        output.text,
        output.finish_reason,
        output.logprobs,
        None if scored is None else scored[:],
        None if scored is None else scored.ranks[1:].tolist(),
    )


def check(scenario, loss_rate, most_losses=2, **how):
    """Play with losses and without; gives how many ranks were replaced."""
    expected, _, _ = scenario.play(0.0, cancel_rate=0.0)
    found, pool, scheduler = scenario.play(loss_rate, most_losses=most_losses, **how)
    assert list(found) == list(expected)
    for name, output in found.items():
        undisturbed = expected[name]
        if output.finish_reason is FinishReason.CANCELLED:
            assert output.token_ids == undisturbed.token_ids[: len(output.token_ids)]
            assert output.logprobs == undisturbed.logprobs[: len(output.logprobs)]
        else:
            assert facts(output) == facts(undisturbed)
    return pool, scheduler


scenarios = st.builds(
    Scenario,
    layout=st.sampled_from(
        [
            *map(Layout.parse, ("tp=1", "tp=2", "dp=2,ep=2", "dp=3", "dp=4,ep=4", "replicas=2")),
            *map(Layout.parse, ("pp=2", "pp=3,dp=2", "replicas=2,dp=2,ep=2", "pp=2,tp=2")),
        ]
    ),
    options=OPTIONS,
    limits=small_limits(
        VOCAB_SIZE, prompt_wait_steps=st.sampled_from([0, 0, 3]), phases_apart=st.booleans()
    ),
    num_requests=st.integers(0, 14),
    cancel_rate=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**32 - 1),
)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(scenarios, st.sampled_from([0.02, 0.1]))
def test_every_request_gets_its_tokens_whatever_ranks_are_lost(scenario, loss_rate):
    check(scenario, loss_rate)


@pytest.mark.full
@settings(derandomize=True, deadline=None, max_examples=60)
@given(scenarios, st.sampled_from([0.02, 0.1]))
def test_every_request_gets_its_tokens_in_smaller_layouts(scenario, loss_rate):
    check(scenario, loss_rate, shrinks=True)


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(derandomize=True, deadline=None, max_examples=2000)
@given(scenarios, st.sampled_from([0.01, 0.05, 0.2]))
def test_every_request_gets_its_tokens_in_many_runs(scenario, loss_rate):
    check(scenario, loss_rate)


def test_the_scenarios_have_all_that_can_go_wrong():
    limits = Limits(VOCAB_SIZE, 40, 12, 2, max_num_batched_tokens=12, max_num_seqs=6)
    scenario = Scenario(Layout.parse("dp=2,ep=2"), Options(), limits, 90, 0.05, seed=3)
    pool, scheduler = check(scenario, 0.15)
    assert pool.num_losses > 20
    assert pool.num_replaced > 20
    assert scheduler.num_recovered > 20
    assert scheduler.num_preemptions > 0


def test_it_gives_up_where_no_step_can_be_finished():
    limits = Limits(VOCAB_SIZE, 40, 12, 2)
    scenario = Scenario(Layout.parse("dp=2,ep=2"), Options(), limits, 3, 0.0, seed=3)
    with pytest.raises(RankError, match=telling("3 recoveries")):
        scenario.play(1.0, most_losses=10)
