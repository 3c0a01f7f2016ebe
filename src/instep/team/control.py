"""The socket in a run's folder, by which the run's owner, and nobody else, asks its agent.

A question is a line of JSON, at most `QUESTION_BYTES` long, and so is the answer. Nothing is unpickled. Whoever sends
something else, or too much, or is of another user, loses the connection, and the agent no time: it waits for nobody,
and hears each caller at most every `PAUSE_S`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import stat
import struct
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from instep.recipe import MOST_WORKERS
from instep.record.files import json_text
from instep.record.folder import CONTROL

SOCKET = "socket"
"""Its name in `CONTROL`, a folder of mode 0700; it has mode 0600."""

QUESTION_BYTES = 1 << 16

CALLERS = 8
"""Connections at a time; what comes beyond that is closed."""

PAUSE_S = 0.05
"""Seconds between two looks at one caller, and, where callers were turned away, at who comes."""

PATIENCE_S = 30.0
"""Seconds that a caller may be silent, or not take its answer."""

_CREDENTIALS = struct.Struct("3i")


class AskTeam(msgspec.Struct, frozen=True, tag_field="ask", tag="team", forbid_unknown_fields=True):
    """How does the team stand?"""


class AskStacks(msgspec.Struct, frozen=True, tag_field="ask", tag="stacks", forbid_unknown_fields=True):
    """How does it stand, and what are the Python stacks of the members of these numbers? The server's comes last."""

    numbers: Annotated[list[int], msgspec.Meta(max_length=1 << 16)]


class AskWorkers(msgspec.Struct, frozen=True, tag_field="ask", tag="workers", forbid_unknown_fields=True):
    """Let the team go on with so many workers."""

    workers: Annotated[int, msgspec.Meta(ge=1, le=MOST_WORKERS)]


Question = AskTeam | AskStacks | AskWorkers


@dataclass(frozen=True)
class Asked:
    """A question, and who waits for the answer."""

    question: Question
    caller: Caller

    def answer(self, table: dict[str, Any]) -> None:
        """Sends the answer, as the caller takes it."""
        self.caller.send(table)


