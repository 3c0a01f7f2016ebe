"""Where each tensor lies in a flat vector: of float32, cut into blocks and slices, or of bytes, in its own type."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGN = 16
"""Elements: every tensor starts on a cache line."""

ALIGN_BYTES = 64
"""The same in bytes. Torch aligns its own memory so, and some kernels' bits depend on it."""

BLOCK = {"cpu": 1 << 15, "cuda": 1 << 22}
"""Elements that are added at a time, by device: on a CPU, two blocks stay in the second-level cache."""


@dataclass(frozen=True)
class Layout:
    """The flat vector that stands for a list of tensors.

    `offsets[i]` is the first element of tensor i; `size`, in elements, is a multiple of `block`. Gaps stay 0. What
    does not fill a block is a shorter one.
    """

    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    size: int
    block: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor], block: int) -> Layout:
        """The layout of `tensors` in the order given, in blocks of up to `block` elements; dense ones keep strides."""
        offsets, end = placed([tensor.numel() for tensor in tensors], ALIGN)
        block = min(block, max(end, ALIGN))
        return cls(
            shapes=tuple(tensor.shape for tensor in tensors),
            strides=tuple(_dense_strides(tensor) for tensor in tensors),
            offsets=offsets,
            size=max(1, -(-end // block)) * block,
            block=block,
        )

    def views(self, flat: Tensor) -> list[Tensor]:
        """Tensor i as a view of `flat` ([size], float32), with its own shape and strides."""
        return [
            flat.as_strided(shape, stride, flat.storage_offset() + offset)
            for shape, stride, offset in zip(self.shapes, self.strides, self.offsets, strict=True)
        ]

    def views_of_many(self, flat: Tensor) -> list[Tensor]:
        """Tensor i of K flat vectors ([K, size], float32) as a view of them, [K, *shape]."""
        return [
            flat.as_strided((len(flat), *shape), (flat.stride(0), *stride), flat.storage_offset() + offset)
            for shape, stride, offset in zip(self.shapes, self.strides, self.offsets, strict=True)
        ]

    def part(self, which: range) -> tuple[slice, Layout]:
        """Where the tensors `which`, neighbours, lie in the flat vector, and their own layout there, in one block."""
        start = self.offsets[which.start]
        stop = self.offsets[which.stop] if which.stop < len(self.offsets) else self.size
        kept = slice(which.start, which.stop)
        offsets = tuple(offset - start for offset in self.offsets[kept])
        own = Layout(self.shapes[kept], self.strides[kept], offsets, size=stop - start, block=stop - start)
        return slice(start, stop), own

    @property
    def blocks(self) -> int:
        """How many blocks the vector has."""
        return self.size // self.block


def padded(nbytes: int) -> int:
    """So many bytes, up to where the next tensor may begin."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def placed(sizes: Iterable[int], align: int) -> tuple[tuple[int, ...], int]:
    """Where each of `sizes` begins, one after the other at multiples of `align`, and where the last ends."""
    *offsets, end = itertools.accumulate((-(-size // align) * align for size in sizes), initial=0)
    return tuple(offsets), end


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill its memory without gap or overlap, in any order of dimensions (channels_last, say)."""
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), -d))
    step = 1
    for dim in order:
        if tensor.shape[dim] != 1 and tensor.stride(dim) != step:
            return False
        step *= tensor.shape[dim]
    return True


