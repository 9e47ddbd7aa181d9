"""What travels between launcher and ranks: typed values and arrays, and nothing that is run."""

import dataclasses
import os
import pickle
import socket
import struct
import threading
from functools import reduce
from operator import or_

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import telling
from expertlane.engine.ranks import commands, messages
from expertlane.engine.ranks.commands import Deploy, RankOutcome, RunStep, SetDispatch, result_type
from expertlane.engine.ranks.messages import (
    MAX_MESSAGE_BYTES,
    Channel,
    Decoder,
    Failure,
    FailureKind,
    MessageError,
    MessageKind,
    encode,
    messages_in,
)
from expertlane.engine.stage.worker import HANDLERS
from expertlane.errors import UserError
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.names import Phase
from expertlane.spec.sampling import SamplingParams, SamplingState, TokenLogprobs

COMMANDS = Decoder(reduce(or_, HANDLERS))


@pytest.fixture
def pair():
    """Two ends of a connection."""
    ours, theirs = socket.socketpair()
    ends = Channel(ours, 5.0), Channel(theirs, 5.0)
    yield ends
    for end in ends:
        end.close()


def through(encoded, pair):
    """Sent from one end and received at the other."""
    sender = threading.Thread(target=pair[0].send, args=(encoded,))
    sender.start()
    message = pair[1].receive()
    sender.join()
    return message


def batch(num_seqs):
    return Batch(
        seq_ids=np.arange(num_seqs),
        num_scheduled_tokens=np.full(num_seqs, 2),
        num_computed_tokens=np.zeros(num_seqs, dtype=np.int64),
        token_ids=np.arange(2 * num_seqs),
        block_tables=np.arange(3 * num_seqs, dtype=np.int32).reshape(num_seqs, 3),
        yields_token=np.ones(num_seqs, dtype=np.bool_),
    )


def equal(one, other):
    """Whether two values are the same, arrays in type and shape too."""
    if isinstance(one, np.ndarray):
        same_form = isinstance(other, np.ndarray) and one.dtype == other.dtype
        return same_form and one.shape == other.shape and np.array_equal(one, other)
    if dataclasses.is_dataclass(one) or isinstance(one, commands.Command):
        names = one.__annotations__
        return type(one) is type(other) and all(
            equal(getattr(one, name), getattr(other, name)) for name in names
        )
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("num_seqs", [0, 1, 300])
def test_a_step_plan_arrives_as_it_was(pair, num_seqs):
    state = SamplingState(
        SamplingParams(temperature=0.5, seed=2**63, stop=["x"], top_k=5),
        2**64 - 1,
        np.arange(4),
        np.zeros(0, dtype=np.int64),
    )
    plan = StepPlan(
        7,
        1,
        Phase.DECODE,
        ((batch(num_seqs), batch(0)),) * 2,
        admitted={0: state},
        released=(3, 4),
    )
    command = RunStep(plan.of_dp_ranks()[0])
    assert bool(command.step.admitted) == (num_seqs > 0)  # sequence 0 begins on this rank
    message = through(encode(MessageKind.COMMAND, command), pair)
    assert message.kind is MessageKind.COMMAND
    assert equal(COMMANDS.decode(message), command)


def test_an_outcome_arrives_as_it_was(pair):
    outcome = RankOutcome(
        token_ids={5: 2, 9: 0},
        logprobs={5: TokenLogprobs(2, -0.5, ((2, -0.5), (1, -float("inf"))))},
        logits={9: np.linspace(0, 1, 70_000, dtype=np.float32)},
    )
    message = through(encode(MessageKind.RESULT, outcome), pair)
    received = Decoder(RankOutcome).decode(message)
    assert equal(received, outcome)
    received.logits[9][0] = 1  # torch warns of arrays that cannot be written to


def test_numpy_s_own_numbers_travel_as_plain_ones(pair):
    outcome = RankOutcome(token_ids={1: np.int64(7)})
    message = through(encode(MessageKind.RESULT, outcome), pair)
    assert Decoder(RankOutcome).decode(message).token_ids == {1: 7}


def test_every_command_has_a_handler_and_an_answer_that_can_be_decoded():
    every = {
        each
        for each in vars(commands).values()
        if isinstance(each, type) and issubclass(each, commands.Command)
    } - {commands.Command}
    assert every == set(HANDLERS)
    for command in every:
        Decoder(command)
        Decoder(result_type(command))
    assert result_type(SetDispatch) in (None, type(None))
    assert result_type(commands.TimeOneMove) == tuple[int, float, float]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Deploy, "sent"),  # a class
        (np.array(["x"], dtype=object), "sent"),
        (np.zeros(2, dtype=np.complex64), "sent"),
    ],
)
def test_what_cannot_be_sent(value, said):
    with pytest.raises(TypeError, match=telling(said)):
        encode(MessageKind.RESULT, value)


def test_a_name_of_a_file_that_is_no_text():
    with pytest.raises(UserError, match=telling("a\\udcff UTF-8")):
        encode(MessageKind.RESULT, "a\udcff")
    failure = Failure(FailureKind.BUG, "no file a\udcff")
    assert failure.text == r"no file a\udcff"
    encode(MessageKind.FAILURE, failure)


def changed(encoded, at, new):
    return encoded[:at] + new + encoded[at + len(new) :]


