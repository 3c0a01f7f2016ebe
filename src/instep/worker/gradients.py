"""The microbatches of one batch, computed and folded into the vectors of tree nodes, with what they leave beside these.

Every engine computes gradients here, and no other way: the lockstep engine's workers, those of the server engine, the
virtual engine and the replay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from instep.errors import NonFiniteError
from instep.reduce.buffers import Buffers
from instep.reduce.fold import Fold
from instep.reduce.layout import BLOCK, Layout
from instep.reduce.tree import Node
from instep.worker.evaluation import is_saved_after
from instep.worker.replica import Replica


@dataclass(frozen=True)
class Computed:
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
    write, see `Written.look`; 0: only at the first, before evaluations and at the end. `what`: the word for a batch in
    messages.
    """

    def __init__(
        self,
        replica: Replica,
        advance: Callable[[], None] = lambda: None,
        *,
        checkpoint_every: int = 0,
        what: str = "step",
    ):
        self._replica, self._advance, self._what = replica, advance, what
        self._milestones = checkpoint_every, replica.recipe.evaluate_every  # the best checkpoints too
        self.layout = Layout.of(replica.parameters, BLOCK[replica.device.type])
        self.buffers = Buffers(replica.module, replica.recipe.buffers)
        self.looked = True
        """Whether in the last batch all weights were read, to see whether a forward writes them."""
        self._first = True
        self._fold: Fold | None = None

    def assign(self, nodes: Sequence[Node], rows: Sequence[Tensor]) -> None:
        """From the next batch on, folds these nodes, from left to right, into `rows` ([layout.size] float32 each)."""
        if self._fold is None:
            self._fold = Fold(self.layout, self._replica.parameters, nodes, rows)
        else:
            self._fold.assign(nodes, rows)

    def compute(self, batch: int, samples: Mapping[int, Any], totals: Mapping[str, int]) -> Computed:
        """The gradients of a batch's microbatches, those of the nodes assigned; None for one without samples.

        totals: items by term that the sums are divided by. What microbatches left in buffers and parameters waits in
        `buffers` and in the replica's `written` and `trainable`. Raises FirstWrite while a forward writes parameters
        that were not known to be written.
        """
        assert self._fold is not None, "assign comes first"
        replica, fold = self._replica, self._fold
        self.looked = self._first or is_saved_after(batch, replica.recipe.steps, self._milestones)
        self._first = False
        fold.begin()
        self.buffers.begin()
        replica.trainable.begin()
        found: dict[int, dict[str, Tensor]] = {}
        with replica.written.kept(f"{self._what} {batch + 1}", closely=self.looked):
            for microbatch, some in samples.items():
                fold.begin_leaf()
                if some is not None:
                    found[microbatch] = replica.compute(batch, microbatch, some, totals)
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


def not_finite(replica: Replica, sums: Mapping[str, float], batch: int, microbatch: int) -> list[NonFiniteError]:
    """What is not finite among the terms' sums over a microbatch."""
    wrong = [name for name, value in sums.items() if not math.isfinite(value)]
    return [replica.not_finite(name, sums[name], batch, microbatch) for name in wrong]
