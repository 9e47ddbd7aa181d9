import tempfile

import pytest

from expertlane.engine.comm.progress import NO_LAYER, ProgressBoard
from expertlane.spec.names import Stage


@pytest.mark.parametrize(
    ("step", "layer", "stage", "text"),
    [
        (7, 3, Stage.DISPATCH, "step 7, layer 3, stage dispatch"),
        (0, 0, Stage.EXPERTS, "step 0, layer 0, stage experts"),
        (7, NO_LAYER, Stage.HAND_OVER, "step 7, stage PP send/recv"),
        (-1, NO_LAYER, Stage.IDLE, "stage idle"),
        (57, NO_LAYER, Stage.IDLE, "step 57, stage idle"),
        (57, 3, Stage.IDLE, "step 57, layer 3, stage idle since the step ended"),
    ],
)
def test_a_position_reads_well(step, layer, stage, text):
    board = ProgressBoard(1)
    reporter = board.reporter(0)
    reporter.set_step(step)
    reporter.enter(stage, layer)
    assert str(board.position(0)) == text


@pytest.fixture
def fd():
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def test_a_board_is_shared_through_its_file(fd):
    launcher = ProgressBoard(2, fd)
    rank = ProgressBoard(2, fd).reporter(1)
    rank.set_step(4)
    rank.enter(Stage.COMBINE, 1)
    assert str(launcher.position(1)) == "step 4, layer 1, stage combine"
    assert launcher.position(0).stage is Stage.SETUP


def test_an_epoch_has_its_files_until_the_next_but_one(fd):
    server, rank = ProgressBoard(2, fd), ProgressBoard(2, fd)
    assert rank.epoch == 0
    server.begin_epoch(1, 70, 5, 6, 2)
    server.begin_epoch(2, 70, 8, -1, 3)
    assert rank.epoch == 2
    assert rank.files(2) == (70, 8, -1, 3)
    assert rank.files(1) == (70, 5, 6, 2)
    assert rank.position(0).stage is Stage.SETUP


def test_a_replacement_waits_no_more_than_the_rank_before_it():
    board = ProgressBoard(1)
    board.reporter(0).set_waiting(True)
    board.reporter(0)
    assert not board.position(0).waiting


def test_a_board_has_room_for_ranks_that_come_later(fd):
    server = ProgressBoard(5, fd)
    assert ProgressBoard(1, fd).num_lines == server.num_lines == 5
    ProgressBoard(1, fd).reporter(4).enter(Stage.EXPERTS, 7)
    assert server.position(4).layer == 7
