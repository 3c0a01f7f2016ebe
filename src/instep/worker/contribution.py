"""What a worker sends under any rule: tensors, and what it tells beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from instep.errors import NonFiniteError
from instep.reduce.checksums import checksum
from instep.reduce.tree import Node
from instep.rules.work import Work

NOTHING = (-1, -1)
"""In place of a batch and a microbatch, where none had samples."""


@dataclass
class Vectors:
    """The tensors of a contribution. N tree nodes (1 but under a synchronous rule).

    gradient: [N, layout.size] float32; a delta instead where the rule has local steps.
    buffers: [N, row_size] float32 and integers: [size] int64, as `Buffers.post` writes them. written:
    [WrittenParameters.row_bytes] uint8, what forwards wrote into parameters. lost: [WayUp.kept] float32, what a narrow
    wire has lost up to it.
    """

    gradient: Tensor
    buffers: Tensor
    integers: Tensor
    written: Tensor
    lost: Tensor = field(default_factory=lambda: torch.empty(0))

    def checksum(self, nodes: int) -> list[str]:
        """Of its gradient at so many nodes, and of what forwards wrote if they do."""
        return checksum([*self.gradient[:nodes], *([self.written] if self.written.numel() else [])])

    def clone(self) -> Vectors:
        """A copy in memory of its own."""
        parts = (self.gradient, self.buffers, self.integers, self.written, self.lost)
        return Vectors(*(part.clone() for part in parts))


@dataclass(frozen=True)
class Facts:
    """What a contribution tells beside its vectors.

    nodes: the microbatches of each row. counts: by term, in the objective's order, over all it covers. sums: by term,
    of each microbatch by itself, so that an update adds up all of them at once, whoever sent them. filled:
    microbatches with samples. touched: indices of the parameters that had a gradient. posted: indices of the buffers
    that the rows hold; changed: of those that were changed. latest: batch and microbatch of the last samples. ends: of
    the run's first batch, `Buffers.ends`. ceased, begun: of the parameters, see `Trainable`. made: local steps
    that were made. bad: what is not finite in it, though it is to be left out. empty: the batches of which its
    microbatches have no items. scale: the loss scale that a gradient was computed with, 1 for none; overflows: local
    steps that were left out since it was too large.
    """

    nodes: tuple[Node, ...]
    counts: Mapping[str, int]
    sums: Mapping[str, tuple[float, ...]]
    filled: int
    touched: tuple[int, ...]
    posted: tuple[int, ...]
    changed: tuple[int, ...] = ()
    latest: tuple[int, int] = NOTHING
    ends: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    made: int = 1
    ceased: tuple[int, ...] = ()
    begun: tuple[int, ...] = ()
    bad: tuple[NonFiniteError, ...] = ()
    empty: tuple[int, ...] = ()
    scale: float = 1.0
    overflows: int = 0


@dataclass(frozen=True)
class Arrived:
    """One contribution at the server. `weight` and `staleness` as the ledger gave them; `seq` too, by which the newest
    of a worker is known.

    `base`: the weights it started from ([Pack.size_bytes], uint8), needed for delay compensation alone.
    """

    worker: int
    work: Work
    facts: Facts
    vectors: Vectors
    weight: float
    staleness: int
    base: Tensor | None = None
    seq: int = 0


def latest_of(batch: int, filled: Iterable[int]) -> tuple[int, int]:
    """A batch and the last of its microbatches `filled` with samples; `NOTHING` where there are none."""
    return max(((batch, microbatch) for microbatch in filled), default=NOTHING)
