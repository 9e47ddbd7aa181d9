"""Hosts the store in which the ranks of several nodes meet, in a process of its own.

The store's thread looks up the name of every host that connects. A rank that is forked from the
process with that thread, at such a moment, finds glibc's resolver locked for ever.
"""

import contextlib
import os
import socket
from typing import NoReturn

from expertlane.engine.ranks.rendezvous import Meeting

_IS_UP, _MOST_BYTES = b"up", 4096


class StoreHost:
    """Ends with this process, and with those that it forks thereafter.

    Raises:
        RuntimeError: the store cannot be hosted.
    """

    def __init__(self, meeting: Meeting) -> None:
        self._connection, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            _host(meeting, theirs)
        theirs.close()
        answer = self._connection.recv(_MOST_BYTES)
        if answer != _IS_UP:
            raise RuntimeError(answer.decode(errors="replace") or "the host of the store has ended")

    def end(self) -> None:
        """End it, once nothing that was forked from here runs any more."""
        self._connection.close()
        with contextlib.suppress(ChildProcessError):  # somebody has seen it end already
            os.waitpid(self._pid, 0)


def _host(meeting: Meeting, connection: socket.socket) -> NoReturn:
    """Until the other end of the connection is closed."""
    try:
        os.setpgid(0, 0)  # torchrun signals its process's group: it is for the server alone
        os.closerange(3, connection.fileno())  # a launcher waits for the end of those
        os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        try:
            store = meeting.open(as_host=True)
            connection.sendall(_IS_UP)
        except RuntimeError as error:
            connection.sendall(str(error).splitlines()[0].encode()[:_MOST_BYTES])
        connection.recv(1)
        del store
    finally:
        os._exit(0)
