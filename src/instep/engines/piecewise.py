"""A worker's part of an update, piece by piece: one whose worker is killed at any moment can be ended by another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from instep.engines.shared_state import SharedState
from instep.engines.undo import PiecesDone, SharedSpan, room_of
from instep.reduce.layout import ALIGN, placed
from instep.reduce.reduction import clip_factor
from instep.worker.optimizer import Some
from instep.worker.replica import Replica

PIECE = 1 << 18
"""Elements of a piece, if it is of several parameters. Measured on a GPT of 5 M weights: smaller ones take more calls
of the optimizer, and copies of larger ones do not stay in the cache."""

MOST = 64
"""Parameters of a piece."""


class _Piece(NamedTuple):
    """Whole parameters. `of`: the same, for the optimizer."""

    indices: list[int]
    of: Some


class PiecewiseUpdates:
    """The updates of `shares` (indices of parameters, by worker) of weights that all share, each at its `offsets`, and
    whose optimizers' state lies in `state`. `room`: bytes that it needs in `PiecesDone`.
    """

    def __init__(
        self, replica: Replica, offsets: Sequence[int], state: SharedState, shares: Mapping[int, Collection[int]]
    ):
        self._replica, self._offsets, self._state = replica, offsets, state
        sizes = [parameter.numel() for parameter in replica.parameters]
        self._nbytes = [tensor.nbytes for tensor in (*replica.parameters, *replica.averages.tensors)]  # at the offsets
        self._pieces = {worker: [self._piece(each) for each in _cut(share, sizes)] for worker, share in shares.items()}
        everything = [piece.indices for pieces in self._pieces.values() for piece in pieces]
        self.room = max(map(self._room_of, everything))
        self._most = max(placed([sizes[index] for index in indices], ALIGN)[1] for indices in everything)
        groups = [group for one in replica.optimizer.each for group in one.of_torch.param_groups]
        self._writes = not all(group.get("fused") for group in groups)  # some do into gradients, such as SGD's foreach
        self._copy = torch.empty(0)  # of the gradients of a piece

    def make(
        self,
        worker: int,
        step: int,
        norm: float,
        touched: Sequence[bool],
        gradients: Sequence[Tensor],
        pieces: PiecesDone,
    ) -> float | None:
        """What is lacking of the update of a worker's share, as `Placement.update`; the gradients stay as they are.

        A piece that is begun was put back before.
        """
        rate = None
        for number, piece in enumerate(self._pieces[worker]):
            if number < pieces.done:
                continue
            which = [index for index in piece.indices if touched[index]]
            if number > pieces.done or not pieces.begun:  # else it is kept, and nothing may be written there
                pieces.keep([span for index in piece.indices for span in self._spans(index, touched=touched[index])])
                pieces.begin(number)
            own = dict(zip(which, self._clipped([gradients[index] for index in which], norm), strict=True))
            rate = self._replica.update(step, [own.get(index) for index in piece.indices], piece.of)
            self._replica.averages.follow(piece.indices)
            self._state.grow(which)
            pieces.end(number)
        return rate

    def _piece(self, indices: list[int]) -> _Piece:
        return _Piece(indices, self._replica.some(indices))

    def _spans(self, index: int, *, touched: bool) -> list[SharedSpan]:
        """What an update may change: of a parameter that is `touched`, itself and its state; of all, their averages."""
        first, *averages = [SharedSpan(0, self._offsets[at], self._nbytes[at]) for at in self._places(index)]
        return [first, self._state.span(index), *averages] if touched else averages

    def _places(self, index: int) -> range:
        """Of the parameter and its averages."""
        return range(index, len(self._offsets), len(self._replica.parameters))

    def _room_of(self, indices: Sequence[int]) -> int:
        nbytes = sum(self._nbytes[at] for index in indices for at in self._places(index))
        nbytes += sum(map(self._state.most_bytes, indices))
        return room_of(sum(1 + len(self._places(index)) for index in indices), nbytes)

    def _clipped(self, gradients: Sequence[Tensor], norm: float) -> Sequence[Tensor]:
        """The gradients clipped; they themselves are never changed."""
        factor = clip_factor(norm, self._replica.recipe.clip_norm)
        if factor is None and not self._writes:
            return gradients
        if not self._copy.numel():
            self._copy = torch.empty(self._most)
        offsets, _ = placed([gradient.numel() for gradient in gradients], ALIGN)
        views = [self._copy.as_strided(g.shape, g.stride(), at) for g, at in zip(gradients, offsets, strict=True)]
        for gradient, view in zip(gradients, views, strict=True):
            if factor is None:
                view.copy_(gradient)
            else:
                torch.mul(gradient, factor, out=view)
        return views


def _cut(share: Collection[int], sizes: Sequence[int]) -> list[list[int]]:
    """A share in pieces, at least one, which may be empty."""
    pieces: list[list[int]] = [[]]
    for index in share:
        last = pieces[-1]
        if last and (len(last) == MOST or sum(sizes[each] for each in last) + sizes[index] > PIECE):
            pieces.append([])
        pieces[-1].append(index)
    return pieces
