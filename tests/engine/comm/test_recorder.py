"""The clock of a rank, on a clock of our own: wall seconds, and CPU at half their pace."""

from types import SimpleNamespace

import pytest
import torch

from expertlane.cost.step.operation import TransferKind
from expertlane.engine.comm import recorder as module
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.recorder import Recorder
from expertlane.results.step_record import Action
from expertlane.spec.names import Stage, Track

OUTSIDE = 2  # the slot after the model's two layers


class Clock:
    """Stands still until told; its marks may be read only once it has settled."""

    def __init__(self):
        self.now_s = 100.0
        self.is_settled = False
        self.num_threads = 2

    def restart(self):
        self.is_settled = False

    def advance(self, seconds):
        self.now_s += seconds

    def mark(self):
        self.is_settled = False
        return self.now_s

    def settle(self):
        self.is_settled = True

    def seconds(self, begin, end):
        assert self.is_settled
        return end - begin


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    fake = SimpleNamespace(
        perf_counter=lambda: clock.now_s,
        thread_time=lambda: clock.now_s / 2,
        process_time=lambda: clock.now_s * 2,
    )
    monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(torch, "get_num_threads", lambda: clock.num_threads)
    return clock


@pytest.fixture
def board():
    return ProgressBoard(1)


class Token:
    """Keeps what was done with it; the core is free after `delay_s`."""

    def __init__(self, clock, board):
        self.done = []
        self.delay_s = 0.0
        self._clock, self._board = clock, board

    def acquire(self):
        assert self._board.position(0).waiting  # or the watchdog would blame this rank
        self._clock.advance(self.delay_s)
        self.done.append("acquire")

    def release(self):
        self.done.append("release")


@pytest.fixture
def token(clock, board):
    return Token(clock, board)


@pytest.fixture
def recorder(clock, board, token):
    sizes = {"num_layers": 2, "num_experts": 3, "world_size": 3}
    return Recorder(0, progress=board.reporter(0), clock=clock, token=token, **sizes)


def seconds(array):
    """The places of an array that are not zero: (micro-batch, slot, stage) to value."""
    return {
        (int(m), int(slot), Stage(int(stage))): pytest.approx(array[m, slot, stage])
        for m, slot, stage in zip(*array.nonzero(), strict=True)
    }


def test_time_goes_to_the_stage_that_was_entered(recorder, clock):
    recorder.begin_step(0, 1, record=True, count_idle=False)
    clock.advance(1)  # still idle: nothing was entered
    recorder.enter(Stage.EMBED)
    clock.advance(2)
    recorder.enter(Stage.ATTENTION, 0)
    clock.advance(4)
    recorder.enter(Stage.ATTENTION, 1)
    clock.advance(8)
    recorder.enter(Stage.ATTENTION, 0)
    clock.advance(16)
    record = recorder.end_step()
    wall = {
        (0, OUTSIDE, Stage.IDLE): 1,
        (0, OUTSIDE, Stage.EMBED): 2,
        (0, 0, Stage.ATTENTION): 20,
        (0, 1, Stage.ATTENTION): 8,
    }
    assert seconds(record.wall_s) == wall
    assert seconds(record.cpu_s) == {place: value / 2 for place, value in wall.items()}
    assert record.blocked_s.sum() == 0
    assert record.process_cpu_s == 62


def test_waits_are_part_of_their_stage(recorder, clock, board):
    recorder.begin_step(0, 1, record=True, count_idle=False)
    recorder.enter(Stage.DISPATCH, 1)
    clock.advance(1)
    began = recorder.begin_wait()
    assert board.position(0).waiting
    clock.advance(5)
    recorder.end_wait(began)
    assert not board.position(0).waiting
    clock.advance(1)
    record = recorder.end_step()
    assert seconds(record.wall_s) == {(0, 1, Stage.DISPATCH): 7}
    assert seconds(record.blocked_s) == {(0, 1, Stage.DISPATCH): 5}


