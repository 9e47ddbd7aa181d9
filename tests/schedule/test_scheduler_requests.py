"""One request's life by hand: refusal, turn, end, cancellation."""

from dataclasses import fields

import pytest

from cli.screen import telling
from expertlane.errors import SpecError, UserError
from expertlane.schedule.request import FinishReason, Limits, Request
from expertlane.spec.ranges import RANGES
from schedule.by_hand import add, make, make_limits, request, step
from schedule.paged import check_empty, seqs_of


@pytest.mark.parametrize(
    ("sizes", "prompt_len", "num_tokens"),
    [
        # The last token is never fed back: it needs no position.
        ({"max_model_len": 8}, 5, 4),
        ({"max_model_len": 8}, 8, 1),
        ({"num_blocks": 2}, 5, 4),
        ({"num_blocks": 2}, 8, 1),
    ],
)
def test_the_model_s_positions_and_the_cache_end_an_output(sizes, prompt_len, num_tokens):
    scheduler = make(**sizes)
    (one,) = add(scheduler, request("a", prompt_len, max_tokens=50))
    while scheduler.has_unfinished:
        step(scheduler)
    assert len(one.output_token_ids) == num_tokens
    assert one.finish_reason is FinishReason.LENGTH


def test_priorities_and_first_come_first_served():
    scheduler = make(max_num_seqs=1)
    order = {"a": 1, "b": 0, "c": 1, "d": -1, "e": 0}
    for name, priority in order.items():
        add(scheduler, request(name, max_tokens=1, priority=priority))
    assert [seqs_of(step(scheduler)) for _ in order] == [[3], [1], [4], [0], [2]]


@pytest.mark.parametrize(("aging_steps", "num_overtaking"), [(1, 1), (3, 3), (100, 9)])
def test_waiting_makes_up_for_priority(aging_steps, num_overtaking):
    """One request at a time; before each of 9 steps a more urgent one comes."""
    scheduler = make(max_num_seqs=1, aging_steps=aging_steps)
    add(scheduler, request("patient", max_tokens=1, priority=1))
    served = []
    for number in range(9):
        add(scheduler, request(f"urgent {number}", max_tokens=1))
        served += seqs_of(step(scheduler))
    served += seqs_of(step(scheduler))
    # Those that come less than `aging_steps` after it go first.
    assert served.index(0) == num_overtaking


def test_cancel_with_a_reason_of_its_own_and_of_nobody():
    scheduler = make()
    (one,) = add(scheduler, request("a"))
    assert not scheduler.cancel("b")
    assert scheduler.cancel("a", FinishReason.STOP)
    assert one.finish_reason is FinishReason.STOP
    assert not scheduler.cancel("a")


@pytest.mark.parametrize(
    ("prompt", "kwargs", "message"),
    [
        ([], {}, "x prompt empty 1"),
        ([1, 100], {}, "x token 100 vocabulary 0 99"),
        ([-1], {}, "x token -1 vocabulary 0 99"),
        ([0.5], {}, "x prompt list"),
        ([[1], [2]], {}, "x prompt list"),
        ([[1], [2, 3]], {}, "x prompt list"),
        ([10**30], {}, "x prompt list"),
        ([1] * 65, {}, "x prompt 65 tokens 64 1 40"),
        ([1] * 41, {}, "x prompt 41 tokens 11 blocks 4 cache 10 1 40"),
        ([1], {"max_tokens": 0}, "x max_tokens 0 1 2,147,483,647"),
        ([1], {"max_tokens": float("nan")}, "x max_tokens nan 1 2,147,483,647"),
        ([1], {"priority": 0.5}, "x priority 0.5 -2,147,483,648 2,147,483,647"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_harms_nobody(prompt, kwargs, message):
    scheduler = make(num_blocks=10)
    (other,) = add(scheduler, request("a", max_tokens=2))
    step(scheduler)
    with pytest.raises(UserError, match=telling(message)):
        scheduler.add(Request("x", prompt, **{"max_tokens": 1} | kwargs))
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 0)
    step(scheduler)
    assert other.finish_reason is FinishReason.LENGTH
    check_empty(scheduler)


@pytest.mark.parametrize(
    "size",
    [each.name for each in fields(Limits) if each.type is int and RANGES[each.name].low > 0],
)
def test_limits_are_positive(size):
    with pytest.raises(SpecError, match=telling(f"{size} 0 {RANGES[size]}")):
        make_limits(**{size: 0})
