"""A drill catches what servers do wrong after a fault, each by its own line; honest ones pass."""

import asyncio

import pytest

from client.fake_server import fakes
from endpoint.stub_server import HANG_S, PAUSE_S, TOKEN_S, Strike, Stub
from expertlane.client.connection import Url
from expertlane.client.run import Target
from expertlane.endpoint.drill import DrillOptions, DrillResult, drilling
from expertlane.progress import Progress
from expertlane.results.drill_record import LOST
from expertlane.spec.workload import LengthRange, Load

# What each fails by; nothing where it passes.
SERVERS = {
    "recovers": "",
    "ties": "",
    "tells text alone": "",
    "has no /health": "",
    "hangs, and says 200": "hung|/health said 200",
    "dies": "failed before a token",
    "refuses for a while": "failed before a token",
    "fails for a while": "failed before a token",
    "cuts streams": "cut short",
    "repeats a chunk": "tokens repeated",
    "drops a chunk": "tokens left out",
    "changes a token": "changed tokens, more than",
    "counts wrongly": "counted wrongly",
    "has no finish reason": "counted wrongly",
    "says 503 while well": "/health did not say 200",
}
AFTER_S, OBSERVE_S, BOUND_S, HEALTH_S = 1.2, 4.5, 3.0, 2.8
LENGTH = LengthRange(12, 12)
ASKED = DrillOptions(
    Load(6, LengthRange(4, 4), LENGTH, batch=2), 0, AFTER_S, OBSERVE_S, BOUND_S, HEALTH_S
)


@pytest.fixture(scope="module")
def drilled() -> dict[str, DrillResult]:
    """All servers, drilled at the same time."""

    async def all_of_them(stubs: list[Stub]) -> list[DrillResult]:
        return await asyncio.gather(
            *(
                drilling(Target(Url.parse(each.url)), ASKED, Strike(each), Progress(), None)
                for each in stubs
            )
        )

    assert HANG_S > BOUND_S > PAUSE_S > TOKEN_S
    with fakes(Stub) as make:
        stubs = [make(each) for each in SERVERS]
        return dict(zip(SERVERS, asyncio.run(all_of_them(stubs)), strict=True))


@pytest.mark.parametrize("behaviour", SERVERS)
def test_each_is_caught_by_its_own_line(drilled, behaviour):
    record = drilled[behaviour].record
    wanted = [each for each in SERVERS[behaviour].split("|") if each]
    for each in wanted:
        assert any(each in line for line in record.why_failed), record.why_failed
    # A server that dies has failed requests and cut ones; nothing else is said of it.
    further = ["cut short", "failed before a token"] if {*wanted} & {*further_of()} else []
    unsaid = [
        line for line in record.why_failed if not any(each in line for each in wanted + further)
    ]
    assert not unsaid, record.why_failed
    assert record.is_failed == bool(wanted)
    assert drilled[behaviour].undisturbed.num_requests > 0


def further_of() -> tuple[str, ...]:
    return ("cut short", "failed before a token")


def test_one_that_recovers_has_a_pause(drilled):
    record = drilled["recovers"].record
    assert record.num_of(*LOST) == 0
    assert record.num_of("as before") > 4
    assert PAUSE_S * 0.8 < record.pause_s < PAUSE_S + 1
    assert record.full_rate_s is not None
    assert PAUSE_S * 0.5 < record.full_rate_s < PAUSE_S + 1
    assert record.first_lost_s is None
    assert record.changes.compared == "token ids"
    assert record.changes.num_undisturbed >= 12
    assert record.changes.num_undisturbed_changed == 0
    assert record.health.is_known
    assert record.is_running


def test_one_that_dies_is_a_result(drilled):
    record = drilled["dies"].record
    assert record.full_rate_s is None
    assert not record.is_running
    assert record.first_lost_s < BOUND_S / 2
    assert record.num_of("as before") <= 2  # what was on its way
    assert record.last_token_s is None or record.last_token_s < BOUND_S / 2
    assert {*record.health.statuses} == {200, 0}
    assert record.health.well_but_silent_s == 0
    assert sum(record.timeline.num_errors) >= record.num_of(*LOST) - 2


def test_one_that_hangs_says_so_for_too_long(drilled):
    record = drilled["hangs, and says 200"].record
    assert record.num_of("hung") == record.num_of(*LOST) > 0
    assert record.health.well_but_silent_s > HEALTH_S
    assert record.first_lost_s == pytest.approx(BOUND_S, abs=1.4)


def test_one_that_refuses_for_a_while_is_back(drilled):
    record = drilled["refuses for a while"].record
    assert record.is_running
    assert record.full_rate_s is not None
    assert record.num_of("as before") > 0


def test_changes_are_told_by_the_margin_or_by_their_number(drilled):
    tied = drilled["ties"].record
    assert tied.num_of("tie") > 0
    assert tied.num_of("changed") == 0
    clear = drilled["changes a token"].record
    assert clear.changes.tie_nats == pytest.approx(0.25)
    (changed,) = (each for each in clear.outcomes if each.name == "changed")
    assert "999" in changed.example
    assert changed.num_later > 0


def test_text_is_compared_where_there_are_no_ids(drilled):
    assert drilled["tells text alone"].record.changes.compared == "text"


def test_one_without_health_is_no_liar(drilled):
    record = drilled["has no /health"].record
    assert not record.health.is_known
    assert any("/health" in each for each in record.cautions)


def test_bins_cover_the_time_with_the_fault_at_an_edge(drilled):
    line = drilled["recovers"].record.timeline
    assert 0.0 in line.begins_s
    assert line.begins_s[0] == pytest.approx(-AFTER_S, abs=0.5)
    paused = [
        tps
        for at, tps in zip(line.begins_s, line.tps, strict=True)
        if 0.15 < at < PAUSE_S - 2 * line.bin_s
    ]
    assert not any(paused)
