"""What a rank tells all others, as named arrays in one run of bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from instep.transport.group import Group


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
        self._kind, self._bytes = kind, torch.zeros(self.nbytes, dtype=torch.uint8)
        self.own: Any = self._bytes.numpy().view(kind)[0]

    def gather(self, group: Group) -> NDArray[Any]:
        """All ranks' by name, in rank order: [W, *shape]; good until the group's next gather."""
        found = group.gather(self._bytes).numpy()
        gathered: NDArray[Any] = found.view(self._kind)[:, 0]
        return gathered


def as_rows(array: NDArray[Any]) -> list[Tensor]:
    """The rows of a two-dimensional array as tensors over the same memory."""
    return [torch.from_numpy(row) for row in array]
