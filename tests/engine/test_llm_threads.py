"""Several threads on one `LLM`: their requests run together, and the end of one harms no other."""

import gc
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from cli.screen import telling
from engine.stub_runner import VOCAB_SIZE, expected
from expertlane.engine.llm import LLM
from expertlane.errors import RankError, UserError
from expertlane.spec.sampling import SamplingParams
from schedule.paged import check_empty

GREEDY = SamplingParams(temperature=0, max_tokens=20)
GONE = "the ranks are gone"
PATIENCE_S = 120.0  # of what takes a second on a quiet machine


@pytest.fixture
def slow_llm(stub_llm):
    """Each step takes a millisecond, in which other threads run."""
    stub_llm.runner.before = lambda: time.sleep(1e-3)
    return stub_llm


class Threads:
    """What runs beside the test; each gives a value or an error in bounded time."""

    def __init__(self):
        self._found = []

    def start(self, function, *args):
        """Its outcome, when it is called: what the function gave or raised."""
        outcome = []

        def run():
            try:
                outcome.append(function(*args))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def result():
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "it hangs"
            return outcome[0]

        return result


@pytest.fixture
def threads():
    return Threads()


def check_idle(llm: LLM) -> None:
    while llm.engine._loop.uncommitted:
        llm.engine.step()
    assert not llm.engine.has_unfinished
    check_empty(llm.engine.scheduler)
    shared = llm._shared
    assert not any((shared._turns, shared._to_cancel, shared._arrivals))


def prompt_of(number: int) -> list[int]:
    return [number % VOCAB_SIZE, number // VOCAB_SIZE]


def generate(llm, number, max_tokens=20):
    (output,) = llm.generate([prompt_of(number)], replace(GREEDY, max_tokens=max_tokens))
    return output.token_ids


def stream(llm, number, max_tokens=20):
    chunks = llm.stream([prompt_of(number)], replace(GREEDY, max_tokens=max_tokens))
    return [chunk.token_id for _, chunk in chunks]


def wait_until(condition):
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, "it never comes"
        time.sleep(1e-3)


@pytest.mark.parametrize("how", [generate, stream])
def test_requests_of_all_threads_run_in_the_same_steps(slow_llm, threads, how):
    def once_all_have_come():
        if slow_llm.runner.num_steps == 0:
            wait_until(lambda: len(slow_llm._shared._turns) == 4)

    slow_llm.runner.before = once_all_have_come
    results = [threads.start(how, slow_llm, number) for number in range(4)]
    for number, result in enumerate(results):
        assert result() == expected(prompt_of(number), 20)
    assert slow_llm.runner.num_steps < 2 * 20
    check_idle(slow_llm)


def test_many_calls_of_many_threads(slow_llm):
    slow_llm.runner.before = lambda: None

    def work(number):
        how = (generate, stream)[number % 2]
        if number % 7 == 3:
            with pytest.raises(UserError, match=telling("prompt 2 empty")):
                slow_llm.generate([[1], []], GREEDY)
        if number % 5 == 2:
            next(left := slow_llm.stream([[1], [2]], GREEDY))
            left.close()
        length = 1 + number % 9
        return how(slow_llm, number, length) == expected(prompt_of(number), length)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400), timeout=2 * PATIENCE_S))
    check_idle(slow_llm)


def test_a_short_request_does_not_wait_for_a_long_one(slow_llm, threads):
    are_over = threading.Event()

    def goes_on():
        """The long one does so alone at first, and at last."""
        is_asked_for = len(slow_llm.engine._live) > 1 or len(slow_llm._shared._turns) > 1
        return slow_llm.runner.num_steps <= 3 or is_asked_for or are_over.is_set()

    slow_llm.runner.before = lambda: wait_until(goes_on)
    long = threads.start(generate, slow_llm, 0, 60)
    wait_until(lambda: slow_llm.runner.num_steps > 2)
    for number in range(1, 4):
        assert generate(slow_llm, number, 2) == expected(prompt_of(number), 2)
    assert slow_llm.runner.num_steps < 40
    are_over.set()
    assert long() == expected(prompt_of(0), 60)[:63]
    check_idle(slow_llm)


