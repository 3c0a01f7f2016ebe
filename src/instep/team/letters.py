"""Letters between a server and a worker of another host: each a message and tensors, whole and once, in order.

They go over an authenticated link of their own, so that no sign of life of a host waits behind weights. Connections may
break: whoever sends keeps a letter until the other end is known to have it whole, and goes on with the next connection
where the last one ended. Tensors are raw bytes: who receives says where they are to lie, and refuses other sizes.
No torch.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from instep.team.messages import Hello, NoMore
from instep.team.wire_messages import LONGEST, Count, Name, WireError

PART_BYTES = 1 << 20
"""Bytes of a letter's tensors that are sent at once."""

Bytes = NDArray[np.uint8]
"""A tensor's, [nbytes]."""

Counts = Mapping[str, Count]
Places = Annotated[tuple[Count, ...], Meta(max_length=1 << 20)]
Shape = tuple[Name, tuple[Count, ...]]
"""A tensor's dtype, as numpy calls it, and shape."""


@dataclass(frozen=True)
class Standing:
    """What an end of a conversation has of it; the first message of every connection, each way.

    whole: letters that have come whole. offset: bytes of the next one's tensors that have.
    """

    worker: Count
    incarnation: Count
    whole: Count
    offset: Count


@dataclass(frozen=True)
class Begin:
    """A letter begins, or goes on after a break. got: letters of the other direction that have come whole. tensors:
    those that its parts hold.
    """

    number: Count
    got: Count
    message: Hello | Order | WeightsAgain | Contributed | TellLost | ToldLost | NoMore
    tensors: Annotated[tuple[Shape, ...], Meta(max_length=LONGEST)]


@dataclass(frozen=True)
class LetterPart:
    """Bytes of the letter's tensors."""

    number: Count
    offset: Count
    content: Annotated[bytes, Meta(max_length=PART_BYTES)]


@dataclass(frozen=True)
class Order:
    """As `instep.team.messages.Compute`. weights: "whole" where all come; "beside" where they come to another worker of
    the host; "narrow" where their change does, in the rule's format, and what goes beside it as it is; "part" where one
    fragment and that do; "same" where the worker has them. place, fill: where whole ones lie in what the host's workers
    share, see `instep.team.host_weights`. lost: what a narrow wire has lost comes last.
    """

    incarnation: Count
    piece: Count
    off: Places
    version: Count
    scale: float
    weights: Name
    place: Count
    fill: Count
    lost: bool


@dataclass(frozen=True)
class WeightsAgain:
    """The weights that are to lie in this place, for who waits for them: the worker that was sent them is gone."""

    place: Count
    fill: Count


@dataclass(frozen=True)
class Contributed:
    """As `instep.team.messages.Pushed`, with the fields of its `instep.worker.contribution.Facts`. bad: sentences."""

    incarnation: Count
    from_s: float
    to_s: float
    verified: Annotated[Mapping[str, float], Meta(max_length=64)]
    ahead: tuple[float, float] | None
    nodes: Annotated[tuple[tuple[Count, Count], ...], Meta(max_length=LONGEST)]
    counts: Counts
    sums: Mapping[str, tuple[float, ...]]
    filled: Count
    touched: Places
    posted: Places
    changed: Places
    latest: tuple[int, int]
    ends: Mapping[int, tuple[int, int]]
    made: Count
    ceased: Places
    begun: Places
    bad: Annotated[tuple[str, ...], Meta(max_length=LONGEST)]
    empty: Places
    scale: float
    overflows: Count


@dataclass(frozen=True)
class TellLost:
    """Tell what the wire had lost with the contribution from weights of this version."""

    version: Count


@dataclass(frozen=True)
class ToldLost:
    """It comes with this."""

    version: Count


FromWorker = ToWorker = Standing | Begin | LetterPart


def key_of_server(secret: bytes) -> bytes:
    """What a server and workers elsewhere know each other by; the run's secret itself stays with the agents."""
    return hmac.digest(secret, b"instep server", "sha256")


Place = Callable[[Any, Sequence[Shape]], Sequence[Bytes]]
"""Where the tensors of a letter with this message are to lie. Raises WireError where they are not as they must be."""


