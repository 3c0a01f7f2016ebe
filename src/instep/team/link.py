"""An authenticated connection between agent 0 and another agent: whole messages, or none. No torch, and no threads.

Before anything else is read each end shows that it knows the run's secret, by an HMAC over what both have drawn. Every
frame then has its length, its number, how many have come the other way, and an HMAC of all of it, by a key of this
connection and this direction: what is torn, repeated, out of turn or another's ends the connection, and nothing of it
is decoded. A link that keeps what has not come to the other end yet can go on over another connection, with all of it.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from instep.team.link_proofs import digest_of, exactly, keys_of, tag_of
from instep.team.waiting import ready_of
from instep.team.wire_format import MESSAGE_BYTES, decode, encode
from instep.team.wire_messages import FromAgent0, ToAgent0, WireError
from instep.transport.meter import METER

MAGIC = b"instep 1"
"""What both ends begin with: of another version nothing is understood."""

SHAKE_S = 5.0
"""Seconds that a stranger has to show that it knows the secret."""

SHAKING = 64
"""Connections at most that have not shown it yet; the oldest of more is closed."""

WAITING_BYTES = 64 << 20
"""Bytes at most that wait to be sent: whoever takes less counts as lost."""

AHEAD_BYTES = 8 << 20
"""Bytes of what is kept at which a link is full; and, of a quarter of it, the other end says that they have come."""

SINGLY = 20
"""Refusals that are noted each by itself; of later ones, those whose count is a power of two."""

_NONCE = 32
_PROOF = 32
_GREETING = len(MAGIC) + _NONCE
_HEAD = struct.Struct("<QQQ16s")  # length, number, how many have come the other way, tag
_READ, _READS = 1 << 18, 16
"""Bytes of a read, and reads at a time: whoever sends without end keeps nobody else waiting."""


def connect(address: tuple[str, int], secret: bytes, within_s: float, union: Any = FromAgent0) -> AgentLink:
    """A link to agent 0, in at most so many seconds; or to its server, whose messages are others. Raises OSError where
    nobody answers, such as a TimeoutError, and WireError where it is somebody else who does.
    """
    until = time.monotonic() + within_s
    return shaken(socket.create_connection(address, max(within_s, 0.001)), address, secret, until, union)


def shaken(
    connection: socket.socket, address: tuple[str, int], secret: bytes, until: float, union: Any = FromAgent0
) -> AgentLink:
    """A link over a connection to this address, until then on the monotonic clock. Raises as `connect`."""
    try:
        greeting = exactly(connection, _GREETING, until)
        if not greeting.startswith(MAGIC):
            raise WireError(f"what listens at {address[0]}, port {address[1]}, is no agent 0 of this version of Instep")
        theirs, own = greeting[len(MAGIC) :], os.urandom(_NONCE)
        connection.settimeout(max(until - time.monotonic(), 0.001))
        connection.sendall(MAGIC + own + digest_of(secret, b"agent", theirs, own))
        try:
            proof = exactly(connection, _PROOF, until)
        except EOFError:
            raise WireError(f"agent 0 at {address[0]}, port {address[1]}, has another secret") from None
        if not hmac.compare_digest(proof, digest_of(secret, b"agent 0", theirs, own)):
            raise WireError(f"what listens at {address[0]}, port {address[1]}, does not know the run's secret")
        return AgentLink(connection, union, *keys_of(secret, theirs, own, (b"to agent 0", b"from agent 0")))
    except EOFError as error:
        connection.close()
        raise WireError(f"what listens at {address[0]}, port {address[1]}, has closed the connection") from error
    except BaseException:
        connection.close()
        raise


class AgentLink:
    """One end. `union`: the messages that may come. What is sent or comes is signed with its direction's key."""

    def __init__(self, connection: socket.socket, union: Any, sending: bytes, receiving: bytes):
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # no TCP, in a test
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        METER.watch([(connection.fileno(), os.fstat(connection.fileno()).st_ino)])
        self._socket, self._union = connection, union
        self._sending, self._receiving = sending, receiving
        self._sent = self.came = 0
        """Frames."""
        self._kept: deque[bytes] | None = None  # the last ones sent, of which it is not known that they have come
        self._kept_bytes = self._unsaid = 0  # unsaid: bytes that have come since the other end was told of any
        self._waits: deque[memoryview] = deque()
        self._waiting = 0
        self._read = bytearray()
        self.holds = False
        """Whether it was read what the next `receive` is to give: the socket may have no more."""

    def fileno(self) -> int:
        """Its descriptor."""
        return self._socket.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether something waits for the socket to take it."""
        return bool(self._waits) and self.fileno() >= 0

    @property
    def full(self) -> bool:
        """Whether what can wait is better not sent now."""
        return self.wants_write or self._kept_bytes >= AHEAD_BYTES

    def keep(self) -> None:
        """Keeps from now on what is sent until it has come, so that the link can `go_on`. To be called at both ends."""
        self._kept = deque()

    def go_on(self, other: AgentLink, came: int) -> None:
        """Goes on over the connection of `other`, which is of no use by itself then. So many of the frames sent here
        have come; those after them are sent again. Raises WireError where they are not here any more.
        """
        kept = self._kept if self._kept is not None else deque[bytes]()
        if not self.can_go_on(came):
            raise WireError(f"{came} messages are said to have come of {self._sent}, of which {len(kept)} are kept")
        self.close()
        self._socket, self._read, self.holds = other._socket, other._read, other.holds
        self._sending, self._receiving = other._sending, other._receiving
        self._waits, self._waiting = other._waits, other._waiting
        self._gone(came)
        for number, content in enumerate(kept, came):
            self._put(number, content)
        with contextlib.suppress(OSError):  # the next `receive` finds the end
            self.flush()

    def can_go_on(self, came: int) -> bool:
        """Whether those after so many are here still. They are not where this was said before what is known now."""
        return 0 <= self._sent - came <= len(self._kept or ())

    def _gone(self, came: int) -> None:
        """The other end has said that so many have come."""
        while self._kept and self._sent - len(self._kept) < came:
            self._kept_bytes -= len(self._kept.popleft())

    def send(self, message: Any) -> None:
        """Sends it, as far as the socket takes it now. Raises OSError where the other end is gone, and WireError where
        too much waits already or the message is too long.
        """
        content = encode(message)
        if (waiting := max(self._waiting, self._kept_bytes)) + len(content) > WAITING_BYTES:
            raise WireError(f"the other end has not taken {waiting:,} bytes that wait for it")
        self._send(content)
        self.flush()

    def _send(self, content: bytes) -> None:
        if self._kept is not None:
            self._kept.append(content)
            self._kept_bytes += len(content)
        self._sent += 1
        self._put(self._sent - 1, content)

    def _put(self, number: int, content: bytes) -> None:
        head = _HEAD.pack(len(content), number, self.came, tag_of(self._sending, number, self.came, content))
        self._waits += (memoryview(head), memoryview(content))
        self._waiting += len(head) + len(content)
        self._unsaid = 0

    def flush(self) -> None:
        """Sends what waits, as far as the socket takes it now. Raises OSError where the other end is gone."""
        while self._waits:
            if not self._waits[0]:
                self._waits.popleft()
                continue
            try:
                count = self._socket.send(self._waits[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            self._waiting -= count
            if count == len(self._waits[0]):
                self._waits.popleft()
            else:
                self._waits[0] = self._waits[0][count:]

    def ask(self, message: Any, within_s: float) -> Any:
        """Sends it, and waits so long for the first message that comes; others stay for `receive`. Raises TimeoutError,
        and what `send` and `receive` raise.
        """
        self.send(message)
        until = time.monotonic() + within_s
        while (left := until - time.monotonic()) > 0:
            ready_of([self], [self] if self.wants_write else [], left)
            for answer in self.receive(1):
                return answer
        raise TimeoutError("no answer in time")

    def receive(self, most: int = sys.maxsize) -> list[Any]:
        """The messages that have come whole, without waiting; so many at `most`. Raises EOFError where the other end is
        gone, once all that came before was given; OSError where the connection broke; WireError for anything that is no
        message.
        """
        found: list[Any] = []
        self._take(found, most)
        for _ in range(_READS):
            if self.holds:
                break
            try:
                part = self._socket.recv(_READ)
            except BlockingIOError:
                break
            except OSError:
                if found:
                    break  # the next call finds the end
                raise
            if not part:
                if found:
                    break
                raise EOFError(f"the connection has ended{' in the middle of a message' if self._read else ''}")
            self._read += part
            self._take(found, most)
        if self._kept is not None and self._unsaid >= AHEAD_BYTES // 4:
            self._send(b"")
            with contextlib.suppress(OSError):  # the next call finds the end
                self.flush()
        return found

    def _take(self, found: list[Any], most: int) -> None:
        """Moves what is whole from what was read to `found`."""
        at, self.holds = 0, False
        try:
            while len(self._read) - at >= _HEAD.size:
                if len(found) >= most:
                    self.holds = True
                    return
                length, number, came, tag = _HEAD.unpack_from(self._read, at)
                if length > MESSAGE_BYTES:
                    raise WireError(f"a message of {length:,} bytes was announced; at most {MESSAGE_BYTES:,} may come")
                if number != self.came:
                    raise WireError(f"message {number} came where {self.came} was due")
                end = at + _HEAD.size + length
                if len(self._read) < end:
                    return
                content = bytes(memoryview(self._read)[at + _HEAD.size : end])
                if not hmac.compare_digest(tag, tag_of(self._receiving, number, came, content)):
                    raise WireError("a message is not as it was sent, or another's")
                if content or self._kept is None:  # else it but says what has come
                    found.append(decode(content, self._union))
                self._gone(came)
                self.came += 1
                self._unsaid += length
                at = end
        finally:
            del self._read[:at]

    def close(self) -> None:
        """Closes it for this process: one that was forked may hold it still."""
        METER.look()
        self._socket.close()


class Listener:
    """Where agent 0, or its server, waits for the others, at one address alone; port 0 for any. Raises OSError.

    where: the address, or a socket that listens already. `note` is given a sentence on those who are turned away; by
    default it is printed on stderr. union: the messages that may come.
    """

    def __init__(
        self,
        where: tuple[str, int] | socket.socket,
        secret: bytes,
        note: Callable[[str], None] | None = None,
        union: Any = ToAgent0,
    ):
        self._socket = where if isinstance(where, socket.socket) else listening_at(where)
        self._socket.setblocking(False)
        self._secret, self._note, self._union = secret, note or _print, union
        self._shaking: list[_Stranger] = []
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        """With the port that it has got."""
        self.refused = 0
        """Connections of those who did not show that they know the secret."""
        self.knows: Callable[[str], bool] = lambda address: False
        """Whether from this address somebody may come to see whether this end is there, and go without a word."""

    def fileno(self) -> int:
        """Its descriptor."""
        return self._socket.fileno()

    def sources(self) -> list[Any]:
        """What to wait for before the next `accept`."""
        return [self, *self._shaking]

    def accept(self) -> list[AgentLink]:
        """Links to those who have shown that they know the secret, without waiting for anybody."""
        for _ in range(4 * SHAKING):
            try:
                connection, peer = self._socket.accept()
            except BlockingIOError:
                break
            except OSError:  # it is gone again, or there are too many files: those who wait go first
                break
            self._shaking.append(_Stranger(connection, peer))
            if len(self._shaking) > SHAKING:
                self._refuse(self._shaking[0], "too many others came before it said who it is")
        found = []
        for stranger in list(self._shaking):
            try:
                if (link := stranger.shaken(self._secret, self._union)) is not None:
                    found.append(link)
                    self._shaking.remove(stranger)
            except EOFError as error:
                if stranger.silent and self.knows(stranger.address):
                    self._shaking.remove(stranger)
                    stranger.close()
                else:
                    self._refuse(stranger, str(error))
            except OSError as error:
                self._refuse(stranger, str(error))
        return found

    def _refuse(self, stranger: _Stranger, why: str) -> None:
        self._shaking.remove(stranger)
        stranger.close()
        self.refused += 1
        if self.refused <= SINGLY or not self.refused & (self.refused - 1):
            self._note(f"{stranger.peer} was turned away, {self.refused} so far: {why}.")

    def close(self) -> None:
        """Closes it, and all connections that have come to nothing yet, for this process."""
        for stranger in self._shaking:
            stranger.close()
        self._shaking.clear()
        self._socket.close()


def listening_at(address: tuple[str, int], backlog: int = 256) -> socket.socket:
    """A socket that listens at this address alone; port 0 for any. Raises OSError."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    return socket.create_server(address, family=family, backlog=backlog)


