"""A group whose ranks are processes of several machines: what one machine's come to is moved to the others.

Every call is made of all-to-alls, `gather` and barriers too: of one that dies, all who wait are told.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instep.reduce.levels import Shares
from instep.transport.group import Group, PeerLost, PeerRaised, Pending, Piece, Sizes, Solo, Waiting, as_bytes
from instep.transport.wire import Connect, Exchange, Wire

ROOM = 1 << 24
"""Bytes of a part of what is shared."""

STORE_S = 0.5
"""Seconds to wait for an answer of the store. One whose process was stopped never gives any, whatever its time-out."""


class DistributedGroup:
    """One rank of it. The ranks that are made with the same `name`, in a store, are a group.

    `machine` is the group of this machine's ranks, of the rows that these have; with one level each rank has one of its
    own. Where device is not the CPU, rows lie there, and a level of several ranks a machine is not for it. Raises
    PeerLost where the others cannot be reached, as after `silent_s` without a sign of another's system.
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
    ):
        self.rank, self.size, self.levels = rank, len(sizes.rows), sizes.levels
        self._connect, self._name, self._address, self._waiting = connect, name, address, waiting
        self._device, self._sizes, self._shares = torch.device(device), sizes, Shares(sizes.levels)
        self._at = self._shares.machine_of(rank)
        assert machine is not None or len(self._here) == 1, "a machine's ranks need a group of their own"
        self._machine: Group = machine or Solo(of_ranks(sizes, range(rank, rank + 1)), device)
        self.rows, self.common = self._machine.rows, self._machine.common
        self._interrupted, self._silent_s = 0, silent_s
        self._store: Any = connect()
        self._wire: Wire | None = self._join()

    def gather(self, fact: Tensor) -> Tensor:
        sent = as_bytes(fact) if fact.nbytes else torch.zeros(1, dtype=torch.uint8)  # nobody waits for nothing
        lengths = [len(sent)] * self.size
        found = self._wait(self._begin(sent.repeat(self.size), lengths, lengths)).cpu()
        return found.view(fact.dtype).view(self.size, -1) if fact.nbytes else fact.new_empty(self.size, 0)

    def exchange(self, piece: Piece, sums: Sequence[Tensor] | None = None) -> Pending:
        if sums is None and len(self.levels) > 1:
            return self._machine.exchange([self._shares.region(piece, rank) for rank in self._here])
        rows, first, counts = self.rows, 0, self._sizes.rows
        if sums is not None:
            rows, first, counts = list(sums), self._shares.region(piece, self.rank).start, self._sizes.sums
        cuts = [slice(part.start - first, part.stop - first) for part in piece]
        to = set(self._shares.helped(self.rank))
        send = torch.cat([row[cuts[rank]] for rank in sorted(to) for row in rows])
        lengths = [len(rows) * (cut.stop - cut.start) if rank in to else 0 for rank, cut in enumerate(cuts)]
        length = piece[self.rank].stop - piece[self.rank].start
        expected = [0] * self.size
        for machine, count in enumerate(counts):
            expected[self._shares.helper(machine, self.rank)] = count * length
        return _Rows(self, self._begin(send, lengths, expected), sum(counts), length)

    def assemble(self, own: Tensor, piece: Piece, *, shared: bool) -> Tensor:
        machines = [machine for machine in range(len(self._shares.machines)) if machine != self._at]
        to = {self._shares.helper(machine, self.rank) for machine in machines}
        lengths = [len(own) if rank in to else 0 for rank in range(self.size)]
        helped = set(self._shares.helped(self.rank)) - set(self._here)
        expected = [cut.stop - cut.start if rank in helped else 0 for rank, cut in enumerate(piece)]
        whole = self._put(own, piece[self.rank], shared)
        parts = self._wait(self._begin(own.repeat(len(to)), lengths, expected)).split(expected)
        for rank in helped:
            self._put(parts[rank], piece[rank], shared)
        return whole

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
        self._leave()

    def close(self) -> None:
        self._leave()
        self._store = None
        self._machine.close()
        self.rows, self.common = [], torch.empty(0)

    @property
    def _here(self) -> range:
        return self._shares.machines[self._at]

    def _join(self) -> Wire:
        name = f"{self._name}/{self._interrupted}"
        return Wire(self._connect, name, self.rank, self.size, self._device, self._address, self._silent_s)

    def _begin(self, send: Tensor, lengths: Sequence[int], expected: Sequence[int]) -> Exchange:
        try:
            if self._wire is None:  # since an interrupt
                self._wire = self._join()
            return self._wire.all_to_all(send, lengths, expected)
        except PeerLost as lost:
            raise self._told(lost) from lost

    def _wait(self, exchange: Exchange) -> Tensor:
        self._waiting(True)
        try:
            return exchange.wait()
        except PeerLost as lost:
            raise self._told(lost) from lost
        finally:
            self._waiting(False)

    def _told(self, lost: PeerLost) -> Exception:
        """What has happened: one that raised has said so before it left."""
        raised = self._asked(lambda: self._store.check([self._mark(self._interrupted + 1)]))
        return PeerRaised("another worker has raised.") if raised else lost

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
        return self._machine.assemble(part, [into] * len(self._here), shared=shared)

    def _leave(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.leave()


class _Rows:
    """A Pending of an all-to-all."""

    def __init__(self, group: DistributedGroup, exchange: Exchange, count: int, length: int):
        self._group, self._exchange, self._count, self._length = group, exchange, count, length

    def wait(self) -> list[Tensor]:
        return list(self._group._wait(self._exchange).view(self._count, self._length))


def of_ranks(sizes: Sizes, ranks: range) -> Sizes:
    """Those of a group that these ranks, a machine's, are by themselves."""
    rows = sizes.rows[ranks.start : ranks.stop]
    return dataclasses.replace(sizes, levels=((range(len(ranks)),),), rows=rows, sums=())
