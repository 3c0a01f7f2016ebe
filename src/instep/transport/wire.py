"""All-to-alls and messages between processes of any machines, through gloo or NCCL, that end when a process does.

Gloo's own ways to leave are of no use where an operation is on its way (torch 2.13): `abort` does nothing, and giving
the group up blocks until its time-out. What helps is to shut its connections. Then the operation raises at once, here
and at all who wait for this process. So whatever all must know is an all-to-all, of which all wait for all, and whoever
is told of a loss tells the others by leaving.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from instep.transport.group import LEFT, BrokenOff, PeerLost
from instep.transport.meter import METER
from instep.transport.posts import Post, Posts
from instep.transport.silence import Unanswered, ask_when_quiet
from instep.transport.sockets import Socket, connection, open_sockets, opened_since, send_less_at_once

LOOK = timedelta(milliseconds=20)
"""Between two looks at whether to go on waiting. A wait of gloo's that times out breaks nothing."""

KNOWN_AFTER = 8
"""All-to-alls until the connections have seen how long the way is at its best."""

FOREVER = timedelta(hours=1000)
"""The time-out of the backend's own: to be slow is no fault, and whoever started the processes sees who dies."""

AT_MOST_S = 0.1
"""Seconds for what is on its way to end once connections are shut. A message that another end had begun to take, and
takes no further, never does (gloo): after a cut, or where another process has died.
"""

_UNENDED: list[tuple[Any, list[c10d.Work], Posts]] = []

STILL_WAITING = "Operation timed out"
"""How gloo's words begin when only the wait has ended. To ask `is_completed` instead would be wrong: the operation may
end in between."""

Connect = Callable[[], c10d.Store]
"""Gives a store that all processes of a team reach; a new client each time."""


def store_at(address: str, port: int, listener: int | None = None) -> Connect:
    """Gives clients of the store there; with `listener`, a descriptor that listens there, it is served by this process,
    as long as it lives.
    """
    served = None
    if listener is not None:
        served = c10d.TCPStore(address, port, None, True, FOREVER, False, master_listen_fd=listener)
    return partial(_client, address, port, served)


def _client(address: str, port: int, _: c10d.Store | None) -> c10d.Store:
    return c10d.TCPStore(address, port, None, False, FOREVER, False)


def reached(connect: Connect, silent_s: float | None, broken_off: BrokenOff) -> Any:
    """A client of the store, which nobody may serve yet, or any more. Raises PeerLost where that refuses, as soon as it
    is broken off, and where no system has answered there for `silent_s` seconds, if any are given.
    """
    found: list[Any] = []

    def reach() -> None:
        try:
            found.append(connect())
        except RuntimeError as error:
            found.append(error)

    before, unanswered = open_sockets(), Unanswered()
    reaching = threading.Thread(target=reach, daemon=True)  # signals are heard meanwhile
    reaching.start()
    while reaching.is_alive() and not broken_off():
        reaching.join(LOOK.total_seconds())
        if silence := unanswered.for_s(silent_s, lambda: open_sockets() - before):
            address, seconds = silence
            where = f"{address or 'the host'}, where the workers meet, has answered nothing for {seconds:.1f} s"
            raise PeerLost(f"{where}: a firewall between hosts must leave all their ports open to each other", address)
    if not found or isinstance(found[0], RuntimeError):
        raise PeerLost(str(found[0]) if found else LEFT)
    return found[0]