HEADER = struct.Struct("<4sIIQQ")


@pytest.mark.parametrize(
    ("garbage", "said"),
    [
        (b"GET / HTTP/1.1\r\nHost: expertlane\r\n\r\n", "header wrong"),
        (pickle.dumps(os.getcwd) + bytes(64), "header wrong"),
        (HEADER.pack(b"XLM2", 77, 0, 0, 0), "header wrong"),
        (
            HEADER.pack(b"XLM2", 1, 0, MAX_MESSAGE_BYTES, 1),
            "1,073,741,825 bytes 1,073,741,824",
        ),
        (
            HEADER.pack(b"XLM2", 1, 0, 0, 2**64 - 1),
            "18,446,744,073,709,551,615 bytes",
        ),
    ],
)
def test_garbage(pair, garbage, said):
    with pytest.raises(MessageError, match=telling(said)):
        through(garbage, pair)


def test_messages_in_a_file():
    values = [Failure(FailureKind.BUG, text) for text in ("one", "two")]
    content = b"".join(encode(MessageKind.FAILURE, each) for each in values)
    decoder = Decoder(Failure)
    for cut, num in ((0, 2), (1, 1), (len(content) // 2, 1), (len(content), 0)):
        found = messages_in(memoryview(content[: len(content) - cut]))
        assert [decoder.decode(each) for each in found] == values[:num]
    with pytest.raises(MessageError, match="header"):
        list(messages_in(memoryview(content + b"?" * 64)))


def test_the_end_in_the_middle_of_a_message(pair):
    encoded = encode(MessageKind.RESULT, "text")
    pair[0].send(encoded[:-1])
    pair[0].close()
    with pytest.raises(EOFError):
        pair[1].receive()


def test_a_peer_that_stops_in_the_middle_of_a_message_is_not_waited_for():
    ours, theirs = socket.socketpair()
    with ours:
        channel = Channel(theirs, 0.1)
        ours.sendall(encode(MessageKind.RESULT, "text")[:-1])
        with pytest.raises(BlockingIOError):
            channel.receive()
        channel.close()


def test_a_message_has_an_epoch(pair):
    for epoch in (0, 1, 2**32 - 1):
        assert through(encode(MessageKind.RESULT, "text", epoch), pair).epoch == epoch


@pytest.mark.parametrize("number", [0, 1, 201])
def test_descriptors_follow_a_message(pair, number):
    """More than a system call takes; if the sender ends in between, none stays open."""

    def num_open():
        return len(os.listdir("/proc/self/fd"))

    with open(os.devnull) as nothing:
        before = num_open()
        for announced in (number, number + 300):
            pair[0].send(encode(MessageKind.COMMAND, "those"))
            pair[0].send_descriptors([nothing.fileno()] * number)
            assert pair[1].receive().kind is MessageKind.COMMAND
            if announced == number:
                for descriptor in pair[1].receive_descriptors(announced):
                    assert os.path.samestat(os.fstat(descriptor), os.fstat(nothing.fileno()))
                    assert not os.get_inheritable(descriptor)
                    os.close(descriptor)
            else:
                pair[0].close()
                with pytest.raises((EOFError, MessageError)):
                    pair[1].receive_descriptors(announced)
                before -= 1
            assert num_open() == before


def test_a_command_that_is_not_known(pair):
    message = through(encode(MessageKind.COMMAND, RunStep(None)), pair)
    known = Decoder(Deploy)
    with pytest.raises(MessageError, match=r"^Invalid value 'RunStep'"):
        known.decode(message)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (["<i8", [2], 0], "int64 float32"),
        (["|O", [2], 0], "expected"),
        (["<f4", [-1], 0], "not in message"),
        (["<f4", [4], 4], "not in message"),
        (["<f4", [2**40, 2**40], 0], "not in message"),
        (["<f4", [1], -4], "not in message"),
        ("text", "expected"),
        ([1, 2, 3], "expected"),
    ],
)
def test_arrays_that_are_not_what_they_should_be(pair, array, said):
    body = messages.msgspec.msgpack.encode({"logits": {1: array}})
    padding = bytes(-len(body) % 64)
    encoded = (
        HEADER.pack(b"XLM2", MessageKind.RESULT, 0, len(body), 16) + body + padding + bytes(16)
    )
    message = through(encoded, pair)
    with pytest.raises(MessageError, match=telling(said)):
        Decoder(RankOutcome).decode(message)


@given(st.data())
@settings(deadline=None)
def test_damaged_messages_are_refused_or_harmless(data):
    """Whatever is changed in a message, decoding gives a value or a `MessageError`."""
    plan = StepPlan(1, 0, Phase.PREFILL, ((batch(2),),))
    encoded = encode(MessageKind.COMMAND, RunStep(*plan.of_dp_ranks()))
    at = data.draw(st.integers(0, len(encoded) - 1))
    damaged = changed(encoded, at, bytes([data.draw(st.integers(0, 255))]))
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(damaged)
        ours.shutdown(socket.SHUT_WR)
        channel = Channel(theirs, 1.0)
        try:
            decoded = COMMANDS.decode(channel.receive())
        except (MessageError, EOFError):
            pass
        else:
            assert isinstance(decoded, RunStep)
        finally:
            channel.close()
