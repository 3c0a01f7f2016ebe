"""Handwritten digits: the 1,797 pictures of 8 x 8 that come with scikit-learn, so that nothing is downloaded."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from instep.data import Data
from instep.errors import ComponentError, DataError, shown

SIDE = 8
"""Pixels of a side."""

HELD_OUT = 180
"""Pictures that are held out."""


def digits(scale: Literal["unit", "signed"] = "unit", labels: bool = True) -> Data:
    """The digits as pairs (picture [1, 8, 8] float32, label int64), or as pictures alone. Needs the extra ``digits``.

    scale: "unit" has pixels from 0 (paper) to 1 (ink), "signed" from -1 to 1. 180 pictures, drawn at random and always
    the same, are held out; 1,617 are trained on. Source: Alpaydin and Kaynak, Optical Recognition of Handwritten
    Digits, UCI, 1998; the part that `sklearn.datasets.load_digits` brings along. Raises ComponentError where
    scikit-learn is not installed.
    """
    if scale not in ("unit", "signed"):
        raise DataError(f"the digits' 'scale' is {shown(scale)}; it must be 'unit' (0 to 1) or 'signed' (-1 to 1).")
    pictures, names = _bundled()
    if scale == "signed":
        pictures = 2 * pictures - 1
    # Shuffled, for as they stand classes take turns.
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    parts = (pictures, names) if labels else (pictures,)
    train, rest = ([part[which] for part in parts] for which in (order[HELD_OUT:], order[:HELD_OUT]))
    return Data(Pictures(*train), Pictures(*rest))


class Pictures(Dataset[Any]):
    """Pictures, with labels or alone; alone, a sample is the tensor itself. `tensors` has all of them."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, ...]:
        parts = tuple(tensor[index] for tensor in self.tensors)
        return parts if len(parts) > 1 else parts[0]


def _bundled() -> tuple[Tensor, Tensor]:
    """Pictures [N, 1, 8, 8], from 0 to 1, and labels [N]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ComponentError(
            "the digits come with scikit-learn, which is not installed; install it with: pip install 'instep[digits]'."
        ) from None
    pictures, names = load_digits(return_X_y=True)
    return torch.tensor(pictures / 16, dtype=torch.float32).view(-1, 1, SIDE, SIDE), torch.tensor(names).long()
