"""Gradients: microbatches of a batch, computed and folded into the vectors of tree nodes.

Every engine computes gradients by `Gradients`, and no other way: the workers of the lockstep engine and, by
`instep.worker.contributor.Contributor`, those of the server engine, the virtual engine and the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from instep.reduce.buffers import Buffers
from instep.reduce.checksums import checksum
from instep.reduce.fold import Fold
from instep.reduce.layout import BLOCK, Layout
from instep.reduce.tree import Node
from instep.worker.milestones import Milestones
from instep.worker.replica import Replica

Around = Callable[[int, Any, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
"""Is called with a microbatch, its samples and what computes it, and gives what that gives."""


class Computed(NamedTuple):
    """What some microbatches of one batch came to, beside the vectors of their nodes.

    sums: of each term, by microbatch, of those with samples. touched: by parameter, whether it had a gradient. changed:
    by buffer, whether it was changed. ended: the parameters that a microbatch left without a gradient, None where none
    had samples. ends: of the run's first batch, see `Buffers.ends`.
    """

    sums: Mapping[int, Mapping[str, float]]
    touched: Sequence[bool]
    changed: Sequence[bool]
    ended: frozenset[int] | None
    ends: Mapping[int, tuple[int, int]]


class Gradients:
    """Computes batches one after the other with one replica, each from the weights that it finds.

    `advance` is called after each microbatch. `checkpoint_every`: batches between two close looks at what forwards
    write, see `WrittenParameters.look`; 0: only at the first, before evaluations and at the end. `what`: the word for
    a batch in messages. `block`: of the layout, where it is not the device's own.
    """

    def __init__(
        self,
        replica: Replica,
        advance: Callable[[], None] = lambda: None,
        *,
        checkpoint_every: int = 0,
        what: str = "step",
        block: int = 0,
    ):
        self._replica, self._advance, self._what = replica, advance, what
        recipe = replica.recipe
        self._milestones = Milestones(recipe.steps, recipe.evaluate_every, checkpoint_every)
        self.layout = Layout.of(replica.parameters, block or BLOCK[replica.device.type])
        self.buffers = Buffers(replica.module, replica.recipe.buffers)
        self.looked = True
        """Whether in the last batch all weights were read, to see whether a forward writes them."""
        self._first = True
        self._fold: Fold | None = None

    def assign(self, nodes: Sequence[Node], rows: Sequence[Tensor]) -> None:
        """From the next batch on, folds these nodes, from left to right, into `rows` ([layout.size] float32 each)."""
        if self._fold is None:
            self._replica.trainable.require_all()  # else there can be no hooks
            self._fold = Fold(self.layout, self._replica.parameters, nodes, rows)
        else:
            self._fold.assign(nodes, rows)

    def assign_own(self, nodes: Sequence[Node]) -> None:
        """The same, into rows that nobody else has."""
        self.assign(nodes, [torch.zeros(self.layout.size, device=self._replica.device) for _ in nodes])

    def close(self) -> None:
        """Computes no more: another may, with the same replica. Buffers are what they were before the batch."""
        self.buffers.put_back()
        if self._fold is not None:
            self._fold.close()

    def checksum(self) -> list[str]:
        """Of the vectors of the nodes assigned, once a batch is computed and before anything is added to them."""
        assert self._fold is not None, "assign comes first"
        return checksum(self._fold.slots)

    def tell(self, pieces: Sequence[slice], reached: Callable[[int], None]) -> None:
        """From the next batch on, calls `reached(n)` when n pieces of the rows are finished, see `Fold.tell`."""
        assert self._fold is not None, "assign comes first"
        self._fold.tell(pieces, reached)

    def compute(
        self,
        batch: int,
        samples: Mapping[int, Any],
        totals: Mapping[str, int],
        around: Around | None = None,
    ) -> Computed:
        """The gradients of a batch's microbatches, those of the nodes assigned; None for one without samples.

        totals: items by term that the sums are divided by. around: sees each of them. What microbatches left in
        buffers and parameters waits in `buffers` and in the replica's `written` and `trainable`. Raises FirstWrite
        while a forward writes parameters that were not known to be written.
        """
        assert self._fold is not None, "assign comes first"
        replica, fold = self._replica, self._fold
        self.looked = self._looks(batch)
        self._first = False
        fold.begin(replica.scaler.value)
        self.buffers.begin()
        replica.trainable.begin(batch)
        found: dict[int, dict[str, Tensor]] = {}
        with replica.written.kept(f"{self._what} {batch + 1}", closely=self.looked):
            for microbatch, some in samples.items():
                fold.begin_leaf()
                if some is not None:
                    compute = partial(replica.compute, batch, microbatch, some, totals)
                    found[microbatch] = compute() if around is None else around(microbatch, some, compute)
                fold.end_leaf()
                self.buffers.leave(filled=some is not None)
                replica.written.leave()
                if some is not None:
                    replica.trainable.leave(batch)
                self._advance()
        # Not before: a GPU goes on while nobody asks for a number.
        sums = {place: {name: float(value) for name, value in each.items()} for place, each in found.items()}
        ends = self.buffers.ends() if batch == 0 else {}
        return Computed(sums, fold.touched, self.buffers.changed(), replica.trainable.ended, ends)

    def alone(self, batch: int, microbatch: int, samples: Any, totals: Mapping[str, int]) -> dict[str, Tensor]:
        """The sums of one microbatch, of any worker's, before `compute` is called for its batch, which finds no trace
        of it: its gradient lies in the first row until then, to be seen by hooks. Raises FirstWrite.
        """
        assert self._fold is not None, "assign comes first"
        replica, fold = self._replica, self._fold
        kept = replica.written.kept(f"{self._what} {batch + 1}", closely=self._looks(batch))
        self.buffers.begin()
        replica.trainable.begin(batch)
        with _unchecked(replica, batch), kept, fold.aside():
            fold.begin_leaf()
            sums = replica.compute(batch, microbatch, samples, totals)
            fold.end_leaf()
            self.buffers.leave(filled=True)
            replica.written.leave()
            replica.trainable.leave(batch)
        self._advance()
        return sums

    def _looks(self, batch: int) -> bool:
        return self._first or self._milestones.may_save(batch)


def compile_first(replica: Replica) -> None:
    """Has the model compiled, forward and backward, where the recipe says so, by the run's first microbatch.

    Nothing is left of it but buffers of the model that it changed.
    """
    if not replica.recipe.compile:
        return
    place = next(m for m in range(replica.recipe.microbatches) if replica.cursor.microbatch_size(0, m))
    batch = replica.batch(0, place)
    replica.trainable.begin(0)
    with _unchecked(replica, 0), replica.written.probing(learn=False):
        replica.compute(0, place, batch, replica.objective.counts_at(0, batch))
    for parameter in replica.parameters:
        parameter.grad = None


@contextmanager
def _unchecked(replica: Replica, step: int) -> Iterator[None]:
    """In the block, nothing is verified of microbatches of `step`, which are computed for another reason than it."""
    checks, replica.checks = replica.checks, None
    if checks is not None:
        checks.unchecked(step)
    try:
        yield
    finally:
        replica.checks = checks
