"""Lines between the server and its workers: whole messages or none, whatever moment a process dies at."""

from __future__ import annotations

import pickle
import socket
from dataclasses import dataclass
from typing import Any

LONGEST = 1 << 17
"""Bytes of the longest message."""


class End:
    """One end of a line."""

    def __init__(self, end: socket.socket):
        self._socket = end

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """Sends a message, which can be pickled."""
        self._socket.send(pickle.dumps(message))

    def receive(self) -> Any:
        """Waits for the next message."""
        return pickle.loads(self._socket.recv(LONGEST))

    def close(self) -> None:
        """Ends it for this process."""
        self._socket.close()


@dataclass(frozen=True)
class Line:
    """A line. Both ends stay open in the supervisor, so that a worker's successor can take its end over."""

    server: End
    worker: End

    @classmethod
    def open(cls) -> Line:
        """A new line."""
        server, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(End(server), End(worker))

    def close(self) -> None:
        """Closes both ends for this process."""
        self.server.close()
        self.worker.close()
