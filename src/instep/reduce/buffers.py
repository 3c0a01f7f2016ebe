"""A module's buffers (BatchNorm's running statistics, say) in lockstep.

Every microbatch of a step starts from the same buffers. What it leaves is kept, and at the step's end each buffer takes
of it what its mode says, see `instep.buffer_modes`; without a mode, floating buffers take the tree mean, and whole
numbers the maximum. Sums go in tree order: in float32, of float64 buffers in float64, and exact of whole numbers. A
buffer that no microbatch changed costs a comparison.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from instep.bits import same_bits
from instep.buffer_modes import Mode, modes_of
from instep.errors import RecipeError
from instep.reduce.checksums import checksum
from instep.reduce.layout import Layout
from instep.reduce.tree import Node, tree_sum

APART = -1
"""In place of a checksum: a worker's microbatches left several values."""

_MEAN, _MAX = Mode("mean"), Mode("max")


Left = tuple[list[list[Tensor | None]], list[bool]]
"""What the microbatches of a step have left: by microbatch and buffer; and which of them had samples."""


class Buffers:
    """One worker's buffers and what its microbatches left in them.

    patterns: as in `Recipe.buffers`. Raises RecipeError where they don't go with the module's buffers.

    Its parts go into shared memory flattened: the floating ones in rows of `row_size` float32 words, one a tree node,
    where those of 64 bits take two words an element; the others as int64 in `integer_layout`.
    """

    def __init__(self, module: nn.Module, patterns: Mapping[str, str] = MappingProxyType({})):
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
        floating = [i for i, buffer in enumerate(self._objects) if buffer.is_floating_point()]
        self._double = [index for index in floating if self._objects[index].dtype == torch.float64]
        self._single = [index for index in floating if index not in self._double]
        complex_ = {index for index, buffer in enumerate(self._objects) if buffer.is_complex()}
        self._integer = [i for i in range(len(self.names)) if i not in complex_ and i not in floating]
        self.integer_layout = Layout.of([self._start[index] for index in self._integer], block=1)
        self._single_layout = Layout.of([self._start[index] for index in self._single], block=1)
        self._double_layout = Layout.of([self._start[index] for index in self._double], block=1)
        self._doubles_at = -(-self._single_layout.size // 2) * 2
        self.row_size = self._single_layout.size
        """float32 words of a row."""
        if self._double:
            self.row_size = self._doubles_at + 2 * self._double_layout.size
        given = self._given(patterns)
        defaults = [_MEAN if index in floating else _MAX for index in range(len(self.names))]
        self._modes = [mode or default for mode, default in zip(given, defaults, strict=True)]
        self.disturbed = False
        """Whether any microbatch has changed any of them, frozen ones too."""
        self._doubtful = [i for i in floating if given[i] is None and not _of_normalisation(self._owners[i][0])]

    def _given(self, patterns: Mapping[str, str]) -> list[Mode | None]:
        kinds = {self.names[i]: self._objects[i].dtype for i in self._integer}
        discrete = {n: "truth values" if dtype == torch.bool else "whole numbers" for n, dtype in kinds.items()}
        return modes_of(patterns, self.names, discrete)

    @property
    def decaying(self) -> list[int]:
        """The buffers that each step makes smaller by itself."""
        return [index for index, mode in enumerate(self._modes) if mode.decay != 1]

    @property
    def start(self) -> list[Tensor]:
        """What the present step starts from, by buffer."""
        return list(self._start)

    def restart(self) -> None:
        """Takes what the module's buffers hold now as what the next step starts from."""
        self._start = [buffer.detach().clone() for buffer in self._objects]

    def carry_over(self, which: Sequence[int], before: Sequence[Tensor], after: Sequence[Tensor], steps: int) -> None:
        """Has the present values of the buffers `which`, and the next step's start, take in `steps` steps that were
        made from other values: they have made `after` of `before`. Those that take the mean stay as the steps left
        them: of running means the mean over all workers is the same.
        """
        for index in which:
            now, value, mode = self._objects[index], after[index], self._modes[index]
            if mode.kind == "max":
                value = torch.maximum(now, value)
            elif mode.kind == "sum":
                others, ours = (_decayed(start, mode, now.dtype, steps) for start in (now, before[index]))
                value = value + (others - ours).to(value.device)
            with torch.no_grad():
                now.copy_(value)
            self._start[index] = now.detach().clone()

    def begin(self) -> None:
        """Starts a step."""
        self._left = []
        self._filled = []

    def swap(self, left: Left | None = None) -> Left:
        """Has what another's microbatches have left, or nothing, in place of what is returned."""
        before = self._left, self._filled
        self._left, self._filled = ([], []) if left is None else left
        return before

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
            changed = not same_bits(current, start)
            self.disturbed |= changed
            kept = changed and self._modes[index].kind != "frozen"
            if kept and start.is_complex():
                raise RecipeError(
                    f"buffer '{self.names[index]}' is complex and was changed in training, and what microbatches leave "
                    f"in it cannot be put together; hold it as two real ones, or as 'frozen' in recipe.buffers."
                )
            left.append(current.detach().clone() if kept else None)
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

    def untouched(self, filled: Sequence[bool]) -> None:
        """Starts a step of microbatches that left all as it was; filled: which of them had samples."""
        self._left = [[None] * len(self.names) for _ in filled]
        self._filled = list(filled)

    def changed(self) -> list[bool]:
        """Whether each buffer was changed by one of the worker's microbatches of this step."""
        return [any(left[index] is not None for left in self._left) for index in range(len(self.names))]

    def ends(self) -> dict[int, tuple[int, int]]:
        """Of buffers that take the mean though nobody said so, and not in a normalisation layer: checksums of what the
        step started from and of what the worker's microbatches left, or `APART`; none where it had no samples.
        """
        places = [place for place, filled in enumerate(self._filled) if filled]
        sums: dict[int, tuple[int, int]] = {}
        for index in self._doubtful if places else ():
            start, *ends = (
                int(text, 16) for text in checksum([self._start[index], *(self._value(p, index) for p in places)])
            )
            sums[index] = (start, ends[0] if len(set(ends)) == 1 else APART)
        return sums

    def post(
        self, which: Sequence[int], first: int, nodes: Sequence[Node], rows: Sequence[Tensor], integers: Tensor,
        *, start: Sequence[Tensor] | None = None, steps: int = 1,
    ) -> None:  # fmt: skip
        """Writes the buffers `which`, for all of the worker's nodes, into `rows` and `integers`.

        `first` is the worker's first microbatch. rows[i]: [row_size] float32 of node i; integers:
        [integer_layout.size] int64. Where the worker has made `steps` local ones, `start` is what it began with.
        """
        start = self._start if start is None else start
        everywhere = range(len(self._left))
        for row, node in zip(rows, nodes, strict=True):
            views = self._views(row)
            for index in which:
                if index in views:
                    places = range(node[0] - first, node[1] - first)
                    views[index].copy_(self._posted(index, places, views[index].dtype, start[index], steps))
        views = dict(zip(self._integer, self.integer_layout.views(integers), strict=True))
        for index in which:
            if index in views:
                views[index].copy_(self._posted(index, everywhere, torch.int64, start[index], steps))

    def _posted(self, index: int, places: range, dtype: torch.dtype, start: Tensor, steps: int) -> Tensor:
        """What the microbatches at `places` come to, of one buffer."""
        mode = self._modes[index]
        if not places:  # a worker without microbatches, which nothing is taken of
            return torch.full(start.shape, _least(dtype) if mode.kind == "max" else 0, dtype=dtype)
        filled = [place for place in places if self._filled[place]]
        if mode.kind == "last":  # of all the worker's, so that any row will do
            latest = max((place for place, flag in enumerate(self._filled) if flag), default=places[0])
            return self._value(latest, index).to("cpu", dtype)
        if mode.kind == "max":
            if not filled:
                return torch.full(start.shape, _least(dtype), dtype=dtype)
            return torch.stack([self._value(place, index).to("cpu", dtype) for place in filled]).amax(0)
        leaves = [self._value(place, index).to("cpu", dtype) for place in places]
        if mode.kind == "sum":
            before = _decayed(start, mode, dtype, steps)
            leaves = [leaf - before for leaf in leaves]
        # One without samples adds nothing, but keeps its leaf: else the tree would be another one.
        leaves = [leaf if self._filled[p] else torch.zeros_like(leaf) for p, leaf in zip(places, leaves, strict=True)]
        return tree_sum(leaves, torch.add)

    def finish(
        self, which: Sequence[int], plan: Sequence[tuple[int, int]], rows: Sequence[Tensor],
        integers: Sequence[Tensor], filled: int, last: tuple[int, int] = (0, 0), *, steps: int = 1,
    ) -> None:  # fmt: skip
        """Takes the step's buffers from what all workers posted. `filled`: microbatches that had samples.

        last: places in `rows` and `integers` of what was posted by the worker that had the last of them.
        """
        floats = [self._views(row) for row in rows]
        others = [dict(zip(self._integer, self.integer_layout.views(row), strict=True)) for row in integers]
        for index in which:
            floating = bool(floats) and index in floats[0]
            parts = [views[index] for views in (floats if floating else others)]
            mode = self._modes[index]
            if mode.kind == "last":
                value = parts[last[0 if floating else 1]]
            elif mode.kind == "max":
                value = torch.stack(parts).amax(0)
            else:
                sums = [part.clone() for part in parts]
                # Floating ones in tree order; sums of integers are exact in any.
                for into, source in plan if floating else [(0, source) for source in range(1, len(sums))]:
                    sums[into].add_(sums[source])
                value = sums[0]
                if mode.kind == "mean":
                    value = value / filled  # once, at the end: means of means would depend on who had how many
                else:
                    value = _decayed(self._start[index], mode, value.dtype, steps) + value
            with torch.no_grad():
                self._objects[index].copy_(value)
            self._start[index] = self._objects[index].detach().clone()

    def _views(self, row: Tensor) -> dict[int, Tensor]:
        """The floating buffers in a row, by index."""
        views = dict(zip(self._single, self._single_layout.views(row), strict=True))
        if self._double:
            doubles = row[self._doubles_at : self.row_size].view(torch.float64)
            views |= zip(self._double, self._double_layout.views(doubles), strict=True)
        return views

    def _current(self, index: int) -> Tensor:
        owner, key = self._owners[index]
        found: Tensor = getattr(owner, key)
        return found

    def _value(self, place: int, index: int) -> Tensor:
        left = self._left[place][index]
        return self._start[index] if left is None else left


def about_means(names: Sequence[str]) -> str:
    """The sentence to warn with of buffers that ended differently from piece to piece, and take the mean unasked."""
    others = {0: "", 1: f", and so does '{names[-1]}'"}.get(len(names) - 1, f", and so do {len(names) - 1} others")
    return (
        f"buffer '{names[0]}' ends differently from piece to piece of a batch and takes the mean of what they left, as "
        f"is right for running statistics{others}; say in recipe.buffers what becomes of it, such as "
        f"{{'{names[0]}' = 'sum:0.99'}} for exponential counts, 'last' for a queue, or 'mean'."
    )


def _decayed(start: Tensor, mode: Mode, dtype: torch.dtype, steps: int) -> Tensor:
    """D times the value of before; over several local steps as often."""
    value = start.to("cpu", dtype)
    decay = mode.decay**steps
    return value if decay == 1 else value * (decay if dtype.is_floating_point else int(decay))


def _least(dtype: torch.dtype) -> float:
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _of_normalisation(owner: nn.Module) -> bool:
    """Whether a module is a normalisation layer: one of torch's, or one named so, or with statistics named so."""
    known = isinstance(owner, nn.modules.batchnorm._NormBase)
    named = re.search(r"norm(ali[sz]ation)?(\d[dD])?$", type(owner).__name__, re.IGNORECASE) is not None
    return known or named or {"running_mean", "running_var"} <= owner._buffers.keys()
