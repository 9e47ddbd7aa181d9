"""What ranks share in an epoch, and the store in which those of one node meet."""

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from cli.screen import telling
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.torch_transport import FileStore
from expertlane.engine.comm.transport import Epoch, EpochEndedError

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no unnamed files")


@pytest.fixture
def descriptors():
    """Makes files in memory, with some bytes in them."""
    made = []

    def make(content=b""):
        made.append(os.memfd_create("test"))
        os.write(made[-1], content)
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


def opened_again(fd):
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR)


def test_a_rank_opens_the_files_of_its_epoch_alone(descriptors):
    board, memory = ProgressBoard(1), descriptors(b"memory")
    board.begin_epoch(1, os.getpid(), memory, -1, 1)
    epoch = Epoch(board, 1)
    fd = epoch.open_memory()
    assert os.pread(fd, 6, 0) == b"memory"
    os.close(fd)
    assert epoch.open_store() is None
    board.begin_epoch(2, os.getpid(), descriptors(b"later"), memory, 1)
    num_fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(EpochEndedError, match="epoch 1 has ended"):
        epoch.open_memory()
    board.begin_epoch(3, os.getpid(), 9999, 9999, 1)  # closed, and not there any more
    with pytest.raises(EpochEndedError):
        epoch.open_memory()
    assert len(os.listdir("/proc/self/fd")) == num_fds
    with pytest.raises(FileNotFoundError):  # of the latest epoch, that is no end of it
        Epoch(board, 3).open_store()


def test_ranks_meet_in_a_file(descriptors):
    fd, epoch = descriptors(), Epoch(ProgressBoard(1), 0)

    def meet(rank):
        store = FileStore(opened_again(fd), epoch)
        for key in range(50):
            store.set(f"{rank}/{key}", bytes([rank]) * key)
        return [store.get(f"{other}/{key}") for other in range(4) for key in range(50)]

    with ThreadPoolExecutor(4) as pool:
        wanted = [bytes([other]) * key for other in range(4) for key in range(50)]
        assert list(pool.map(meet, range(4))) == [wanted] * 4


def test_what_a_killed_rank_has_left_half_written_is_no_key(descriptors):
    fd, board = descriptors(), ProgressBoard(1)
    store = FileStore(opened_again(fd), Epoch(board, 0))
    store.set("key", "value")
    os.pwrite(fd, b"\x03\0\0\0\x05\0\0\0no", os.fstat(fd).st_size)
    assert store.get("key") == b"value"
    with pytest.raises(RuntimeError, match=telling("nobody set")):
        store.wait(["key", "no"], timedelta(seconds=0.01))
    board.begin_epoch(1, os.getpid(), -1, -1, 1)
    with pytest.raises(EpochEndedError):
        store.get("no")
