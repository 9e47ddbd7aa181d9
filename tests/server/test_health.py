"""`/health` while ranks hang, while they are replaced, and once requests go on."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest

from cli.screen import tells
from engine.elastic.recovering import PARAMS, PROMPTS, harmed, pids
from engine.ranks.processes import wait_until
from expertlane import LLM
from expertlane.engine.comm.progress import Position
from expertlane.engine.elastic.recovery_record import Moment, RecoveryKind, RecoveryRecord, State
from expertlane.engine.ranks.commands import RunStep
from expertlane.engine.ranks.losses import Silence
from expertlane.server.health import Stall
from expertlane.server.setup import ServerOptions
from expertlane.spec.names import Stage
from server.running import serving
from server.test_metrics import scrape
from server.test_recovery import complete

TIMEOUT_S, STALL_S = 4.0, 0.7
BOUND_S = 4.0


class Ranks:
    """What a stall looks at, made up: how long ranks are silent, and a recovery."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.state, self.records = State.SERVING, []
        self.stall = Stall(SimpleNamespace(recovery=self), self, BOUND_S)

    def silence(self) -> Silence | None:
        if self.seconds is None:
            return None
        position = Position(7, 2, Stage.EXPERTS, False, 1, 0.0)
        return Silence(self.seconds, 3, position, is_stopped=True)

    def enter(self, state: State, ago_s: float, kind: RecoveryKind = RecoveryKind.RECOVERY) -> None:
        """Begin a recovery so many seconds ago, in this state now."""
        self.state = state
        moment = Moment(State.FENCING, time.monotonic() - ago_s)
        self.records = [RecoveryRecord(0.0, kind, moments=[moment])]


def test_silence_up_to_the_bound_is_none():
    ranks = Ranks()
    assert ranks.stall.reason() is None
    ranks.seconds = BOUND_S
    assert ranks.stall.reason() is None
    ranks.seconds = BOUND_S + 1.5
    assert tells(ranks.stall.reason(), "rank 3 stopped nothing 6 s step 7 layer 2 experts")
    ranks.seconds = 0.0
    assert ranks.stall.reason() is None


@pytest.mark.parametrize("kind", list(RecoveryKind))
def test_a_short_change_is_a_pause_and_a_long_one_a_stall(kind):
    ranks = Ranks()
    ranks.enter(State.LOADING, BOUND_S / 2, kind)
    ranks.seconds = 100.0  # of ranks that are not there
    assert ranks.stall.reason() is None
    ranks.enter(State.LOADING, BOUND_S + 2, kind)
    assert tells(ranks.stall.reason(), "(loading) 6 s")
    ranks.state, ranks.seconds = State.SHRUNK, 0.0  # fewer serve, but they do
    assert ranks.stall.reason() is None


def test_silence_and_the_recovery_after_it_are_one_stall():
    ranks = Ranks()
    ranks.seconds = BOUND_S + 1
    assert ranks.stall.reason() is not None
    for state in (State.FENCING, State.REPLACING, State.LOADING, State.REPLAYING):
        ranks.enter(state, 0.1)
        assert tells(ranks.stall.reason(), f"lost ({state})")
    ranks.state, ranks.seconds = State.SERVING, None
    assert ranks.stall.reason() is None
    ranks.enter(State.FENCING, 0.1)  # another one, of which nothing was seen before
    assert ranks.stall.reason() is None


def test_a_recovery_that_has_just_begun_has_no_record_of_its_own():
    ranks = Ranks()
    ranks.enter(State.FENCING, BOUND_S + 60)
    ranks.records[-1].moments.append(Moment(State.SERVING, time.monotonic()))
    assert ranks.stall.reason() is None


@contextmanager
def probed(server) -> Iterator[list[tuple[int, str]]]:
    """What `/health` and `/ping` say meanwhile: statuses and messages, without repetitions."""
    found: list[tuple[int, str]] = []
    is_over = threading.Event()

    def probe() -> None:
        while not is_over.wait(0.05):
            answer = httpx.get(f"{server.url}/health")
            message = "" if answer.is_success else answer.json()["error"]["message"]
            if not found or found[-1][0] != answer.status_code:
                found.append((answer.status_code, message))

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


@pytest.mark.full
def test_a_rank_that_hangs():
    settings = {"dtype": "float32", "num_blocks": 64, "on_failure": "replace"}
    events: list[tuple[str, str]] = []
    options = ServerOptions(stall_s=STALL_S, on_event=lambda *event: events.append(event))
    with LLM("paper-tiny", layout="dp=2,ep=2", timeout_s=TIMEOUT_S, **settings) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]
        with (
            serving(llm, options=options, watch=llm.watch()) as server,
            probed(server) as said,
        ):
            assert wait_until(lambda: said == [(200, "")])
            with (
                harmed(1, RunStep, 6, signal.SIGSTOP),
                ThreadPoolExecutor(len(PROMPTS)) as clients,
            ):
                asked = [clients.submit(complete, server, number) for number in range(len(PROMPTS))]
                assert wait_until(lambda: len(said) == 2)
                values, _ = scrape(server)
                assert values["expertlane:healthy",] == 0
                assert httpx.get(f"{server.url}/ping").status_code == 503
                assert httpx.get(f"{server.url}/v1/models").status_code == 200
                assert [each.result() for each in asked] == expected
            assert wait_until(lambda: len(said) == 3)
            assert [status for status, _ in said] == [200, 503, 200]
            assert tells(said[1][1], "rank 1 stopped nothing step stage")
            # Nobody asks for anything.
            os.kill(pids(llm)[0], signal.SIGSTOP)
            assert wait_until(lambda: len(said) == 5, 30)
            assert tells(said[3][1], "rank 0 stopped nothing")
            assert llm.engine.recovery.num_recoveries == 2
            assert complete_all(server, expected)
            values, _ = scrape(server)
            assert values["expertlane:healthy",] == 1
    assert not [each for each in events if each[0] == "error"]  # probes are no failures


def complete_all(server, expected) -> bool:
    return [complete(server, number) for number in range(len(PROMPTS))] == expected
