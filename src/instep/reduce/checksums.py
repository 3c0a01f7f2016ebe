"""Checksums of tensors that cost one read of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_ROW = 1024
"""Words that are multiplied with the same weights, which stay in the first-level cache."""

_WEIGHTS = np.arange(1, 2 * _ROW, 2, dtype=np.uint32)  # all odd, and so is what they are multiplied with:
_BASE = np.uint32(0x9E3779B1)


def checksum(tensors: Iterable[Tensor]) -> list[str]:
    """For each tensor 8 hexadecimal digits: the sum of its 4-byte words times odd weights by place, modulo 2**32.

    Word i, of row r = i // 1024 and column c = i % 1024, weighs ``(2 c + 1) * 0x9E3779B1**r``. So other bits in one
    word always change it, and other changes, words in another order among them, go unseen about once in 2**31. It is to
    find the place where two runs part, not to guard against an adversary. Elements of 1 and 2 bytes are taken as
    float32, which holds all their values.
    """
    return [f"{_weighted_sum(tensor):08x}" for tensor in tensors]


def _weighted_sum(tensor: Tensor) -> int:
    flat = tensor.detach().reshape(-1).cpu()
    if flat.element_size() < 4:
        flat = flat.float()
    words = flat.view(torch.int32).numpy().view(np.uint32)
    rows = words.size // _ROW
    whole, rest = words[: rows * _ROW].reshape(rows, _ROW), words[rows * _ROW :]
    sums = np.append(np.einsum("rc,c->r", whole, _WEIGHTS), np.dot(rest, _WEIGHTS[: rest.size]))
    powers = np.full(rows + 1, _BASE)
    powers[0] = 1
    return int(np.dot(sums, np.multiply.accumulate(powers, dtype=np.uint32)))
