"""A model's trained weights and buffers as one run of bytes, in the types that they have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from instep.reduce.layout import ALIGN_BYTES, placed


class Pack:
    """Where each of a module's trained parameters and buffers lies in a vector of bytes.

    `size_bytes` is its length. The parameters come first, in the order given, then the `frozen` ones that forwards
    write, then all buffers by name.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor], frozen: Sequence[Tensor] = ()):
        buffers = dict(module.named_buffers())
        self._tensors = [*parameters, *frozen, *buffers.values()]
        self._parameters, self._frozen = len(parameters), len(frozen)
        self._offsets, end = placed([tensor.nbytes for tensor in self._tensors], ALIGN_BYTES)
        self.size_bytes = max(end, ALIGN_BYTES)
        self._types = {tensor.dtype for tensor in self._tensors}
        self._strides = [torch.empty(tensor.shape, device="meta").stride() for tensor in self._tensors]

    def save(self, into: Tensor) -> None:
        """Copies the module's present state into `into` ([size_bytes], uint8, on the CPU)."""
        with torch.no_grad():
            for view, tensor in zip(self._views(into), self._tensors, strict=True):
                view.copy_(tensor)

    def load(self, saved: Tensor) -> None:
        """Gives the module the state in `saved` ([size_bytes], uint8)."""
        with torch.no_grad():
            for view, tensor in zip(self._views(saved), self._tensors, strict=True):
                tensor.copy_(view)

    def parameters(self, saved: Tensor) -> list[Tensor]:
        """The parameters in `saved`, as views of it."""
        return self._views(saved)[: self._parameters]

    def frozen(self, saved: Tensor) -> list[Tensor]:
        """The frozen parameters in `saved`, as views of it."""
        return self._views(saved)[self._parameters : self._parameters + self._frozen]

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

    def _views(self, flat: Tensor) -> list[Tensor]:
        typed = {dtype: flat.view(dtype) for dtype in self._types}
        views = []
        for offset, stride, tensor in zip(self._offsets, self._strides, self._tensors, strict=True):
            whole = typed[tensor.dtype]
            start = whole.storage_offset() + offset // tensor.element_size()
            views.append(whole.as_strided(tensor.shape, stride, start))
        return views
