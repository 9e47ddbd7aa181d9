"""Requests whose tokens wait for masks: each step has the right ones, and others go on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.stub_runner import VOCAB_SIZE, StubRunner
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler, DriveLoop
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.sampling import SamplingParams
from schedule.paged import check_empty, continuation

SAMPLING = SamplingParams(max_tokens=1)


def mask(number):
    """Of a request's token of this number; the scheduler looks into none."""
    return np.array([number], dtype=np.uint8)


def request(name, prompt, num_tokens, is_masked):
    return Request(
        name,
        prompt,
        max_tokens=num_tokens,
        sampling=SAMPLING if is_masked else None,
        mask=mask(0) if is_masked else None,
    )


class Driven:
    """Steps, of which each is checked; masks come when they are let."""

    def __init__(self, layout, options=None, **limits):
        parsed = Layout.parse(layout)
        sizes = {"max_model_len": 64, "num_blocks": 64, "block_size": 4, "max_num_seqs": 8}
        self.limits = Limits(VOCAB_SIZE, **sizes | limits)
        lookahead = parsed.pp == 1
        self.scheduler = ContinuousScheduler(
            parsed, options or Options(), self.limits, lookahead=lookahead, record=False
        )
        self.runner = StubRunner(self.limits, parsed, lookahead=lookahead)
        self.loop = DriveLoop(self.scheduler, self)
        self.first_done, self.collect = self.runner.first_done, self.runner.collect
        self.by_seq, self.waiting, self.plans = {}, [], []

    def add(self, given):
        self.scheduler.add(given)
        self.by_seq[given.seq_id] = given

    def submit(self, plan):
        self.plans.append(plan)
        expected = {}
        for batch in plan.batches:
            for seq in batch.yielding_seq_ids:
                if self.by_seq[seq].is_masked:
                    assert self.by_seq[seq] not in self.waiting
                    expected[seq] = len(self.by_seq[seq].output_token_ids)
        assert {seq: int(each[0]) for seq, each in plan.masks.items()} == expected
        return self.runner.submit(plan)

    def step(self):
        self.loop.submit()
        if self.loop.commit_next() is None:
            return False
        for each in self.scheduler.stepped:
            if each.is_masked and each.finish_reason is None:
                self.waiting.append(each)
        return True

    def let(self, number):
        each = self.waiting.pop(number)
        if each.finish_reason is None:
            self.scheduler.allow(each, mask(len(each.output_token_ids)))

    def run(self, let_all=True):
        while self.step() or self.waiting:
            while self.waiting and let_all:
                self.let(0)


@given(st.data())
def test_any_requests_whatever_the_order_of_masks(data):
    layout = data.draw(st.sampled_from(["tp=1", "dp=2,ep=2", "pp=2", "replicas=2"]))
    driven = Driven(layout, num_blocks=data.draw(st.sampled_from([6, 64])), max_model_len=20)
    requests = []
    for number in range(data.draw(st.integers(1, 6))):
        prompt = data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=7))
        num_tokens, is_masked = data.draw(st.integers(1, 9)), data.draw(st.booleans())
        requests.append((request(str(number), prompt, num_tokens, is_masked), prompt, num_tokens))
        driven.add(requests[-1][0])
    for _ in range(3000):
        has_stepped = driven.step()
        if not driven.scheduler.has_unfinished:
            break
        for _ in range(data.draw(st.integers(0, len(driven.waiting)))):
            driven.let(data.draw(st.integers(0, len(driven.waiting) - 1)))
        if not has_stepped and driven.waiting:
            driven.let(0)
    for each, prompt, num_tokens in requests:
        assert each.output_token_ids == continuation(prompt, num_tokens, VOCAB_SIZE)
    check_empty(driven.scheduler)


def test_others_go_on_while_a_mask_is_made():
    driven = Driven("tp=1")
    held, free = request("held", [1, 2], 5, True), request("free", [3, 4], 20, False)
    driven.add(held)
    driven.add(free)
    for _ in range(10):
        driven.step()
    assert len(held.output_token_ids) == 1
    assert len(free.output_token_ids) >= 9
    driven.run()
    assert len(held.output_token_ids) == 5


@pytest.mark.parametrize(("num_free", "most"), [(0, 11), (1, 2 * 8 + 3)])
def test_masked_requests_decode_together(num_free, most):
    """Alone in every step, with others in every second one; never in two groups by turns."""
    driven = Driven("tp=1")
    free = [request(f"free{number}", [7], 40, False) for number in range(num_free)]
    held = [request(f"held{number}", [number + 1], 9, True) for number in range(3)]
    driven.add(held[0])
    driven.step()
    for each in [*free, *held[1:]]:  # come in while a step is under way
        driven.add(each)
    driven.run()
    steps = [plan for plan in driven.plans if plan.masks]
    assert len(steps) <= most
    assert sum(len(plan.masks) for plan in steps) == 3 * 9
    assert sum(len(plan.masks) == 3 for plan in steps) >= 6


def test_a_cancelled_request_waits_for_no_mask():
    driven = Driven("tp=1")
    held = request("held", [1, 2], 5, True)
    driven.add(held)
    driven.step()
    assert driven.waiting == [held]
    assert driven.scheduler.cancel("held")
    assert not driven.step()
    check_empty(driven.scheduler)
