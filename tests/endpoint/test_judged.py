"""Changed tokens against those of undisturbed runs: ties, exact tests, intervals."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertlane.client.connection import Answer
from expertlane.endpoint.judged import (
    TIE_NATS,
    RequestOutcome,
    Truth,
    changes_record,
    criteria,
    fisher,
    judged,
    tie_of,
    upper_end,
)
from expertlane.endpoint.steady import Request
from expertlane.endpoint.streams import Stream
from expertlane.results.drill_record import DrillRecord, HealthRecord, OutcomeRecord

NUM = 8


def stream(tokens, margin=None, **more):
    found = Stream(Answer(200, "text/event-stream"))
    found.ids, found.texts = [[each] for each in tokens], ["x"] * len(tokens)
    found.times_s = [0.0] * len(tokens)
    found.margins = [[] if margin is None else [margin] for _ in tokens]
    found.finish_reason, found.num_counted = "length", len(tokens)
    for name, value in more.items():
        setattr(found, name, value)
    return found


def request(prompt, tokens, sent_s=1.0, **more):
    return Request(prompt, sent_s, stream(tokens, **more), 2.0, "whole")


def tokens_of(prompt, last=0):
    return [prompt, 10, 20, 30, 40, 50, last]


def truth(margin=None, undisturbed=()):
    found = Truth([stream(tokens_of(each), margin) for each in range(NUM)])
    found.add([request(each, tokens_of(each)) for each in range(NUM)])
    found.add(undisturbed)
    return found


def changes(true, requests):
    tie = tie_of(true)
    several = [judged(each, true, tie) for each in requests]
    return several, changes_record(true, several, tie, fault_s=0.0)


def test_the_same_tokens_are_as_before():
    several, found = changes(truth(), [request(each, tokens_of(each)) for each in range(NUM)])
    assert {each.outcome for each in several} == {"as before"}
    assert not found.is_beyond
    assert found.p_value == 1.0
    assert found.num_undisturbed == NUM


def test_without_log_probabilities_one_change_is_not_told_from_noise_but_many_are():
    _, one = changes(truth(), [request(0, tokens_of(0, 99)), request(1, tokens_of(1))])
    assert one.tie_nats is None
    assert not one.is_beyond
    _, many = changes(truth(), [request(each, tokens_of(each, 99)) for each in range(NUM)])
    assert many.p_value < 0.01
    assert many.is_beyond


def test_a_change_that_is_no_tie_is_told_from_one_answer():
    several, found = changes(truth(margin=3.0), [request(0, tokens_of(0, 99))])
    assert several[0].outcome == "changed"
    assert found.tie_nats == TIE_NATS
    assert found.is_beyond
    several, found = changes(truth(margin=0.1), [request(0, tokens_of(0, 99))])
    assert several[0].outcome == "tie"
    assert not found.is_beyond


def test_what_changes_undisturbed_is_no_fault():
    """Of a server whose answers change by themselves: an answer that came before, or as many."""
    noisy = [request(each, tokens_of(each, 70 + each)) for each in range(NUM)]
    true = truth(margin=0.8, undisturbed=noisy)
    assert tie_of(true) == pytest.approx(0.8)
    several, found = changes(true, [request(0, tokens_of(0, 70))])
    assert several[0].outcome == "tie"
    true = truth(margin=5.0, undisturbed=noisy)
    assert tie_of(true) == 1.0  # no larger, however noisy it is
    _, found = changes(true, [request(each, tokens_of(each, 99)) for each in range(NUM)])
    assert found.num_undisturbed_changed == NUM
    assert not found.is_beyond


def test_counts_are_compared_with_tokens():
    several, _ = changes(truth(), [request(0, tokens_of(0), num_counted=9)])
    assert several[0].outcome == "ill-formed"
    several, _ = changes(truth(), [request(0, tokens_of(0), finish_reason=None)])
    assert several[0].outcome == "ill-formed"


def test_undisturbed_answers_are_judged_too():
    twice = [*tokens_of(0)[:3], 10, 20, *tokens_of(0)[3:]]
    assert not [*truth().defects()]
    assert len([*truth(undisturbed=[request(0, twice)]).defects()]) == 1
    wrong = Truth([stream(tokens_of(0), num_counted=3)])
    assert len([*wrong.defects()]) == 1


def test_lost_requests_keep_their_words():
    lost = request(0, [])
    lost.end, lost.words = "failed", "HTTP 500: no"
    assert judged(lost, truth(), None) == RequestOutcome(lost, "failed", "HTTP 500: no")


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))
def test_fishers_test_is_the_share_of_the_draws(num, more, num_before, more_before):
    of, of_before = num + more, num_before + more_before
    p = fisher(num, of, num_before, of_before)
    assert 0 < p <= 1 + 1e-12
    if num == 0:
        assert p == pytest.approx(1.0)
    if num == of and num_before == 0 and of_before:
        assert p == pytest.approx(1 / math.comb(of + of_before, of))


def test_the_interval_of_a_share_is_the_usual_one():
    assert upper_end(0, 0) == upper_end(5, 5) == 1.0
    assert upper_end(0, 30) == pytest.approx(1 - 0.05 ** (1 / 30), abs=1e-6)  # of none
    assert upper_end(3, 100) == pytest.approx(0.0757, abs=2e-4)
    assert upper_end(0, 5000) < 0.001


def test_criteria():
    fine = DrillRecord(
        outcomes=(OutcomeRecord("as before", 1, 2),), health=HealthRecord(is_known=True), health_s=5
    )
    assert criteria(fine) == ((), ())
    for name in ("failed", "hung", "cut", "repeated", "dropped", "ill-formed"):
        bad = DrillRecord(outcomes=(OutcomeRecord(name, 1, 2),), health=HealthRecord(is_known=True))
        (line,) = criteria(bad)[0]
        assert line.startswith("3 requests")
    for field in ("well_but_silent_s", "ill_but_well_s"):
        lies = HealthRecord(is_known=True, **{field: 5.1})
        bad = DrillRecord(outcomes=fine.outcomes, health=lies, health_s=5.0)
        (line,) = criteria(bad)[0]
        assert "/health" in line
    (line,) = criteria(DrillRecord(health=HealthRecord(is_known=True)))[0]
    assert "no request" in line


@pytest.mark.parametrize(
    ("exit_code", "pause_s", "full_rate_s", "status", "is_said"),
    [
        (0, 0.29, 0.0, 200, True),
        (None, 0.29, 0.0, 200, False),  # a signal, which strikes for certain
        (0, 0.31, 0.0, 200, False),
        (0, 0.29, 1.5, 200, False),
        (0, 0.29, 0.0, 503, False),
    ],
)
def test_a_command_that_struck_nothing_is_a_caution(
    exit_code, pause_s, full_rate_s, status, is_said
):
    record = DrillRecord(
        exit_code=exit_code,
        usual_pause_s=0.1,
        pause_s=pause_s,
        full_rate_s=full_rate_s,
        outcomes=(OutcomeRecord("as before", 1, 2),),
        health=HealthRecord((-1.0, 1.0), (503, status), is_known=True),
    )
    failed, cautions = criteria(record)
    assert not failed
    assert any("Nothing shows that the fault struck" in each for each in cautions) == is_said