class Inbox:
    """The letters that come, one after the other."""

    def __init__(self, place: Place):
        self._place = place
        self.whole = 0
        """Letters that have come whole."""
        self.offset = 0
        """Bytes of the next one's tensors that have."""
        self._message: Any = None
        self._tensors: Sequence[Bytes] = ()

    def take(self, message: Begin | LetterPart) -> Any | None:
        """The message of the letter, once it has come whole. Raises WireError for what is not due."""
        if message.number != self.whole:
            raise WireError(f"a part of letter {message.number} came where {self.whole} was due")
        if isinstance(message, Begin):
            self._tensors, self._message = self._place(message.message, message.tensors), message.message
        elif self._message is None or message.offset != self.offset:
            raise WireError(f"a part from byte {message.offset} on came where {self.offset} was due")
        else:
            self._write(np.frombuffer(message.content, np.uint8))
        if self.offset < sum(map(len, self._tensors)):
            return None
        found, self._message = self._message, None
        self.whole, self.offset = self.whole + 1, 0
        return found

    def _write(self, content: Bytes) -> None:
        began = 0  # of each tensor, in the letter
        for tensor in self._tensors:
            at = self.offset - began
            if len(content) and 0 <= at < len(tensor):
                count = min(len(content), len(tensor) - at)
                tensor[at : at + count] = content[:count]
                self.offset, content = self.offset + count, content[count:]
            began += len(tensor)
        if len(content):
            raise WireError(f"a letter has {len(content)} bytes more than its tensors")


@dataclass(frozen=True)
class _Letter:
    message: Any
    shapes: tuple[Shape, ...]
    tensors: tuple[Bytes, ...]


class Bell:
    """Wakes who waits for it to be ready to read."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        for each in (self._ours, self._theirs):
            each.setblocking(False)

    def fileno(self) -> int:
        """Its descriptor."""
        return self._ours.fileno()

    def ring(self) -> None:
        """Wakes whoever waits, or will."""
        with contextlib.suppress(BlockingIOError):  # it rings already
            self._theirs.send(b"\0")

    def silence(self) -> None:
        """Until it rings again."""
        with contextlib.suppress(BlockingIOError):
            while self._ours.recv(4096):
                pass


class Outbox:
    """The letters that go. Their tensors are not to change before the other end has answered."""

    def __init__(self) -> None:
        self._letters: deque[_Letter] = deque()
        self._first = 0  # the number of the first that is kept
        self._number, self._offset, self._begun = 0, 0, False  # what goes next

    @property
    def sent(self) -> bool:
        """Whether all that was put went."""
        return self._number - self._first == len(self._letters)

    def put(self, message: Any, tensors: Sequence[NDArray[Any]] = ()) -> None:
        """One more letter."""
        shapes = tuple((tensor.dtype.name, tensor.shape) for tensor in tensors)
        flat = tuple(tensor.reshape(-1).view(np.uint8) for tensor in tensors)
        self._letters.append(_Letter(message, shapes, flat))

    def heard(self, whole: int) -> None:
        """The other end has so many letters: they are kept no longer. Raises WireError where that cannot be."""
        if not whole <= self._number:
            raise WireError(f"{whole} letters are said to have come, and {self._number} went")
        while self._first < whole:
            self._letters.popleft()
            self._first += 1

    def go_on(self, whole: int, offset: int) -> None:
        """A new connection, whose other end has so many letters and so many bytes of the next. Raises WireError."""
        if not self._first <= whole <= self._first + len(self._letters):
            raise WireError(f"the other end has {whole} letters, and number {self._first} is the first that is kept")
        self._number, self._offset, self._begun = whole, offset, False
        self.heard(whole)

    def next(self, got: int) -> Begin | LetterPart | None:
        """What goes now, if something does; `got`: letters of the other direction that have come whole."""
        place = self._number - self._first
        if place == len(self._letters):
            return None
        letter, number = self._letters[place], self._number
        total = sum(map(len, letter.tensors))
        found: Begin | LetterPart
        if not self._begun:
            self._begun = True
            found = Begin(number, got, letter.message, letter.shapes)
        else:
            found = LetterPart(number, self._offset, _bytes_of(letter.tensors, self._offset))
            self._offset += len(found.content)
        if self._offset >= total:
            self._number, self._offset, self._begun = number + 1, 0, False
        return found


def _bytes_of(tensors: Sequence[Bytes], offset: int) -> bytes:
    """Those from `offset` on, counted over all the tensors, as many as a part has."""
    found, left = list[bytes](), PART_BYTES
    for tensor in tensors:
        piece = tensor[offset : offset + left] if offset < len(tensor) else tensor[:0]
        found.append(piece.tobytes())
        offset, left = max(0, offset - len(tensor)), left - len(piece)
    return b"".join(found)


def fitting(shapes: Sequence[Shape], tensors: Sequence[NDArray[Any]]) -> list[Bytes]:
    """The bytes of these tensors, into which what comes is written. Raises WireError where that has other `shapes`."""
    wanted = [(tensor.dtype.name, tensor.shape) for tensor in tensors]
    if [tuple(shape) for shape in shapes] != wanted:
        raise WireError(f"tensors of {list(shapes)!r:.200} came where {wanted!r:.200} were due")
    return [tensor.reshape(-1).view(np.uint8) for tensor in tensors]
