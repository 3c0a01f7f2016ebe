"""What two ends of a link show each other: that they know the run's secret, and that a frame is theirs. No torch."""

from __future__ import annotations

import hmac
import socket
import struct
import time


def digest_of(secret: bytes, role: bytes, of_agent_0: bytes, of_agent: bytes) -> bytes:
    """That the one in this role knows the secret, for what both have drawn."""
    return hmac.digest(secret, b"instep " + role + b"\0" + of_agent_0 + of_agent, "sha256")


def keys_of(secret: bytes, of_agent_0: bytes, of_agent: bytes, directions: tuple[bytes, bytes]) -> list[bytes]:
    """Of this connection alone, for what is sent and for what comes."""
    return [digest_of(secret, direction, of_agent_0, of_agent) for direction in directions]


def tag_of(key: bytes, number: int, came: int, content: bytes) -> bytes:
    """That a frame of this number and content is as its sender made it, to whom so many had come."""
    return hmac.digest(key, struct.pack("<QQQ", number, came, len(content)) + content, "sha256")[:16]


def exactly(connection: socket.socket, count: int, until: float) -> bytes:
    """So many bytes. Raises EOFError where it ends before, and TimeoutError."""
    found = b""
    while len(found) < count:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        connection.settimeout(left)
        part = connection.recv(count - len(found))
        if not part:
            raise EOFError("the connection has ended")
        found += part
    return found