class Wire:
    """One process's end. The processes that make it with the same `name`, in a store, find each other.

    `address` is one of this machine's that the others reach; else what its host's name resolves to. The time that the
    others take to come is unlimited. One whose system acknowledges nothing for `silent_s` seconds, if any are given, is
    lost; so are all once `broken_off` holds. A device other than the CPU takes NCCL: the same calls, on tensors of the
    device.
    """

    def __init__(
        self,
        connect: Connect,
        name: str,
        rank: int,
        size: int,
        device: torch.device,
        address: str = "",
        silent_s: float | None = None,
        broken_off: BrokenOff = lambda: False,
    ):
        self._broken_off = broken_off
        self.device, self._rank, self._size = device, rank, size
        self._silent_s, self._unanswered = silent_s, Unanswered()
        self._pending: list[c10d.Work] = []
        self._begun = 0
        self._posts = Posts()
        self._group: Any = None  # a backend of torch's, whose types its stubs don't tell
        before = open_sockets()
        made: list[Any] = []

        def join() -> None:
            try:
                made.append(_backend(c10d.PrefixStore(name, connect()), rank, size, device, address))
            except BaseException as error:
                made.append(error)

        joining = threading.Thread(target=join, daemon=True)  # signals are heard meanwhile
        joining.start()
        while joining.is_alive():
            joining.join(LOOK.total_seconds())
            if silence := self._silence(lambda: open_sockets() - before):
                made.append(silence)
                break
        self._sockets = opened_since(before)  # not those of a store here: others may be at the next group already
        group = made[0]
        if isinstance(group, BaseException):
            self.leave()
            silent = group.silent if isinstance(group, PeerLost) else ""
            raise PeerLost(f"rank {rank} of {size} could not join the others: {group}", silent) from group
        self._group = group
        METER.watch(open_sockets() - before)
        if silent_s is not None:
            ask_when_quiet(self._sockets, silent_s)

    def all_to_all(
        self, send: Tensor, lengths: Sequence[int], expected: Sequence[int], into: Tensor | None = None
    ) -> Exchange:
        """Begins to send each process its run of `send`, of so many elements; `expected`: of what each sends here.

        `send` stays as it is until the end. into: where what comes is to lie, on the wire's device.
        """
        if self._group is None:
            raise PeerLost(f"rank {self._rank} of {self._size} has left the others.")
        send = send.contiguous().to(self.device)
        found = torch.empty(sum(expected), dtype=send.dtype, device=self.device) if into is None else into
        try:
            work = self._group.alltoall_base(found, send, list(expected), list(lengths))
        except RuntimeError as error:
            raise self._lost(error) from error
        self._pending.append(work)
        self._begun += 1
        if self._begun == KNOWN_AFTER:
            send_less_at_once(self._sockets)
        return Exchange(self, work, send, found)

    def take(self, kind: int, into: Tensor, expected: Sequence[int]) -> list[Post]:
        """Awaits from each process a message of so many elements, unless that is 0; they are to lie one after the other
        in `into`. Between two processes the messages of a `kind` come in the order in which they are awaited and sent.

        On the CPU alone.
        """
        return self._post(kind, into, expected, lambda group: group.recv)

    def give(self, kind: int, send: Tensor, lengths: Sequence[int]) -> list[Post]:
        """Sends each process its run of `send`, as a message, see `take`; it stays as it is until they have ended."""
        return self._post(kind, send, lengths, lambda group: group.send)

    def _post(self, kind: int, whole: Tensor, lengths: Sequence[int], way: Callable[[Any], Any]) -> list[Post]:
        if self._group is None:
            raise PeerLost(f"rank {self._rank} of {self._size} has left the others.")
        try:
            parts = enumerate(whole.split(list(lengths)))
            return [self._posts.add(way(self._group)([part], rank, kind)) for rank, part in parts if len(part)]
        except RuntimeError as error:
            raise self._lost(error) from error

    def finish_posts(self, posts: Sequence[Post]) -> None:
        """Waits for the end of messages. Raises PeerLost."""
        for post in posts:
            while not post.ended(LOOK.total_seconds()):
                if silence := self._silence(lambda: self._sockets):
                    raise self._lost(silence) from silence
            if post.error is not None:
                raise self._lost(post.error) from post.error

    def finish(self, work: c10d.Work) -> None:
        """Waits for the end of an operation. Raises PeerLost."""
        try:
            if self.device.type == "cpu":
                while not _ended(work):
                    if silence := self._silence(lambda: self._sockets):
                        raise silence
            else:
                while not work.is_completed():
                    time.sleep(0.0002)
                work.wait()
        except (RuntimeError, PeerLost) as error:
            raise self._lost(error) from error
        self._pending.remove(work)

    def leave(self) -> None:
        """Ends it, at once, whatever is on its way."""
        group, self._group = self._group, None
        sockets, self._sockets = self._sockets, set()
        (pending, self._pending), (posts, self._posts) = (self._pending, []), (self._posts, Posts())
        METER.look()
        if group is not None and self.device.type != "cpu":
            group.abort()  # else to drop it may wait for the others
        _shut(sockets)  # operations of before that somebody still knows would keep the connections
        until = time.monotonic() + AT_MOST_S
        for work in pending:
            with contextlib.suppress(RuntimeError):
                left = timedelta(seconds=max(0.001, until - time.monotonic()))
                work.wait(left) if self.device.type == "cpu" else work.wait()
        _UNENDED[:] = [each for each in _UNENDED if not _all_ended(*each[1:])]
        if not _all_ended(pending, posts, max(0.0, until - time.monotonic())):
            _UNENDED.append((group, pending, posts))  # to drop these would wait for their end

    def _silence(self, sockets: Callable[[], set[Socket]]) -> PeerLost | None:
        """One of the others whose system does not answer any more, if there is one; or that the group is to be left."""
        if self._broken_off():
            return PeerLost(LEFT)
        found = self._unanswered.for_s(self._silent_s, sockets)
        if found is None:
            return None
        address, seconds = found
        return PeerLost(f"{address or 'one'} has acknowledged nothing for {seconds:.1f} s", address)

    def _lost(self, error: RuntimeError | PeerLost) -> PeerLost:
        _shut(self._sockets)  # so that all are told
        self.leave()
        silent = error.silent if isinstance(error, PeerLost) else ""
        return PeerLost(f"rank {self._rank} of {self._size} has lost another one: {str(error).splitlines()[0]}", silent)


