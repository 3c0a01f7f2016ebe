"""A module's buffers (BatchNorm's running statistics, say) in lockstep.

Every microbatch of a step starts from the same buffers. Afterwards a floating buffer is the tree mean of the values
that the microbatches left, an integer buffer their maximum. A buffer that no microbatch changed costs a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from instep.errors import RecipeError
from instep.reduce.layout import Layout
from instep.reduce.tree import Node, tree_sum


class Buffers:
    """One worker's buffers and what its microbatches left in them.

    Its parts go into shared memory flattened: the floating ones as float32 in `layout`, the others as int64 in
    `integer_layout`.
    """

    def __init__(self, module: nn.Module):
        self._owners: list[tuple[nn.Module, str]] = []
        self.names: list[str] = []
        for name, _ in module.named_buffers():
            path, _, key = name.rpartition(".")
            self._owners.append((module.get_submodule(path), key))
            self.names.append(name)
        self._objects = [self._current(index) for index in range(len(self.names))]
        self._start = [buffer.detach().clone() for buffer in self._objects]
        self._left: list[list[Tensor | None]] = []
        self._filled: list[bool] = []
        floating = [buffer.is_floating_point() for buffer in self._objects]
        if any(buffer.is_complex() for buffer in self._objects):
            raise RecipeError("the model has a complex buffer, which cannot be averaged; hold it as two real ones.")
        self._floating = [index for index, flag in enumerate(floating) if flag]
        self._integer = [index for index, flag in enumerate(floating) if not flag]
        self.layout = Layout.of([self._start[index] for index in self._floating], block=1)
        self.integer_layout = Layout.of([self._start[index] for index in self._integer], block=1)

    def restart(self) -> None:
        """Takes what the module's buffers hold now as what the next step starts from."""
        self._start = [buffer.detach().clone() for buffer in self._objects]

    def begin(self) -> None:
        """Starts a step."""
        self._left = []
        self._filled = []

    def leave(self, *, filled: bool) -> None:
        """After a microbatch (`filled`: it had samples): notes what it changed, and sets the buffers back."""
        left: list[Tensor | None] = []
        for index, (start, original) in enumerate(zip(self._start, self._objects, strict=True)):
            current = self._current(index)
            if current.shape != start.shape:
                raise RecipeError(
                    f"buffer '{self.names[index]}' changed its shape from {tuple(start.shape)} to "
                    f"{tuple(current.shape)} in training; a buffer in lockstep must keep its shape."
                )
            changed = not _same_bits(current, start)
            left.append(current.detach().clone() if changed else None)
            if current is not original:
                setattr(*self._owners[index], original)
            if changed or current is not original:
                with torch.no_grad():
                    original.copy_(start)
        self._left.append(left)
        self._filled.append(filled)

    def put_back(self) -> None:
        """Sets the buffers back to what the step began with, wherever a microbatch was broken off."""
        for index, (start, original) in enumerate(zip(self._start, self._objects, strict=True)):
            if self._current(index) is not original:
                setattr(*self._owners[index], original)
            with torch.no_grad():
                original.copy_(start)

    def changed(self) -> list[bool]:
        """Whether each buffer was changed by one of the worker's microbatches of this step."""
        return [any(left[index] is not None for left in self._left) for index in range(len(self.names))]

    def post(
        self, which: Sequence[int], first: int, nodes: Sequence[Node], rows: Sequence[Tensor], integers: Tensor
    ) -> None:
        """Writes the buffers `which`, for all of the worker's nodes, into `rows` and `integers`.

        `first` is the worker's first microbatch. rows[i]: [layout.size] float32 of node i; integers:
        [integer_layout.size] int64.
        """
        for row, (start, stop) in zip(rows, nodes, strict=True):
            views = dict(zip(self._floating, self.layout.views(row), strict=True))
            for index in which:
                if index in views:
                    leaves = [self._leaf(microbatch - first, index) for microbatch in range(start, stop)]
                    views[index].copy_(tree_sum(leaves, torch.add))
        views = dict(zip(self._integer, self.integer_layout.views(integers), strict=True))
        for index in which:
            if index in views:
                values = [self._value(place, index).to("cpu", torch.int64) for place in range(len(self._left))]
                views[index].copy_(torch.stack(values).amax(0))

    def finish(
        self,
        which: Sequence[int],
        plan: Sequence[tuple[int, int]],
        rows: Sequence[Tensor],
        integers: Sequence[Tensor],
        filled: int,
    ) -> None:
        """Takes the step's buffers from what all workers posted. `filled`: microbatches that had samples."""
        all_floats = [dict(zip(self._floating, self.layout.views(row), strict=True)) for row in rows]
        all_integers = [dict(zip(self._integer, self.integer_layout.views(row), strict=True)) for row in integers]
        for index in which:
            if all_floats and index in all_floats[0]:
                sums = [views[index].clone() for views in all_floats]
                for into, source in plan:
                    sums[into].add_(sums[source])
                value = sums[0] / filled
            else:
                value = torch.stack([views[index] for views in all_integers]).amax(0)
            with torch.no_grad():
                self._objects[index].copy_(value)
            self._start[index] = self._objects[index].detach().clone()

    def _current(self, index: int) -> Tensor:
        owner, key = self._owners[index]
        found: Tensor = getattr(owner, key)
        return found

    def _value(self, place: int, index: int) -> Tensor:
        left = self._left[place][index]
        return self._start[index] if left is None else left

    def _leaf(self, place: int, index: int) -> Tensor:
        value = self._value(place, index).to("cpu", torch.float32)
        return value if self._filled[place] else torch.zeros_like(value)


def changed_by_any(flags: NDArray[np.generic]) -> list[int]:
    """The buffers that any worker changed; flags: [workers, buffers] uint8."""
    return [int(index) for index in np.flatnonzero(flags.any(axis=0))]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        return False
    if math.prod(a.shape) == 0:
        return True
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
