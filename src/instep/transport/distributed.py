"""A group whose ranks are processes of several machines: what one machine's come to is moved to the others.

Calls are all-to-alls, barriers and `gather` too: of one that dies all are told there who were not told before. Rows, if
they are expected on a CPU, travel as messages that are awaited as soon as it is known that they will come.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from instep.reduce.levels import Shares
from instep.transport.group import (
    BrokenOff,
    Group,
    PeerLost,
    PeerRaised,
    Pending,
    Piece,
    Sizes,
    Solo,
    Waiting,
    as_bytes,
)
from instep.transport.posts import Post
from instep.transport.wire import Connect, Exchange, Messages, Wire, reached

Made = TypeVar("Made")

ROOM = 1 << 24
"""Bytes of a part of what is shared."""

KEPT = 64
"""Gathers for which memory is kept that nothing uses."""

ROWS, SUMS = 0, 1
"""Kinds of messages: what is to be added, and what it comes to."""

STORE_S = 0.5
"""Seconds to wait for an answer of the store. One whose process was stopped never gives any, whatever its time-out."""


class DistributedGroup:
    """One rank of it. The ranks that are made with the same `name`, in a store, are a group.

    `machine` is the group of this machine's ranks, of the rows that these have; with one level each rank has one of its
    own. Where device is not the CPU, rows lie there, and a level of several ranks a machine is not for it. Raises
    PeerLost once `broken_off`, and where others are not reached, as after `silent_s` without a sign of their system.
    """

    def __init__(
        self,
        connect: Connect,
        name: str,
        rank: int,
        sizes: Sizes,
        machine: Group | None = None,
        *,
        device: torch.device | str = "cpu",
        address: str = "",
        waiting: Waiting = lambda flag: None,
        silent_s: float | None = None,
        broken_off: BrokenOff = lambda: False,
    ):
        self._broken_off = broken_off
        self.rank, self.size, self.levels = rank, len(sizes.rows), sizes.levels
        self._connect, self._name, self._address, self._waiting = connect, name, address, waiting
        self._device, self._sizes, self._shares = torch.device(device), sizes, Shares(sizes.levels)
        self._at = self._shares.machine_of(rank)
        assert machine is not None or len(self._here) == 1, "a machine's ranks need a group of their own"
        self.machine: Group = machine or Solo(of_ranks(sizes, range(rank, rank + 1)), device)
        self.rows, self.common = self.machine.rows, self.machine.common
        self._counts = sizes.sums if len(sizes.levels) > 1 else sizes.rows
        """How many rows each machine sends, or each rank that has none beside it."""
        self.puts: Callable[[bool], None] = lambda begun: None
        """Is told when what others have added up of a piece begins to be put in its place, and when it is there."""
        self._helpers_elsewhere = [
            self._shares.helper(machine, rank) for machine in range(len(self._shares.machines)) if machine != self._at
        ]
        """The ranks of other machines that add the cut of this one there."""
        self._helped_elsewhere = sorted(set(self._shares.helped(rank)) - set(self._here))
        """The ranks of other machines whose cuts this one adds here."""
        self._rooms: dict[tuple[str, int, int], Tensor] = {}
        self._used, self._gathers = set[tuple[str, int, int]](), 0
        self._awaited: tuple[deque[_Awaited], deque[_Awaited]] = deque(), deque()
        """What was said to come, of each kind."""
        self._interrupted, self._silent_s = 0, silent_s
        self._store: Any = reached(connect, silent_s, broken_off)
        self._wire: Wire | None = self._join()

    def gather(self, fact: Tensor) -> Tensor:
        self._give_back()
        sent = as_bytes(fact) if fact.nbytes else torch.zeros(1, dtype=torch.uint8)  # nobody waits for nothing
        lengths = [len(sent)] * self.size
        found = self._wait(self._begin(sent.repeat(self.size), lengths, lengths)).cpu()
        return found.view(fact.dtype).view(self.size, -1) if fact.nbytes else fact.new_empty(self.size, 0)

    def meet(self) -> None:
        self._in_memory(self.machine.meet)

    def arrange(self, rows: Sequence[int], sums: Sequence[int]) -> None:
        self.machine.arrange(rows[self._here.start : self._here.stop], ())
        if self._device.type == "cpu":
            self._counts = tuple(sums if len(self.levels) > 1 else rows)

    def expect(self, pieces: Sequence[Piece], *, shared: bool) -> None:
        if self._device.type != "cpu":  # there all is by all-to-alls
            return
        self._awaited[ROWS].extend([self._take(ROWS, *self._coming(piece)) for piece in pieces])
        self._awaited[SUMS].extend([self._take(SUMS, *self._parts(piece)) for piece in pieces])

    def exchange(self, piece: Piece, sums: Sequence[Tensor] | None = None) -> Pending:
        if sums is None and len(self.levels) > 1:
            return _Here(self, self.machine.exchange([self._shares.region(piece, rank) for rank in self._here]))
        rows, first = self.rows[: self._counts[self._at]], 0
        if sums is not None:
            rows, first = list(sums), self._shares.region(piece, self.rank).start
        cuts = [slice(part.start - first, part.stop - first) for part in piece]
        lengths = [0] * self.size
        for rank in self._helped_elsewhere:
            lengths[rank] = len(rows) * (cuts[rank].stop - cuts[rank].start)
        send = self._in_one([row[cuts[rank]] for rank in self._helped_elsewhere for row in rows], "sent", piece)
        own, before = [row[cuts[self.rank]] for row in rows], sum(self._counts[: self._at])
        exchange = self._swap(ROWS, send, lengths, *self._coming(piece))
        length = cuts[self.rank].stop - cuts[self.rank].start
        return _Rows(self, exchange, own, before, sum(self._counts_elsewhere), length)

    def assemble(self, own: Tensor, piece: Piece, *, shared: bool) -> Pending:
        whole = self._put(own, piece[self.rank], shared)
        here = whole[piece[self.rank]]
        lengths = [0] * self.size
        for rank in self._helpers_elsewhere:
            lengths[rank] = len(here)
        into, expected = self._parts(piece)
        send = self._in_one([here] * len(self._helpers_elsewhere), "put", piece)
        came = into.split([expected[rank] for rank in self._helped_elsewhere])
        parts = list(zip((piece[rank] for rank in self._helped_elsewhere), came, strict=True))
        return _Whole(self, self._swap(SUMS, send, lengths, into, expected), whole, parts, shared)

    def share(self, blob: bytes, to: int | None = None) -> list[bytes]:
        sizes = self.gather(torch.tensor([len(blob)])).flatten().tolist()
        readers, reads = range(self.size) if to is None else [to], to in (None, self.rank)
        found = [bytearray() for _ in sizes]
        for start in range(0, max(sizes), ROOM):
            part = torch.from_numpy(np.frombuffer(blob[start : start + ROOM], np.uint8).copy())
            lengths = [len(part) if rank in readers else 0 for rank in range(self.size)]
            expected = [min(ROOM, max(0, size - start)) if reads else 0 for size in sizes]
            parts = self._wait(self._begin(part.repeat(len(readers)), lengths, expected)).cpu().split(expected)
            for whole, each in zip(found, parts, strict=True):
                whole.extend(each.numpy().tobytes())
        return [bytes(each) for each in found] if reads else []

    def interrupt(self) -> None:
        self._interrupted += 1
        self._asked(lambda: self._store.set(self._mark(), "raised"))  # first: by the leaving the others are told
        self.machine.interrupt()
        self._leave()

    def close(self) -> None:
        self._leave()
        self._store = None
        self.machine.close()
        self.rows, self.common, self._rooms = [], torch.empty(0), {}

    @property
    def _here(self) -> range:
        return self._shares.machines[self._at]

    def _join(self) -> Wire:
        name = f"{self._name}/{self._interrupted}"
        return Wire(
            self._connect, name, self.rank, self.size, self._device, self._address, self._silent_s, self._broken_off
        )

    @property
    def _counts_elsewhere(self) -> list[int]:
        return [count for machine, count in enumerate(self._counts) if machine != self._at]

    def _coming(self, piece: Piece) -> tuple[Tensor, list[int]]:
        """Where the rows of others are to lie in an exchange, and how many elements each sends."""
        length, expected = piece[self.rank].stop - piece[self.rank].start, [0] * self.size
        for helper, count in zip(self._helpers_elsewhere, self._counts_elsewhere, strict=True):
            expected[helper] = count * length
        return self._room("came", piece, sum(expected)), expected

    def _parts(self, piece: Piece) -> tuple[Tensor, list[int]]:
        """Where the sums of others come, and how many elements each sends. Not where they are to lie: that is a row,
        which is needed if they never come whole."""
        expected = [0] * self.size
        for rank in self._helped_elsewhere:
            expected[rank] = piece[rank].stop - piece[rank].start
        return self._room("parts", piece, sum(expected)), expected

    def _take(self, kind: int, into: Tensor, expected: list[int]) -> _Awaited:
        return _Awaited(into, self._on_wire(lambda wire: wire.take(kind, into, expected)))

    def _swap(
        self, kind: int, send: Tensor, lengths: list[int], into: Tensor, expected: list[int]
    ) -> Exchange | Messages:
        """Begins to send each rank its run of `send`, of so many elements, and to take what all send here."""
        if not self._awaited[kind]:
            return self._begin(send, lengths, expected, into)
        awaited = self._awaited[kind].popleft()
        assert not len(into) or awaited.into.data_ptr() == into.data_ptr(), "pieces come in another order than expected"
        return self._on_wire(lambda wire: Messages(wire, awaited.came, wire.give(kind, send, lengths), into))

    def _begin(
        self, send: Tensor, lengths: Sequence[int], expected: Sequence[int], into: Tensor | None = None
    ) -> Exchange:
        return self._on_wire(lambda wire: wire.all_to_all(send, lengths, expected, into))

    def _on_wire(self, begin: Callable[[Wire], Made]) -> Made:
        try:
            if self._wire is None:  # since an interrupt
                self._wire = self._join()
            return begin(self._wire)
        except PeerLost as lost:
            raise self._told(lost) from lost

    def _wait(self, exchange: Exchange | Messages) -> Tensor:
        return self._waited(exchange.wait)

    def _waited(self, wait: Callable[[], Made]) -> Made:
        self._waiting(True)
        try:
            return wait()
        except PeerLost as lost:
            raise self._told(lost) from lost
        finally:
            self._waiting(False)

    def _in_memory(self, call: Callable[[], Made]) -> Made:
        """What a call of the machine's group gives. There a rank that has raised and one that has lost others are
        told alike."""
        try:
            return call()
        except PeerRaised as told:
            raise self._told(PeerLost("a worker of this machine has lost another one")) from told

    def _told(self, lost: PeerLost) -> Exception:
        """What has happened: one that raised has said so before it left. Who waits in memory is told of a loss here."""
        raised = self._asked(lambda: self._store.check([self._mark(self._interrupted + 1)]))
        if raised:
            return PeerRaised("another worker has raised.")
        self.machine.interrupt()
        return lost

    def _mark(self, count: int | None = None) -> str:
        return f"{self._name}/interrupts/{count or self._interrupted}"

    def _asked(self, question: Callable[[], Any]) -> Any:
        """The store's answer, or None if it gives none in time."""
        found: list[Any] = []

        def ask() -> None:
            found.append(question())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(STORE_S)
        return found[0] if found else None

    def _put(self, part: Tensor, into: slice, shared: bool) -> Tensor:
        (whole,) = self.machine.assemble(part, [into] * len(self._here), shared=shared).wait()
        return whole

    def _in_one(self, parts: Sequence[Tensor], use: str, piece: Piece) -> Tensor:
        """These one after the other; a copy only where there are several."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return self.rows[0][:0]
        return torch.cat(list(parts), out=self._room(use, piece, sum(map(len, parts))))

    def _room(self, use: str, piece: Piece, length: int) -> Tensor:
        """Memory for what is on its way in a piece. It is kept: the pages of new one take longer than the copying."""
        key = use, min(cut.start for cut in piece), length
        if key not in self._rooms:
            self._rooms[key] = self.rows[0].new_empty(length)
        self._used.add(key)
        return self._rooms[key]

    def _give_back(self) -> None:
        """Rooms that no piece has needed of late, now that they are others."""
        self._gathers += 1
        if self._gathers % KEPT == 0:
            self._rooms = {key: room for key, room in self._rooms.items() if key in self._used}
            self._used = set()

    def _leave(self) -> None:
        wire, self._wire = self._wire, None
        self._awaited = deque(), deque()
        if wire is not None:
            wire.leave()


class _Awaited(NamedTuple):
    """Messages that lie in `into` once they have come."""

    into: Tensor
    came: list[Post]


class _Here:
    """A Pending of the machine's group."""

    def __init__(self, group: DistributedGroup, pending: Pending):
        self._group, self._pending, self.home = group, pending, pending.home

    def ready(self) -> bool:
        return self._pending.ready()

    def wait(self) -> list[Tensor]:
        return self._group._in_memory(self._pending.wait)


