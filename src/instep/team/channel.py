"""Channels between two processes of one machine: whole messages or none, whatever moment a process dies at."""

from __future__ import annotations

import contextlib
import pickle
import socket
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from instep.memory_file import memory_file

PACKET_BYTES = 1 << 16
"""Above that a message goes as a file of memory, whose descriptor is sent: a packet arrives whole, or not at all."""


class Channel:
    """One end. Several processes may hold it, but only one at a time sends, and one receives.

    What crosses is what can be pickled. For `multiprocessing.connection.wait` it is ready once there is a message, or
    nobody holds the other end any more.
    """

    def __init__(self, end: socket.socket):
        self._socket = end

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Both ends of a new one. Raises OSError."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    @classmethod
    def of(cls, descriptor: int) -> Channel:
        """The end that this process was started with, under this number."""
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        """Its descriptor."""
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """Sends it. Raises OSError where nobody holds the other end any more, and what pickling raises."""
        content = pickle.dumps(message)
        if len(content) <= PACKET_BYTES:
            self._socket.send(content)
            return
        with open(memory_file(), "w+b") as file:
            file.write(content)
            file.flush()
            socket.send_fds(self._socket, [_IN_A_FILE], [file.fileno()])

    def recv(self) -> Any:
        """Waits for the next message. Raises EOFError, or OSError, where none can come any more."""
        try:
            content, descriptors, _, _ = socket.recv_fds(self._socket, PACKET_BYTES, 1)
        except ConnectionResetError:  # once, where the other one has closed its end with something unread there
            content, descriptors, _, _ = socket.recv_fds(self._socket, PACKET_BYTES, 1)
        if not content:
            raise EOFError("nobody holds the other end any more")
        if descriptors:
            with open(descriptors[0], "rb") as file:
                file.seek(0)
                return pickle.load(file)
        return pickle.loads(content)

    def poll(self, within_s: float = 0.0) -> bool:
        """Waits so long for the channel to be ready; whether it is."""
        sources: list[Any] = [self]
        return bool(wait(sources, within_s))

    def hang_up(self) -> None:
        """Ends it for all who hold either end: they find no message any more that has not arrived yet."""
        with contextlib.suppress(OSError):  # the other end is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends it for this process."""
        self._socket.close()


_IN_A_FILE = b"\0"
"""The content of a packet with a descriptor, which no pickle is."""


@dataclass(frozen=True)
class Line:
    """A channel between the server and a worker. Both ends stay open in the supervisor, so that a worker's successor
    can take its end over.
    """

    server: Channel
    worker: Channel

    @classmethod
    def open(cls) -> Line:
        """A new line. Raises OSError."""
        return cls(*Channel.pair())

    def close(self) -> None:
        """Closes both ends for this process."""
        self.server.close()
        self.worker.close()