class Exchange:
    """An all-to-all on its way."""

    def __init__(self, wire: Wire, work: c10d.Work, send: Tensor, found: Tensor):
        self._wire, self._work, self._send, self._found = wire, work, send, found

    def ready(self) -> bool:
        """Whether it has ended, well or not."""
        return bool(self._work.is_completed())

    def wait(self) -> Tensor:
        """What the others have sent, one after the other in rank order. Raises PeerLost."""
        self._wire.finish(self._work)
        return self._found


class Messages:
    """Messages to this process, `came` of which is where they lie, and `sent` by it."""

    def __init__(self, wire: Wire, came: Sequence[Post], sent: Sequence[Post], found: Tensor):
        self._wire, self._came, self._sent, self._found = wire, came, sent, found

    def ready(self) -> bool:
        """Whether all have come, well or not."""
        return all(post.ended() for post in self._came)

    def wait(self) -> Tensor:
        """What the others have sent, one after the other in rank order. Raises PeerLost."""
        self._wire.finish_posts(self._came)
        return self._found

    def wait_sent(self) -> None:
        """Returns when what was sent may be written again. Raises PeerLost."""
        self._wire.finish_posts(self._sent)


def _backend(store: c10d.Store, rank: int, size: int, device: torch.device, address: str) -> Any:
    """Made directly, so that nothing global is touched."""
    if device.type != "cpu":  # it was never run
        nccl: Any = c10d.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = FOREVER
        return nccl(store, rank, size, options)
    gloo: Any = c10d.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = FOREVER
    options._devices = [gloo.create_device(hostname=address) if address else gloo.create_default_device()]
    return gloo(store, rank, size, options)


def _ended(work: c10d.Work) -> bool:
    """Waits a little for an operation of gloo's; whether it has ended."""
    try:
        work.wait(LOOK)
    except RuntimeError as error:
        if STILL_WAITING not in str(error):
            raise
        return False
    return True


def _all_ended(pending: Sequence[c10d.Work], posts: Posts, within_s: float = 0.0) -> bool:
    return posts.close(within_s) and all(work.is_completed() for work in pending)


def _shut(sockets: set[Socket]) -> None:
    """Shuts the connections of gloo's among them. Not what listens: gloo would end the process."""
    for one in sockets:
        if (opened := connection(one)) is not None:
            with opened, contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