class _Rows:
    """A Pending of an all-to-all. The machine's `own` rows come after those of so many others' that lie `before`."""

    def __init__(
        self,
        group: DistributedGroup,
        exchange: Exchange | Messages,
        own: list[Tensor],
        before: int,
        others: int,
        length: int,
    ):
        self._group, self._exchange, self._own = group, exchange, own
        self.home, self._shape = before, (others, length)

    def ready(self) -> bool:
        return self._exchange.ready()

    def wait(self) -> list[Tensor]:
        came = list(self._group._wait(self._exchange).view(self._shape))
        return [*came[: self.home], *self._own, *came[self.home :]]


class _Whole:
    """A Pending of the sums that other machines send; `parts`: where each belongs, and where it comes."""

    home = 0

    def __init__(
        self,
        group: DistributedGroup,
        exchange: Exchange | Messages,
        whole: Tensor,
        parts: list[tuple[slice, Tensor]],
        shared: bool,
    ):
        self._group, self._exchange, self._whole = group, exchange, whole
        self._parts, self._shared = parts, shared

    def ready(self) -> bool:
        return self._exchange.ready()

    def wait(self) -> list[Tensor]:
        self._group._wait(self._exchange)
        self._group.puts(True)
        for place, part in self._parts:
            self._group._put(part, place, self._shared)
        self._group.puts(False)
        if isinstance(self._exchange, Messages):
            self._group._waited(self._exchange.wait_sent)
        return [self._whole]


def of_ranks(sizes: Sizes, ranks: range) -> Sizes:
    """Those of a group that these ranks, a machine's, are by themselves."""
    rows = sizes.rows[ranks.start : ranks.stop]
    return dataclasses.replace(sizes, levels=((range(len(ranks)),),), rows=rows, sums=())
