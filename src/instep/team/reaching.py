"""Whether somebody can be reached who does not answer any more, as soon as it is so again. No torch, and no threads.

What TCP has sent into a cut it sends again after ever longer pauses, so that a connection goes on up to as long after
the end of a cut as that has lasted. A new connection has no such past. So many are begun, one after the other, and the
first that the other end greets tells that the way is there again.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Collection

EVERY_S = 0.05
"""Seconds between two of them."""

ANSWERED_S = 0.25
"""Seconds after which one that nothing has come back to has met a cut: the other end's system answers, however busy its
processes are, and also where they are stopped."""

LONGEST_S = 2.0
"""Seconds that each has to come to something."""


class Reaching:
    """Connections to one address, which whoever listens there greets with some bytes."""

    def __init__(self, address: tuple[str, int]):
        self._address, self._family = address, socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._trying: dict[socket.socket, float] = {}  # since when
        self._begun = 0.0
        self.cut = False
        """Whether one has met a cut."""
        self.refused = False
        """Whether nobody listens there any more."""

    def sources(self) -> list[socket.socket]:
        """What to wait for, before `greeted`."""
        return list(self._trying)

    def look(self) -> None:
        """Begins the next one, when it is time to."""
        now = time.monotonic()
        for one, since in list(self._trying.items()):
            self.cut = self.cut or (now - since >= ANSWERED_S and not _answered(one))
            if now - since >= LONGEST_S:
                self._give_up(one)
        if now - self._begun < EVERY_S or any(map(_answered, self._trying)):
            return
        self._begun = now
        one = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._trying[one] = now
        self._note(one, one.connect_ex(self._address))

    def greeted(self, ready: Collection[object]) -> socket.socket | None:
        """One that the other end has greeted, if there is one; all others are given up then."""
        for one in [one for one in self._trying if one in ready]:
            self._note(one, one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            with contextlib.suppress(OSError):
                if one in self._trying and one.recv(1, socket.MSG_PEEK):
                    del self._trying[one]
                    self.close()
                    return one
            if one in self._trying:  # the other end has closed it
                self._give_up(one)
        return None

    def _note(self, one: socket.socket, error: int) -> None:
        """How a connection stands."""
        if error in (0, errno.EINPROGRESS):
            return
        self.refused = self.refused or error == errno.ECONNREFUSED
        self.cut = self.cut or error not in (0, errno.ECONNREFUSED)
        self._give_up(one)

    def _give_up(self, one: socket.socket) -> None:
        del self._trying[one]
        one.close()

    def close(self) -> None:
        """Gives all up."""
        for one in list(self._trying):
            self._give_up(one)


def _answered(one: socket.socket) -> bool:
    """Whether the other end's system has taken it."""
    with contextlib.suppress(OSError):
        one.getpeername()
        return True
    return False
