"""Whatever comes in whatever order: the scheduler's promises, on random traffic."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertlane.schedule.plan import UNKNOWN
from expertlane.schedule.request import FinishReason, Limits, Request, RequestState
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from schedule.paged import PagedRunner, check_empty, check_tables, continuation, seqs_of

VOCAB_SIZE = 50


@dataclass(frozen=True)
class Traffic:
    """How requests come: `share_prefix` draws prompts that begin alike."""

    num_requests: int
    arrival_rate: float
    max_prompt_len: int
    max_tokens: int
    num_priorities: int
    share_prefix: bool
    cancel_rate: float


limits = st.builds(
    Limits,
    vocab_size=st.just(VOCAB_SIZE),
    max_model_len=st.sampled_from([20, 100]),
    num_blocks=st.integers(6, 24),
    block_size=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 30),
    max_num_seqs=st.integers(1, 8),
    aging_steps=st.sampled_from([1, 10, 1000]),
    prefix_caching=st.booleans(),
)
layouts = st.builds(Layout, replicas=st.integers(1, 2), pp=st.integers(1, 3), dp=st.integers(1, 3))
all_options = st.builds(
    Options,
    num_micro_batches=st.integers(1, 4),
    micro_batch_schedule=st.sampled_from(["drained", "rotating"]),
)
traffics = st.builds(
    Traffic,
    num_requests=st.integers(0, 24),
    arrival_rate=st.sampled_from([0.2, 0.6, 0.9]),
    max_prompt_len=st.integers(1, 24),
    max_tokens=st.integers(1, 16),
    num_priorities=st.integers(1, 3),
    share_prefix=st.booleans(),
    cancel_rate=st.sampled_from([0.0, 0.0, 0.05]),
)


class Run:
    """Random arrivals, cancellations and orders of finishing, all rules checked at every turn."""

    def __init__(
        self,
        layout: Layout,
        options: Options,
        limits: Limits,
        traffic: Traffic,
        seed: int,
        *,
        lookahead: bool = False,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.limits, self.traffic, self.lookahead = limits, traffic, lookahead
        self.scheduler = ContinuousScheduler(layout, options, limits, lookahead=lookahead)
        self.runner = PagedRunner(self.scheduler, limits, lookahead=lookahead)
        self.to_come = [self._draw(i) for i in range(traffic.num_requests)]
        self.requests: list[Request] = []
        positions = sum(len(r.prompt_token_ids) + r.max_tokens for r in self.to_come)
        turns = layout.pp + options.num_micro_batches + limits.max_num_seqs
        overtakings = traffic.num_requests if traffic.num_priorities > 1 else 1
        self.max_num_steps = positions * turns * overtakings

    def _draw(self, number: int) -> Request:
        most = min(self.traffic.max_prompt_len, self.limits.max_positions)
        prompt_len = int(self.rng.integers(1, most + 1))
        prompt = self.rng.integers(0, VOCAB_SIZE, prompt_len)
        if self.traffic.share_prefix:
            num_shared = int(self.rng.integers(prompt_len // 2, prompt_len + 1))
            prompt[:num_shared] = np.arange(num_shared) % 3
        return Request(
            f"request {number}",
            prompt,
            max_tokens=int(self.rng.integers(1, self.traffic.max_tokens + 1)),
            stop_token_ids=[int(self.rng.integers(0, VOCAB_SIZE))],
            priority=int(self.rng.integers(0, self.traffic.num_priorities)),
        )

    def turn(self) -> None:
        """A chance for each of: arrivals, a cancellation, a step to begin, one to end."""
        while self.to_come and self.rng.random() < self.traffic.arrival_rate:
            self.requests.append(self.runner.add(self.to_come.pop(0)))
        alive = [each for each in self.requests if each.state is not RequestState.FINISHED]
        if alive and self.rng.random() < self.traffic.cancel_rate:
            victim = alive[self.rng.integers(len(alive))]
            assert self.scheduler.cancel(victim.request_id)
            assert victim.finish_reason is FinishReason.CANCELLED
            check_tables(self.scheduler, self.limits)
        plan = self.scheduler.next_plan()
        if plan is not None:
            self.runner.submit(plan)
            check_tables(self.scheduler, self.limits)
        in_flight = list(self.runner.in_flight)
        # Work never stands still: something is in flight unless no request is left.
        assert in_flight or not self.scheduler.has_unfinished
        if in_flight and (plan is None or self.rng.random() < 0.5):
            step = in_flight[self.rng.integers(len(in_flight))]
            if self.lookahead:  # the ranks of a replica take steps in turn
                replica = self.runner.in_flight[step].replica
                step = next(n for n in in_flight if self.runner.in_flight[n].replica == replica)
            done = self.runner.in_flight[step]
            outcome = self.runner.collect(step)
            self.scheduler.commit(done, outcome)
            check_tables(self.scheduler, self.limits)

    def to_the_end(self) -> None:
        """Serve all; every promise is then checked."""
        while self.to_come or self.scheduler.has_unfinished:
            self.turn()
            assert len(self.runner.plans) <= self.max_num_steps, "a request starves"
        check_empty(self.scheduler)
        self.check_outputs()
        self.check_order()

    def expected(self, request: Request) -> list[int]:
        """What it must have generated: until a stop token, its length, or the end of its room."""
        prompt = request.prompt_token_ids.tolist()
        most = min(request.max_tokens, self.limits.max_positions - len(prompt) + 1)
        tokens = continuation(prompt, most, VOCAB_SIZE)
        ends = [i + 1 for i, token in enumerate(tokens) if token in request.stop_token_ids]
        return tokens[: ends[0]] if ends else tokens

    def check_outputs(self) -> None:
        for request in self.requests:
            expected, output = self.expected(request), request.output_token_ids
            if request.finish_reason is FinishReason.CANCELLED:
                assert output == expected[: len(output)]
            else:
                assert output == expected
                stopped = output[-1] in request.stop_token_ids
                assert request.finish_reason is (
                    FinishReason.STOP if stopped else FinishReason.LENGTH
                )

    def check_order(self) -> None:
        """Within a priority, nobody begins before one who came earlier."""
        began: dict[int, int] = {}
        for plan in self.runner.plans:
            for seq in seqs_of(plan):
                began.setdefault(seq, plan.step)
        for priority in range(self.traffic.num_priorities):
            steps = [
                began[request.seq_id]
                for request in self.requests
                if request.priority == priority and request.seq_id in began
            ]
            assert steps == sorted(steps)


random_traffic = given(layouts, all_options, limits, traffics, st.integers(0, 2**32 - 1))


@settings(derandomize=True, deadline=None, max_examples=100)
@random_traffic
def test_every_promise_on_random_traffic(layout, options, limits, traffic, seed):
    run = Run(layout, options, limits, traffic, seed)
    run.to_the_end()
    most = layout.pp if options.micro_batch_schedule == "rotating" else 1
    assert all(num <= most for num in run.runner.most_in_flight.values())


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(derandomize=True, deadline=None, max_examples=3000)
@random_traffic
def test_every_promise_on_much_random_traffic(layout, options, limits, traffic, seed):
    Run(layout, options, limits, traffic, seed).to_the_end()


@pytest.mark.full
@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.builds(Layout, replicas=st.integers(1, 2), dp=st.integers(1, 3)),
    st.builds(Options, num_micro_batches=st.integers(1, 3)),
    limits,
    traffics,
    st.integers(0, 2**32 - 1),
)
def test_every_promise_with_a_step_planned_ahead(layout, options, limits, traffic, seed):
    run = Run(layout, options, limits, traffic, seed, lookahead=True)
    run.to_the_end()
    assert all(num <= 2 for num in run.runner.most_in_flight.values())


def test_decodes_are_planned_ahead_of_their_tokens():
    limits = Limits(VOCAB_SIZE, 64, num_blocks=60, block_size=4)
    traffic = Traffic(8, 1.0, 6, 12, 1, share_prefix=False, cancel_rate=0.0)
    run = Run(Layout(), Options(), limits, traffic, 0, lookahead=True)
    run.to_the_end()
    fed = np.concatenate([plan.micro_batches[0][0].token_ids for plan in run.runner.plans])
    assert (fed == UNKNOWN).sum() > 20


def test_lookahead_needs_a_stage_that_learns_of_its_tokens():
    limits = Limits(VOCAB_SIZE, 64, num_blocks=60)
    scheduler = ContinuousScheduler(Layout(pp=2), Options(), limits, lookahead=True)
    for number in range(2):
        scheduler.add(Request(str(number), [1, 2, 3], max_tokens=4))
    for most in (1, 2):
        plans = [scheduler.next_plan() for _ in range(3)]
        assert plans.count(None) == 3 - most
        scheduler.lose([(0, 0)], [plan for plan in plans if plan])
        scheduler.reshape(Layout(), {})