def test_the_time_since_the_last_step_is_idle_if_asked_for(recorder, clock):
    recorder.begin_step(0, 1, record=True, count_idle=False)
    recorder.end_step()
    clock.advance(3)
    recorder.begin_step(1, 1, record=True, count_idle=True)
    clock.advance(1)
    record = recorder.end_step()
    assert seconds(record.wall_s) == {(0, OUTSIDE, Stage.IDLE): 4}
    assert seconds(record.blocked_s) == {(0, OUTSIDE, Stage.IDLE): 3}
    assert record.process_cpu_s == 8  # also what was used between the steps
    clock.advance(3)
    recorder.begin_step(2, 1, record=True, count_idle=False)
    record = recorder.end_step()
    assert record.wall_s.sum() == record.process_cpu_s == 0


def post(recorder, to, num_rows, row_bytes, metadata_bytes=0, kind=TransferKind.ALL_TO_ALL):
    """A transfer of a group of all three ranks that is under way at once."""
    number = recorder.post(kind, [0, 1, 2], to, num_rows, row_bytes, metadata_bytes)
    recorder.posted()
    return number


def count_fan_out(recorder, ranks=(1,), nodes=(1,), num_remote_ranks=1, num_remote_nodes=1):
    recorder.count_fan_out(
        torch.tensor(ranks, dtype=torch.int64),
        torch.tensor(nodes, dtype=torch.int64),
        num_remote_ranks,
        num_remote_nodes,
    )


def test_without_a_record_only_progress_is_kept(recorder, board):
    recorder.begin_step(9, 1, record=False, count_idle=True)
    recorder.enter(Stage.ROUTER, 1)
    assert str(board.position(0)) == "step 9, layer 1, stage router"
    recorder.end_wait(recorder.begin_wait())
    count_fan_out(recorder)
    assert post(recorder, [1], [1], row_bytes=1) is None
    assert recorder.end_step() is None
    position = board.position(0)
    # An idle rank says where it came to, for the launcher to name if it hangs.
    assert (position.step, position.layer, position.stage) == (9, 1, Stage.IDLE)


def test_without_a_record_no_value_is_fetched(recorder):
    """The running totals of a server count on the device. On `meta` there is nothing to fetch."""
    recorder.totals()  # they are wanted from now on
    ids = torch.zeros(4, 2, dtype=torch.int64, device="meta")

    def step(**asked):
        recorder.begin_step(0, 1, count_idle=False, **asked)
        recorder.enter(Stage.ROUTER, 1)
        recorder.record_topk_ids(ids)
        recorder.meter.counts(1, experts, ids.device).add_(ids.sum(dim=0))
        recorder.count_fan_out(ids[:, 0], ids[:, 1], 1, 1)

    experts = [0, 1]
    step(record=False)
    for asked in ({"record": True}, {"record": False, "record_routing": True}):
        with pytest.raises(NotImplementedError, match="no data"):
            step(**asked)


def test_the_choices_of_tokens_are_kept_by_layer(recorder):
    ids = torch.tensor([[0, 2], [1, 0]])
    recorder.begin_step(0, 1, record=False, count_idle=False, record_routing=True)
    for layer, of_layer in [(0, ids), (1, ids[:0]), (0, ids[:1]), (1, ids.flip(0)[:1])]:
        recorder.enter(Stage.ROUTER, layer)
        recorder.record_topk_ids(of_layer)
    ids.fill_(9)  # what is kept is a copy
    kept = recorder.end_step().topk_ids
    assert {layer: of_layer.tolist() for layer, of_layer in kept.items()} == {
        0: [[0, 2], [1, 0], [0, 2]],
        1: [[1, 0]],
    }
    assert {str(of_layer.dtype) for of_layer in kept.values()} == {"int32"}
    recorder.begin_step(1, 1, record=True, count_idle=False)
    recorder.enter(Stage.ROUTER, 0)
    recorder.record_topk_ids(ids)
    assert recorder.end_step().topk_ids == {}


def events(record):
    """Track, stage, layer, micro-batch, begin and end of each."""
    kept = record.events
    columns = (kept.track, kept.stage, kept.layer, kept.micro_batch, kept.begin_s, kept.end_s)
    return [
        (list(Track)[track].value, Stage(stage), layer, micro_batch, begin_s, end_s)
        for track, stage, layer, micro_batch, begin_s, end_s in zip(*columns, strict=True)
    ]


