"""How the workers of a team reach each other: the one seam between the step and what moves bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from instep.reduce.levels import Levels

Piece = Sequence[slice]
"""A piece of the rows, by rank: which cut of it, in elements, each rank gets. Cuts may be empty and of any sizes; they
lie one after the other, in the order of `instep.reduce.levels.Shares`."""

Waiting = Callable[[bool], None]
"""Told True when a call begins to wait for others, and False when it has ended."""


BrokenOff = Callable[[], bool]
"""Whether the group is to be left at once: its calls raise PeerLost then, soon after they begin to wait."""

LEFT = "the team goes on in another group"


class PeerLost(Exception):
    """A rank has died or cannot be reached: the group is of no use any more. A new one may be made of who is left.

    silent: the address of one whose system does not answer; "" where that is not how it was noticed.
    """

    def __init__(self, why: str, silent: str = ""):
        super().__init__(why)
        self.silent = silent


class LeftTogether(PeerLost):
    """All ranks have left the group after the same step, to go on in another: nobody is lost."""


class PeerRaised(Exception):
    """Another rank has broken off what all did together, see `Group.interrupt`."""


@dataclass(frozen=True)
class Sizes:
    """What a group is made for; the same at all ranks.

    rows: how many rows, of `width` float32, each rank writes. sums: with two levels, how many rows each machine's come
    to at the first. fact_bytes: of the longest fact. common_bytes: of `Group.common`. spare_bytes: of what the ranks of
    one machine share besides, which takes room where it is written alone. most_rows: that a rank may come to write, see
    `Group.arrange`; those beyond `rows` take room where they are written alone.
    """

    levels: Levels
    rows: tuple[int, ...]
    sums: tuple[int, ...]
    width: int
    fact_bytes: int = 0
    common_bytes: int = 0
    spare_bytes: int = 0
    most_rows: int = 0


class Pending(Protocol):
    """Rows on their way."""

    @property
    def home(self) -> int:
        """Which of them lies where `assemble` needs no copy of it: put the sum there."""

    def ready(self) -> bool:
        """Whether `wait` would not have to wait."""

    def wait(self) -> list[Tensor]:
        """What this rank adds next: the same cut of all nodes, in node order, which it may change. Once at most.

        Of `assemble`: the whole.
        """


class Group(Protocol):
    """W processes that make the same calls in the same order. Bytes are moved, never added.

    Any call but `interrupt` and `close` may raise PeerLost or PeerRaised. After PeerLost only `close` is of use.
    """

    rank: int
    size: int
    levels: Levels
    """The sets of ranks that exchange with each other, innermost first: what comes to be added at one is added before
    the next."""
    rows: list[Tensor]
    """This rank's tree nodes, [width] float32 each; at first 0. A piece is written before `exchange`, not its own
    until the next `meet` after a gather. The first one is there even where the rank writes none."""
    common: Tensor
    """[common_bytes] uint8 that all ranks of a machine write and read, in turns that they keep by gathers; at first
    0."""

    def gather(self, fact: Tensor) -> Tensor:
        """A barrier. Every rank's fact, [n] to [W, n] in rank order, good until the next gather; n is the same at all.

        Facts lie on the CPU and have any type; n may be 0. What was written in `rows` and `common` before is seen.
        """

    def meet(self) -> None:
        """A barrier of this machine's ranks alone. What they wrote in `rows` and `common` before is seen."""

    def arrange(self, rows: Sequence[int], sums: Sequence[int]) -> None:
        """From the next exchange on, each rank writes so many of its rows, from none to `Sizes.most_rows`, and with two
        levels those of each machine come to so many sums. Who has its rows on a GPU writes as many as ever.
        """

    def expect(self, pieces: Sequence[Piece], *, shared: bool) -> None:
        """Says which pieces are exchanged and assembled next, in this order: what others send of them is taken from now
        on, which hides a slow link and is more to do; and a rank may assemble one before or after it exchanges another,
        whatever others do. shared: see `assemble`.
        """

    def exchange(self, piece: Piece, sums: Sequence[Tensor] | None = None) -> Pending:
        """Begins to exchange a piece of the rows; or, at the second level, what the first has come to there: `sums`.

        Several pieces may be on their way at once, and be waited for in any order. Not after an interrupt.
        """

    def assemble(self, own: Tensor, piece: Piece, *, shared: bool) -> Pending:
        """Begins to put the ranks' sums of their cuts of a piece together: the whole, [width].

        A gather comes before the wait, and with two levels the whole is complete after a `meet` that follows it. `own`
        stays as it is until then. shared: one for all ranks of a machine, which none may write until others have read
        it; else each has its own.
        """

    def share(self, blob: bytes, to: int | None = None) -> list[bytes]:
        """Sends bytes of any length to one rank, or to all: every rank's, in rank order; nothing at the others."""

    def interrupt(self) -> None:
        """Breaks off all that the ranks do together, for something is wrong here.

        The present or next call of the ranks that have called this less often raises PeerRaised. Those that have called
        it as often do things together anew.
        """

    def close(self) -> None:
        """Gives back what the group holds. Others that still wait for this rank are told that it is lost."""