class Caller:
    """One connection."""

    def __init__(self, end: socket.socket):
        end.setblocking(False)
        self._socket = end
        self._read, self._waits = bytearray(), bytearray()
        self.heard_s = time.monotonic()
        """When something went over the connection last."""
        self.paused_until = 0.0
        self.closed = False

    def fileno(self) -> int:
        """Its descriptor."""
        return self._socket.fileno()

    @property
    def name(self) -> str:
        """Who it is: user and process."""
        try:
            user = pwd.getpwuid(_user(self._socket)).pw_name
        except KeyError:  # who has no name here
            user = str(_user(self._socket))
        return f"{user}, process {process_of(self._socket)}"

    @property
    def wants_write(self) -> bool:
        """Whether the answer is not taken yet."""
        return bool(self._waits)

    def receive(self) -> Question | None:
        """The question, once it is there. Raises OSError, EOFError, and where it is none what msgspec raises: its own
        errors, UnicodeDecodeError and RecursionError.
        """
        self.paused_until = time.monotonic() + PAUSE_S
        if not self.wants_write:
            with contextlib.suppress(BlockingIOError):
                content = self._socket.recv(QUESTION_BYTES + 1 - len(self._read))
                if not content:
                    raise EOFError
                self.heard_s = time.monotonic()
                self._read += content
        line, end, rest = self._read.partition(b"\n")
        if not end:
            if len(line) > QUESTION_BYTES:
                raise msgspec.ValidationError(f"a question has at most {QUESTION_BYTES:,} bytes")
            return None
        self._read = rest
        found: Question = msgspec.json.decode(bytes(line), type=Question)
        return found

    def send(self, table: dict[str, Any]) -> None:
        """Sends the answer, as far as the socket takes it now."""
        if not self.closed:
            self._waits += json_text(table).encode() + b"\n"
            with contextlib.suppress(OSError):  # it is gone, as will be seen
                self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as the socket takes it now. Raises OSError."""
        while self._waits:
            try:
                count = self._socket.send(self._waits, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:  # there is nobody to take it: the next look at it finds the end
                self._waits.clear()
                raise
            self.heard_s = time.monotonic()
            del self._waits[:count]

    def close(self) -> None:
        """Ends the connection here."""
        self.closed = True
        self._socket.close()


class Control:
    """The agent's side. run_folder: a descriptor of it. Raises OSError where the folder's disk takes no sockets."""

    def __init__(self, run_folder: int):
        self._run_folder = run_folder
        self._folder = _own_folder(run_folder)
        self._callers: list[Caller] = []
        self._paused_until = 0.0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):  # of a killed agent: who is here holds the run's lock
                os.unlink(SOCKET, dir_fd=self._folder)
            self._listener.bind(_path(self._folder))
            os.chmod(SOCKET, 0o600, dir_fd=self._folder)
            self._listener.listen(CALLERS)
            self._listener.setblocking(False)
        except OSError:
            self.close()
            raise

    @property
    def opened(self) -> list[Any]:
        """What processes that are forked close at once."""
        return [self._listener, *self._callers]

    def sources(self) -> list[Any]:
        """What to wait for, to be read."""
        now = time.monotonic()
        callers = [each for each in self._callers if each.paused_until <= now and not each.wants_write]
        return [*callers, *([self._listener] if self._paused_until <= now else [])]

    def senders(self) -> list[Caller]:
        """Who has something to be sent."""
        return [each for each in self._callers if each.wants_write]

    def hear(self, ready: Collection[Any]) -> Iterator[Asked]:
        """The questions that have come. What is none is answered with an error, and that connection closed."""
        if self._listener in ready:
            self._accept()
        now = time.monotonic()
        for caller in list(self._callers):
            try:
                if caller in ready and (question := caller.receive()) is not None:
                    yield Asked(question, caller)
                over = now - caller.heard_s > PATIENCE_S
            except (OSError, EOFError):
                over = True
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                caller.send({"error": f"that is no question that this version of Instep answers: {error}."})
                over = True
            if over:
                self._callers.remove(caller)
                caller.close()

    def _accept(self) -> None:
        for _ in range(CALLERS):
            try:
                end, _ = self._listener.accept()
            except BlockingIOError:  # nobody more
                return
            except OSError:  # no descriptor is left, say: whoever it is waits
                self._paused_until = time.monotonic() + PAUSE_S
                return
            caller = Caller(end)
            stranger = _user(end) != os.geteuid()
            if stranger:
                caller.send({"error": "the run is another user's, who alone may ask."})
            if stranger or len(self._callers) >= CALLERS:
                caller.close()
                self._paused_until = time.monotonic() + PAUSE_S
            else:
                self._callers.append(caller)

    def close(self) -> None:
        """Ends all connections, and takes the socket away."""
        for each in self.opened:
            each.close()
        self._callers.clear()
        with contextlib.suppress(OSError):
            os.unlink(SOCKET, dir_fd=self._folder)
        os.close(self._folder)
        with contextlib.suppress(OSError):
            os.rmdir(CONTROL, dir_fd=self._run_folder)


def _own_folder(run_folder: int) -> int:
    """A descriptor of the socket's folder, made if need be, open to this user alone. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(CONTROL, 0o700, dir_fd=run_folder)
    folder = os.open(CONTROL, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=run_folder)
    try:
        found = os.fstat(folder)
        if found.st_uid != os.geteuid():
            raise PermissionError("the folder of the socket is another user's")
        if stat.S_IMODE(found.st_mode) != 0o700:
            os.fchmod(folder, 0o700)
    except OSError:
        os.close(folder)
        raise
    return folder


def _path(folder: int) -> str:
    """The socket's, by way of a descriptor: the system takes no path of more than 107 bytes for one."""
    return f"/proc/self/fd/{folder}/{SOCKET}"


def _user(end: socket.socket) -> int:
    """Who is at the other end."""
    return _peer(end)[1]


def process_of(end: socket.socket) -> int:
    """The process at the other end, or the one that listened for it, by its number here."""
    return _peer(end)[0]


def _peer(end: socket.socket) -> tuple[int, ...]:
    return _CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))


def connected(folder: int) -> socket.socket:
    """A connection to the agent of the run whose socket lies in this folder, a descriptor. Raises OSError."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        end.settimeout(PATIENCE_S)
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                end.connect(_path(folder))
                return end
            except BlockingIOError:  # too many at once; with a socket of this kind no time-out waits for that
                if time.monotonic() > until:
                    raise
                time.sleep(PAUSE_S)
    except OSError:
        end.close()
        raise