def test_events_are_kept_if_asked_for(recorder, clock):
    recorder.begin_step(0, 2, record=False, count_idle=False, record_events=True)
    clock.advance(1)  # idle is no event
    recorder.enter(Stage.EMBED)
    clock.advance(2)
    recorder.set_micro_batch(1)
    recorder.enter(Stage.DISPATCH, 1)
    clock.advance(4)  # packing
    recorder.enter(Stage.DISPATCH, 1)
    began = recorder.begin_wait()
    clock.advance(8)
    recorder.end_wait(began)
    began = recorder.begin_wait()
    clock.advance(16)
    recorder.end_wait(began)
    clock.advance(32)  # unpacking
    recorder.enter(Stage.EXPERTS, 1)
    record = recorder.end_step()
    assert record.events.start_s == 100.0
    assert events(record) == [
        ("compute", Stage.EMBED, -1, 0, 1, 3),
        ("compute", Stage.DISPATCH, 1, 1, 3, 7),
        ("network", Stage.DISPATCH, 1, 1, 7, 15),
        ("network", Stage.DISPATCH, 1, 1, 15, 31),
        ("compute", Stage.DISPATCH, 1, 1, 31, 63),
    ]
    assert record.wall_s.sum() == 63  # a record it is as well
    recorder.begin_step(1, 1, record=True, count_idle=False)
    assert recorder.end_step().events is None


def test_a_wait_that_ends_with_its_interval(recorder, clock):
    recorder.begin_step(0, 1, record=True, count_idle=False, record_events=True)
    recorder.enter(Stage.HAND_OVER)
    began = recorder.begin_wait()
    clock.advance(3)
    recorder.end_wait(began)
    recorder.enter(Stage.ATTENTION, 0)
    recorder.end_wait(recorder.begin_wait())  # of no length
    clock.advance(1)
    assert events(recorder.end_step()) == [
        ("network", Stage.HAND_OVER, -1, 0, 0, 3),
        ("compute", Stage.ATTENTION, 0, 0, 3, 4),
    ]


def test_time_without_the_core_is_no_computing(recorder, clock, token):
    """The one thread of a rank has the core for half of the time, as CPU time tells."""
    clock.num_threads, token.delay_s = 1, 3.0
    flags = {"record_operations": True, "record_events": True}
    recorder.begin_step(0, 1, record=True, count_idle=False, **flags)
    recorder.enter(Stage.EXPERTS, 1)
    clock.advance(4)
    began = recorder.begin_wait()
    clock.advance(8)
    recorder.end_wait(began)  # and 3 s until the core is free
    clock.advance(2)
    recorder.enter(Stage.HEAD)
    clock.advance(2e-5)
    record = recorder.end_step()
    assert events(record) == [
        ("compute", Stage.EXPERTS, 1, 0, 0, 2),
        ("descheduled", Stage.EXPERTS, 1, 0, 2, 4),
        ("network", Stage.EXPERTS, 1, 0, 4, 12),
        ("descheduled", Stage.EXPERTS, 1, 0, 12, 15),
        ("compute", Stage.EXPERTS, 1, 0, 15, 16),
        ("descheduled", Stage.EXPERTS, 1, 0, 16, 17),
        ("compute", Stage.HEAD, -1, 0, 17, pytest.approx(17 + 2e-5)),  # too little to tell
    ]
    assert seconds(record.blocked_s) == {(0, 1, Stage.EXPERTS): 11}  # counted as before


def operations(record):
    """Action, stage, layer, micro-batch, CPU seconds, transfer of each."""
    kept = record.operations
    columns = kept.action, kept.stage, kept.layer, kept.micro_batch, kept.cpu_s, kept.transfer
    return [
        (Action(action).name, Stage(stage), layer, micro_batch, cpu_s, transfer)
        for action, stage, layer, micro_batch, cpu_s, transfer in zip(*columns, strict=True)
        if action != Action.COMPUTE or cpu_s
    ]


def begin_recorded(recorder, num_micro_batches=1, **flags):
    recorder.begin_step(
        0, num_micro_batches, record=False, count_idle=False, record_operations=True, **flags
    )