def _print(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


class _Stranger:
    """A connection of somebody who has not shown yet that it knows the secret."""

    def __init__(self, connection: socket.socket, peer: tuple[Any, ...]):
        connection.setblocking(False)
        self._socket, self.address, self.peer = connection, str(peer[0]), f"{peer[0]}, port {peer[1]}"
        self._until = time.monotonic() + SHAKE_S
        self._own, self._read = os.urandom(_NONCE), b""
        with contextlib.suppress(OSError):  # it is gone: the next look tells
            self._socket.send(MAGIC + self._own, socket.MSG_NOSIGNAL)  # a new connection takes so much

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def silent(self) -> bool:
        """Whether it has said nothing."""
        return not self._read

    def shaken(self, secret: bytes, union: Any) -> AgentLink | None:
        """The link, once it has shown that it knows the secret. Raises OSError where it never will, and EOFError."""
        wanted = _GREETING + _PROOF
        if time.monotonic() >= self._until:
            raise WireError(f"it did not say who it is within {SHAKE_S:g} s")
        try:
            part = self._socket.recv(wanted - len(self._read))
        except BlockingIOError:
            return None
        self._read += part
        if not part:
            raise EOFError("it has closed the connection")
        if not self._read.startswith(MAGIC[: len(self._read)]):
            raise WireError("it is no agent of this version of Instep")
        if len(self._read) < wanted:
            return None
        theirs, proof = self._read[len(MAGIC) : _GREETING], self._read[_GREETING:]
        if not hmac.compare_digest(proof, digest_of(secret, b"agent", self._own, theirs)):
            raise WireError("it does not know the run's secret")
        self._socket.send(digest_of(secret, b"agent 0", self._own, theirs), socket.MSG_NOSIGNAL)
        keys = keys_of(secret, self._own, theirs, (b"from agent 0", b"to agent 0"))
        return AgentLink(self._socket, union, *keys)

    def close(self) -> None:
        self._socket.close()
