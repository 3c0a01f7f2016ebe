"""Whether the other ends of TCP connections still acknowledge what they are sent. Linux alone tells.

A cable that is cut, one way or both, ends no connection: TCP sends again, for a quarter of an hour, and where there is
nothing to send it would never know. So systems are had to ask each other in such moments (keepalive). To be slow is
something else: a process that is stopped, or computes, takes nothing, and its system still acknowledges and answers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import socket
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from instep.transport.sockets import Socket, connection

LONGEST_LOOK_S = 1.0
"""A look counts so much at most: what was suspended itself must not blame the others when it wakes."""

QUIET_S = 1
"""Seconds in which a connection carries nothing until the system asks whether the other one is there."""

_INFO_BYTES, _PROBES, _UNACKED, _ACKED = 128, 3, 8 + 4 * 4, 120
"""Of the kernel's struct tcp_info: its length, where questions and segments are that wait for an answer, and bytes
answered."""


def ask_when_quiet(sockets: Iterable[Socket], silent_s: float) -> None:
    """Has the system ask in quiet moments whether the other ends are there, so that `Unanswered` sees who is not. Who
    has not answered for twice `silent_s` seconds has its connection broken, should nobody look.
    """
    every_s = max(1, math.ceil(silent_s / 60))  # at most 127 times
    options = {
        socket.TCP_KEEPIDLE: QUIET_S, socket.TCP_KEEPINTVL: every_s,
        socket.TCP_KEEPCNT: min(127, math.ceil(2 * silent_s / every_s)),
    }  # fmt: skip
    for one in sockets:
        if (opened := connection(one)) is not None:
            with opened, contextlib.suppress(OSError):
                for option, value in options.items():
                    opened.setsockopt(socket.IPPROTO_TCP, option, value)
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class Unanswered:
    """Of several looks at the same connections."""

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._silent: dict[Socket, tuple[int, float]] = {}  # bytes that were acknowledged, and since how long no more

    def look(self, sockets: Iterable[Socket]) -> tuple[str, float]:
        """The address of who has acknowledged nothing for longest though something waits for it, and for how many
        seconds; "" where it cannot be told, as while connecting.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, LONGEST_LOOK_S), now
        worst = "", 0.0
        for one in sockets:
            found = _waiting(one)
            if found is None:
                self._silent.pop(one, None)
                continue
            address, acked = found
            before, seconds = self._silent.get(one, (acked, 0.0))
            seconds = seconds + passed if before == acked else 0.0
            self._silent[one] = acked, seconds
            worst = max(worst, (address, seconds), key=lambda each: each[1])
        return worst

    def for_s(self, silent_s: float | None, sockets: Callable[[], Iterable[Socket]]) -> tuple[str, float] | None:
        """What `look` gives, if that is as many seconds as are given; it looks but every half a second."""
        if silent_s is None or time.monotonic() - self._looked < LONGEST_LOOK_S / 2:
            return None
        found = self.look(sockets())
        return found if found[1] >= silent_s else None


def _waiting(one: Socket) -> tuple[str, int] | None:
    """The other end of a TCP connection and how much it has acknowledged; None where it owes nothing."""
    opened = connection(one)
    if opened is None:
        return None
    with opened, contextlib.suppress(OSError, struct.error):
        info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        (unacked,), (acked,) = struct.unpack_from("I", info, _UNACKED), struct.unpack_from("Q", info, _ACKED)
        if not unacked and not info[_PROBES]:
            return None
        try:
            return _address(opened.getpeername()[0]), acked
        except OSError:  # it is not there yet
            return _called(one[1]), acked
    return None


def _called(inode: int) -> str:
    """The address that a connection is being made to."""
    for table in ("tcp", "tcp6"):  # a client of gloo's store takes IPv6 for both
        for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]:
            _, _, remote, *_, of_line = line.split()[:10]
            if of_line == str(inode):
                words = remote.partition(":")[0]
                packed = b"".join(struct.pack("=I", int(words[at : at + 8], 16)) for at in range(0, len(words), 8))
                return _address(str(ipaddress.ip_address(packed)))
    return ""


def _address(text: str) -> str:
    """One of IPv4 as such, though it stands as one of IPv6."""
    found = ipaddress.ip_address(text)
    inner = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(inner or found)