def test_operations_are_kept_if_asked_for(recorder, clock):
    begin_recorded(recorder, 2)
    clock.advance(2)
    recorder.enter(Stage.EMBED)
    clock.advance(4)
    recorder.set_micro_batch(1)
    recorder.enter(Stage.DISPATCH, 1)
    clock.advance(8)
    number = recorder.post(TransferKind.ALL_GATHER, [0, 1, 2], [0, 1], [5, 3], 10, 2)
    clock.advance(100)  # copying is the transport's matter
    recorder.posted()
    clock.advance(16)
    began = recorder.begin_wait()
    clock.advance(100)
    recorder.end_wait(began, number)
    clock.advance(32)
    recorder.arrive()
    clock.advance(64)
    with recorder.uncounted():
        clock.advance(100)
    clock.advance(128)
    recorder.enter(Stage.EXPERTS, 1)
    post(recorder, [1], [0], 10, kind=TransferKind.SEND)
    recorder.end_wait(recorder.begin_wait())  # of a send: the replay does not wait for it
    clock.advance(2)
    record = recorder.end_step()
    place = Stage.DISPATCH, 1, 1
    assert operations(record) == [
        ("COMPUTE", Stage.IDLE, -1, 0, 1, -1),
        ("COMPUTE", Stage.EMBED, -1, 0, 2, -1),
        ("COMPUTE", *place, 4, -1),
        ("POST", *place, 0, 0),
        ("COMPUTE", *place, 8, -1),
        ("WAIT", *place, 0, 0),
        ("COMPUTE", *place, 16, -1),
        ("ARRIVE", *place, 0, -1),
        ("COMPUTE", *place, 32, -1),
        ("COMPUTE", *place, 64, -1),
        ("POST", Stage.EXPERTS, 1, 1, 0, 1),
        ("COMPUTE", Stage.EXPERTS, 1, 1, 1, -1),
    ]
    kept = record.operations
    kinds = list(TransferKind)
    assert [kinds[kind] for kind in kept.kind] == [TransferKind.ALL_GATHER, TransferKind.SEND]
    assert kept.first_rank.tolist() == [0, 0]
    assert kept.sent_bytes.tolist() == [[0, 30, 0], [0, 0, 0]]  # own rows stay; all bytes count
    assert record.wall_s.sum() > 0  # a record it is as well
    recorder.begin_step(1, 1, record=True, count_idle=False)
    recorder.enter(Stage.EXPERTS, 0)
    assert post(recorder, [1], [1], row_bytes=1) is None
    recorder.end_wait(recorder.begin_wait())
    assert recorder.end_step().operations is None


def test_a_rank_computes_with_the_core_and_waits_without(recorder, clock, token):
    begin_recorded(recorder)
    recorder.enter(Stage.DISPATCH, 0)
    number = post(recorder, [1], [1], row_bytes=1)
    assert token.done == ["acquire"]  # computing goes on while the message travels
    began = recorder.begin_wait()
    assert token.done == ["acquire", "release"]
    recorder.end_wait(began, number)
    assert token.done == ["acquire", "release", "acquire"]
    recorder.end_step()
    assert token.done == ["acquire", "release"] * 2
    recorder.begin_step(1, 1, record=True, count_idle=True)
    recorder.end_wait(recorder.begin_wait())
    recorder.end_step()
    assert len(token.done) == 4  # only while operations are recorded


@pytest.mark.parametrize("count_idle", [False, True])
def test_waiting_for_the_core_is_no_work(recorder, clock, board, token, count_idle):
    recorder.begin_step(0, 1, record=True, count_idle=False)
    recorder.end_step()
    token.delay_s = 4.0
    flags = {"record_operations": True, "record_events": True}
    recorder.begin_step(1, 1, record=True, count_idle=count_idle, **flags)
    assert not board.position(0).waiting
    began_s = clock.now_s
    recorder.enter(Stage.DISPATCH, 0)
    clock.advance(1)
    recorder.end_wait(recorder.begin_wait())
    clock.advance(2)
    record = recorder.end_step()
    idle = {(0, OUTSIDE, Stage.IDLE): 4} if count_idle else {}
    assert seconds(record.wall_s) == {(0, 0, Stage.DISPATCH): 7} | idle
    assert seconds(record.blocked_s) == {(0, 0, Stage.DISPATCH): 4} | idle
    assert record.operations.cpu_s.sum() == 1.5
    assert record.events.start_s == began_s  # what the times of events count from
    assert events(record)[0][-2:] == (0, 1)