class Solo:
    """One process, on any device."""

    def __init__(self, sizes: Sizes, device: torch.device | str = "cpu"):
        self.rank, self.size, self.levels = 0, 1, sizes.levels
        self.rows = [torch.zeros(sizes.width, device=device) for _ in range(sizes.rows[0])]
        self._count = len(self.rows)
        self.common = torch.zeros(sizes.common_bytes, dtype=torch.uint8)

    def gather(self, fact: Tensor) -> Tensor:
        return fact.clone()[None]

    def meet(self) -> None:
        pass

    def arrange(self, rows: Sequence[int], sums: Sequence[int]) -> None:
        (self._count,) = rows
        self.rows += [torch.zeros_like(self.rows[0]) for _ in range(self._count - len(self.rows))]
        del self.rows[max(1, self._count) :]

    def expect(self, pieces: Sequence[Piece], *, shared: bool) -> None:
        pass

    def exchange(self, piece: Piece, sums: Sequence[Tensor] | None = None) -> Pending:
        return Views([row[piece[0]] for row in self.rows[: self._count]])

    def assemble(self, own: Tensor, piece: Piece, *, shared: bool) -> Pending:
        put(own, self.rows[0][piece[0]])
        return Views([self.rows[0]])

    def share(self, blob: bytes, to: int | None = None) -> list[bytes]:
        return [blob]

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        self.rows = []


@dataclass(frozen=True)
class Views:
    """A Pending of what needs no moving."""

    rows: list[Tensor]
    home: int = 0

    def ready(self) -> bool:
        return True

    def wait(self) -> list[Tensor]:
        return self.rows


def put(part: Tensor, into: Tensor) -> None:
    """Copies `part`, unless that is where it lies already."""
    if part.data_ptr() != into.data_ptr():
        into.copy_(part)


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor of one dimension as uint8: no backend moves all types."""
    return tensor.contiguous().view(torch.uint8)


class Fields:
    """Arrays of fixed types and shapes, by name; a rank writes those of `own`, and all are 0 at first.

    >>> fields = Fields(counts=("int64", (2, 3)), stop=("uint8", ()))
    >>> fields.own["counts"][0] = [4, 0, 1]
    >>> fields.gather(group)["counts"].shape
    (1, 2, 3)
    """

    def __init__(self, **fields: tuple[str, tuple[int, ...]]):
        kind = np.dtype([(name, dtype, shape) for name, (dtype, shape) in fields.items()], align=True)
        self.nbytes = kind.itemsize
        self._kind, self.raw = kind, torch.zeros(self.nbytes, dtype=torch.uint8)
        self._alone: NDArray[Any] = self.raw.numpy().view(kind)
        self.own: Any = self._alone[0]

    def gather(self, group: Group) -> NDArray[Any]:
        """All ranks' by name, in rank order: [W, *shape]; good until the group's next gather, or a change of `own`."""
        return self._alone if group.size == 1 else self.read(group.gather(self.raw))

    def read(self, found: Tensor) -> NDArray[Any]:
        """All ranks' `raw`, [W, nbytes], by name: views of them."""
        return found.numpy().view(self._kind)[:, 0]


def as_rows(array: NDArray[Any]) -> list[Tensor]:
    """The rows of a two-dimensional array as tensors over the same memory."""
    return [torch.from_numpy(row) for row in array]