def tensor_at(memory: Any, place: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """A dense tensor as a view of `memory`, an array of uint8, from the byte `place` on."""
    part = torch.from_numpy(memory[place : place + math.prod(shape) * dtype.itemsize])
    view: Tensor = part.view(dtype).as_strided(shape, stride)
    return view


def placed_at(memory: Any, place: int, tensor: Tensor, *, copied: bool) -> Tensor:
    """As `tensor_at`, one like `tensor`; `copied`: with its values."""
    view = tensor_at(memory, place, tensor.dtype, tensor.shape, tensor.stride())
    if copied:
        view.copy_(tensor)
    return view


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()


class Pack:
    """Where each of a module's trained parameters and buffers lies in a vector of bytes.

    `size_bytes` is its length. The parameters come first, in the order given, then the `frozen` ones that forwards
    write, then all buffers by name; `beside_bytes` are those of the latter two.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor], frozen: Sequence[Tensor] = ()):
        buffers = dict(module.named_buffers())
        self._tensors = [*parameters, *frozen, *buffers.values()]
        self._parameters, self._frozen = len(parameters), len(frozen)
        self._offsets, end = placed([tensor.nbytes for tensor in self._tensors], ALIGN_BYTES)
        self.size_bytes = max(end, ALIGN_BYTES)
        self.beside_bytes = sum(tensor.nbytes for tensor in self._tensors[self._parameters :])
        self._types = {tensor.dtype for tensor in self._tensors}
        self._strides = [torch.empty(tensor.shape, device="meta").stride() for tensor in self._tensors]

    def save(self, into: Tensor, which: Collection[int] | None = None) -> None:
        """Copies the module's present state into `into` ([size_bytes], uint8, on the CPU).

        which: of the parameters only these, by index; all if None.
        """
        with torch.no_grad():
            for view, tensor in self._pairs(into, which):
                view.copy_(tensor)

    def load(self, saved: Tensor, which: Collection[int] | None = None) -> None:
        """Gives the module the state in `saved` ([size_bytes], uint8). which: as in `save`."""
        with torch.no_grad():
            for view, tensor in self._pairs(saved, which):
                tensor.copy_(view)

    def part(self, saved: Tensor, which: range) -> Tensor:
        """Where the parameters `which`, neighbours, lie in `saved`: bytes."""
        last = which.stop - 1
        return saved[self._offsets[which.start] : self._offsets[last] + self._tensors[last].nbytes]

    def change_bytes(self, which: Collection[int]) -> int:
        """Of a message with these parameters and all beside them."""
        if len(which) == self._parameters:
            return self.size_bytes
        return sum(self._tensors[index].nbytes for index in which) + self.beside_bytes

    def parameters(self, saved: Tensor) -> list[Tensor]:
        """The parameters in `saved`, as views of it."""
        return self._views(saved)[: self._parameters]

    def frozen(self, saved: Tensor) -> list[Tensor]:
        """The frozen parameters in `saved`, as views of it."""
        return self._views(saved)[self._parameters : self._parameters + self._frozen]

    def beside(self, saved: Tensor) -> Tensor:
        """The frozen parameters and buffers in `saved`, and the gaps between them, as a view of it."""
        return saved[self._offsets[self._parameters] if self._parameters < len(self._offsets) else len(saved) :]

    def stacked(self, saved: Sequence[Tensor]) -> list[Tensor]:
        """The parameters in K of them, each as one tensor [K, *shape]."""
        rows = torch.stack(list(saved))
        found = []
        for offset, tensor in zip(self._offsets[: self._parameters], self._tensors, strict=False):
            part = rows[:, offset : offset + tensor.numel() * tensor.element_size()]
            found.append(part.view(tensor.dtype).view(len(rows), *tensor.shape))
        return found

    def empty(self) -> Tensor:
        """A vector of this length, on the CPU."""
        return torch.empty(self.size_bytes, dtype=torch.uint8)

    def _pairs(self, flat: Tensor, which: Collection[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = zip(self._views(flat), self._tensors, strict=True)
        if which is None:
            return pairs
        wanted = set(which)
        return (pair for place, pair in enumerate(pairs) if place >= self._parameters or place in wanted)

    def _views(self, flat: Tensor) -> list[Tensor]:
        typed = {dtype: flat.view(dtype) for dtype in self._types}
        views = []
        for offset, stride, tensor in zip(self._offsets, self._strides, self._tensors, strict=True):
            whole = typed[tensor.dtype]
            start = whole.storage_offset() + offset // tensor.element_size()
            views.append(whole.as_strided(tensor.shape, stride, start))
        return views
