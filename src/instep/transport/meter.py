"""What this process's connections to other machines have carried, as its system counts it. Linux alone tells. No torch.

So gloo's own framing is counted too, and what the system has to send twice is not.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterable

from instep.transport.sockets import Socket, connection

_INFO_BYTES = 232
_RECEIVED, _NOT_SENT, _SENT, _SENT_AGAIN = 128, 144, 200, 208
"""Of the kernel's struct tcp_info, since Linux 4.19: its length, and where bytes are that came, that were given to the
socket and wait, that went, and of these that went again."""


class Meter:
    """Of the connections that it was told of: bytes given to them, and come over them, closed ones too."""

    counts = hasattr(socket, "TCP_INFO")
    """Whether it can count here."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begins anew, in a process that was forked."""
        self._lock = threading.Lock()
        self._open: dict[Socket, tuple[int, int]] = {}  # what each had carried at the last look
        self._sent = self._received = 0

    def watch(self, sockets: Iterable[Socket]) -> None:
        """Counts these from now on, with all that they have carried, where they lead to another machine."""
        with self._lock:
            self._open.update((one, (0, 0)) for one in sockets if _leads_elsewhere(one))

    def add(self, sent: int, received: int) -> None:
        """Counts what processes have carried that this one had started, and that have ended."""
        with self._lock:
            self._sent += sent
            self._received += received

    def look(self) -> tuple[int, int]:
        """Bytes sent and received so far. To be called before a connection is closed, or its last ones are missed."""
        with self._lock:
            for one, (sent, received) in list(self._open.items()):
                found = _carried(one)
                if found is None:
                    del self._open[one]
                    continue
                self._open[one] = found
                self._sent += found[0] - sent
                self._received += found[1] - received
            return self._sent, self._received


def _leads_elsewhere(one: Socket) -> bool:
    """To another address than its own: what stays on a machine passes by its interfaces."""
    opened = connection(one)
    if opened is None or not Meter.counts:
        return False
    with opened, contextlib.suppress(OSError):
        return bool(opened.getsockname()[0] != opened.getpeername()[0])
    return False


def _carried(one: Socket) -> tuple[int, int] | None:
    """Bytes that a connection was given and that came over it; None where it is not there any more."""
    opened = connection(one)
    if opened is None:
        return None
    with opened, contextlib.suppress(OSError, struct.error):
        info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        (received,), (waits,) = struct.unpack_from("Q", info, _RECEIVED), struct.unpack_from("I", info, _NOT_SENT)
        (sent,), (again,) = struct.unpack_from("Q", info, _SENT), struct.unpack_from("Q", info, _SENT_AGAIN)
        return sent - again + waits, received
    return None


METER = Meter()
"""This process's: descriptors are its own too."""

os.register_at_fork(after_in_child=METER.clear)
