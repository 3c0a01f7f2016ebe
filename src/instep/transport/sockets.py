"""Sockets of this process, and which of them are TCP connections. No torch."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

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


def connection(one: Socket) -> socket.socket | None:
    """The connection over TCP, also in the making, by a descriptor that is to be closed; None where it is none, or
    not there any more.
    """
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
        if not internet or found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        failing.pop_all()
        return found
    return None
