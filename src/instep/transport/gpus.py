"""Groups of workers on GPUs: rows lie there, and either go through the memory of the machine, or from GPU to GPU.

What is no row (facts, signs that another one has raised, parts of checkpoints) goes by a group of the machines' memory
in both cases: it tells of a rank that raised or died where NCCL would wait. Neither was run on several GPUs; tests
rehearse both with rows that lie on the CPU and pose as a GPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from instep.transport.distributed import DistributedGroup
from instep.transport.group import Group, Pending, Piece, Sizes, Waiting
from instep.transport.wire import Connect


def without_rows(sizes: Sizes) -> Sizes:
    """The sizes of a group for all but the rows."""
    return replace(sizes, width=0)


class Staged:
    """A rank on a GPU that others may share: its rows are copied to `host`, a group of memory, and what comes back."""

    def __init__(self, host: Group, device: torch.device | str):
        self.rank, self.size, self.levels, self.common = host.rank, host.size, host.levels, host.common
        self._host, self._device = host, device
        self.rows = [torch.zeros(row.shape, device=device) for row in host.rows]
        self._late: list[tuple[Tensor, slice]] = []  # what is whole after the next `meet`

    def gather(self, fact: Tensor) -> Tensor:
        return self._host.gather(fact)

    def meet(self) -> None:
        self._host.meet()
        self._copy_back()

    def arrange(self, rows: Sequence[int], sums: Sequence[int]) -> None:
        pass

    def expect(self, pieces: Sequence[Piece], *, shared: bool) -> None:
        self._host.expect(pieces, shared=False)  # see assemble

    def exchange(self, piece: Piece, sums: Sequence[Tensor] | None = None) -> Pending:
        if sums is not None:
            return _Copied(self._host.exchange(piece, [_copy(each, "cpu") for each in sums]), self._device)
        for row, own in zip(self._host.rows, self.rows, strict=True):
            row[_span(piece)].copy_(own[_span(piece)])  # done when it returns
        return _Copied(self._host.exchange(piece), self._device)

    def assemble(self, own: Tensor, piece: Piece, *, shared: bool) -> Pending:
        # Each its own: of one for all, the next step's first writes would have to wait for the slowest's copy.
        return _Back(self, self._host.assemble(_copy(own, "cpu"), piece, shared=False), _span(piece))

    def put(self, whole: Tensor, span: slice) -> None:
        """Copies what is whole now or, with two levels, after the next `meet`."""
        self._late.append((whole, span))
        if len(self.levels) == 1:
            self._copy_back()

    def _copy_back(self) -> None:
        for whole, span in self._late:
            self.rows[0][span].copy_(whole[span])
        self._late = []

    def share(self, blob: bytes, to: int | None = None) -> list[bytes]:
        return self._host.share(blob, to)

    def interrupt(self) -> None:
        self._late = []
        self._host.interrupt()

    def close(self) -> None:
        self._host.close()
        self.rows, self._late, self.common = [], [], torch.empty(0)


class _Copied:
    """A Pending whose rows are wanted on the device."""

    home = 0

    def __init__(self, pending: Pending, device: torch.device | str):
        self._pending, self._device = pending, device

    def ready(self) -> bool:
        return self._pending.ready()

    def wait(self) -> list[Tensor]:
        return [_copy(row, self._device) for row in self._pending.wait()]


class _Back:
    """A Pending of the whole, which comes back to the device."""

    home = 0

    def __init__(self, group: Staged, pending: Pending, span: slice):
        self._group, self._pending, self._span = group, pending, span

    def ready(self) -> bool:
        return self._pending.ready()

    def wait(self) -> list[Tensor]:
        (whole,) = self._pending.wait()
        self._group.put(whole, self._span)
        return [self._group.rows[0]]


class DeviceGroup(DistributedGroup):
    """A rank that has a GPU of its own: rows go from GPU to GPU, by NCCL; all else by `host`, a group of these ranks.

    All ranks exchange with each other at once, those of one machine too.
    """

    def __init__(
        self,
        host: Group,
        connect: Connect,
        name: str,
        sizes: Sizes,
        *,
        device: torch.device | str,
        address: str = "",
        waiting: Waiting = lambda flag: None,
    ):
        self._host = host
        super().__init__(connect, name, host.rank, sizes, device=device, address=address, waiting=waiting)
        self.common = host.common

    def gather(self, fact: Tensor) -> Tensor:
        return self._host.gather(fact)

    def meet(self) -> None:
        self._host.meet()

    def share(self, blob: bytes, to: int | None = None) -> list[bytes]:
        return self._host.share(blob, to)

    def interrupt(self) -> None:
        self._host.interrupt()
        super().interrupt()

    def close(self) -> None:
        super().close()
        self._host.close()


def _span(piece: Piece) -> slice:
    """All of a piece, whose cuts lie one after the other."""
    return slice(min(cut.start for cut in piece), max(cut.stop for cut in piece))


def _copy(tensor: Tensor, device: torch.device | str) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor)
