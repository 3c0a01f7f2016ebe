"""Tensors as their bits: equal to the bit is what is promised, where -0.0 is 0.0 and no NaN is itself as numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The type whose elements have so many bytes."""


def bits_of(tensor: Tensor) -> Tensor:
    """Its elements as integers of their size, in the same memory; a complex one's as pairs, on a last dimension."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.view(INTEGERS[real.element_size()])


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two strided tensors of one device have one type, shape and content."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return math.prod(one.shape) == 0 or torch.equal(bits_of(one), bits_of(other))