def test_a_stream_that_is_not_asked_keeps_nobody(slow_llm, threads):
    kept = slow_llm.stream([prompt_of(0)], GREEDY)
    first = next(kept)
    assert threads.start(generate, slow_llm, 1, 40)() == expected(prompt_of(1), 40)
    rest = threads.start(list, kept)()  # in another thread, and it has all come by now
    assert [chunk.token_id for _, chunk in [first, *rest]] == expected(prompt_of(0), 20)
    check_idle(slow_llm)


def test_a_stream_that_is_collected_in_the_middle_of_a_step(slow_llm):
    """As garbage, in the thread that takes the step: it must not wait for itself."""
    left = [slow_llm.stream([prompt_of(0)], replace(GREEDY, max_tokens=50))]
    next(left[0])
    left.append(left)  # a cycle

    def collect():
        nonlocal left
        if left is not None:
            left = None
            gc.collect()

    slow_llm.runner.before = collect
    assert generate(slow_llm, 1) == expected(prompt_of(1), 20)
    check_idle(slow_llm)


@pytest.mark.parametrize("leads", [True, False])
def test_an_interruption_is_the_main_thread_s_alone(slow_llm, threads, leads):
    main = threading.get_ident()
    if not leads:
        other = threads.start(generate, slow_llm, 1, 60)
        wait_until(lambda: slow_llm.runner.num_steps)
    started, sent = slow_llm.runner.num_steps, []

    def interrupt():
        time.sleep(2e-3)
        if slow_llm.runner.num_steps >= started + 5 and not sent:
            sent.append(signal.pthread_kill(main, signal.SIGINT))

    if leads:
        timer = threading.Timer(
            2e-3, lambda: results.append(threads.start(generate, slow_llm, 1, 60))
        )
        results = []
        timer.start()

    def interrupted():
        slow_llm.runner.before = interrupt
        generate(slow_llm, 0, 60)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    if leads:
        timer.join()
        other = results[0]
    assert other() == expected(prompt_of(1), 60)
    check_idle(slow_llm)


def test_an_error_reaches_all(slow_llm, threads):
    def die():
        time.sleep(1e-3)
        if slow_llm.runner.num_steps == 10:
            slow_llm._pool.close()
            raise RankError("rank 0 was killed")

    slow_llm.runner.before = die
    results = [threads.start((generate, stream)[i % 2], slow_llm, i, 50) for i in range(6)]
    errors = [result() for result in results]
    assert {type(error) for error in errors} == {RankError}
    assert {str(error)[: len(GONE)] for error in errors} <= {"rank 0 was killed", GONE}
    assert "rank 0 was killed" in map(str, errors)


def test_closing_ends_all_that_wait(slow_llm, threads):
    # None ends before that.
    slow_llm.runner.before = lambda: time.sleep(0.2 if slow_llm.runner.num_steps > 5 else 1e-3)
    results = [threads.start((generate, stream)[i % 2], slow_llm, i, 59) for i in range(6)]
    wait_until(lambda: slow_llm.runner.num_steps > 5)
    slow_llm.close()
    assert [(type(e), str(e)[: len(GONE)]) for e in (result() for result in results)] == [
        (RankError, GONE)
    ] * 6
    slow_llm.close()
    with pytest.raises(RankError, match=GONE):
        generate(slow_llm, 0)


class TestRanks:
    def test_threads_share_real_ranks_until_one_dies(self, threads):
        with LLM("paper-tiny", layout="dp=2,ep=2", dtype="float32", timeout_s=20) as llm:
            prompts = [[number, 3, 7] for number in range(6)]
            alone = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]

            def ask(number):
                if number % 2:
                    return [chunk.token_id for _, chunk in llm.stream(prompts[number], GREEDY)]
                return llm.generate(prompts[number], GREEDY)[0].token_ids

            results = [threads.start(ask, number) for number in range(6)]
            assert [result() for result in results] == alone
            endless = [[1]] * 2000
            results = [
                threads.start(llm.generate, endless, replace(GREEDY, max_tokens=60))
                for _ in range(3)
            ]
            wait_until(lambda: llm.engine.has_unfinished)
            time.sleep(0.2)
            os.kill(llm._pool.pid(1), signal.SIGKILL)
            errors = [result() for result in results]
            assert {type(error) for error in errors} == {RankError}
            assert any("rank 1 " in str(error) and "SIGKILL" in str(error) for error in errors)
