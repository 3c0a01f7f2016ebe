"""Sockets of this process, which of them are TCP connections, and how much of what they send the system takes at once.
No torch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterable

SHORT_TRIP_US = 25
"""Microseconds: over a shorter way there and back, `SENT_AT_ONCE` is more than 20 Gbit/s bring, so it slows nothing."""

SENT_AT_ONCE = 1 << 16
"""Bytes, of which the system makes twice as many, to hold what it notes of them too. Measured between two namespaces:
what is sent and taken stays in the processor's cache, and an exchange takes two thirds of the processor time that it
takes with the 4 MiB that the system would come to."""

_INFO_BYTES, _SHORTEST_US = 152, 148
"""Of the kernel's struct tcp_info, since Linux 4.6: its length, and where the shortest time there and back is."""

Socket = tuple[int, int]
"""Descriptor and inode: a number alone may be another's later."""


def open_sockets() -> set[Socket]:
    """Those that are open here."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found.add((int(name), status.st_ino))
    return found


def opened_since(before: set[Socket]) -> set[Socket]:
    """Those that were not open then, but for what others have connected to one that listened already."""
    known = {port for one in before if (port := _port(one, listens=True))}
    return {one for one in open_sockets() - before if _port(one, listens=False) not in known}


def _port(one: Socket, *, listens: bool) -> int | None:
    """This end's, of one that listens over TCP, or of a connection."""
    opened = _over_tcp(one, listens=listens)
    if opened is None:
        return None
    with opened, contextlib.suppress(OSError):
        return int(opened.getsockname()[1])
    return None


def connection(one: Socket) -> socket.socket | None:
    """The connection over TCP, also in the making, by a descriptor that is to be closed; None where it is none, or
    not there any more.
    """
    return _over_tcp(one, listens=False)


def _over_tcp(one: Socket, *, listens: bool) -> socket.socket | None:
    number, inode = one
    with contextlib.suppress(OSError), contextlib.ExitStack() as failing:
        copied = os.dup(number)
        failing.callback(os.close, copied)
        if os.fstat(copied).st_ino != inode:
            return None
        found = socket.socket(fileno=copied)
        failing.pop_all()
        failing.enter_context(found)
        internet = found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
        if not internet or bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) != listens:
            return None
        failing.pop_all()
        return found
    return None


def send_less_at_once(sockets: Iterable[Socket]) -> None:
    """Has the system take less at once of what those are given whose other ends are near. It cannot be taken back."""
    for one in sockets:
        if (opened := connection(one)) is not None:
            with opened, contextlib.suppress(AttributeError, OSError, struct.error):  # Linux alone tells the time
                info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
                if struct.unpack_from("I", info, _SHORTEST_US)[0] <= SHORT_TRIP_US:
                    opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENT_AT_ONCE)
