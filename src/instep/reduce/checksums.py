"""Checksums of tensors that cost one read of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def checksum(tensors: Iterable[Tensor]) -> list[str]:
    """For each tensor 8 hexadecimal digits: the sum of its 4-byte words, modulo 2**32. Bits that differ change it.

    It is to find the place where two runs part, not to guard against an adversary. Tensors of other than 4-byte
    elements are taken as float32.
    """
    found = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        words = flat if flat.element_size() == 4 else flat.float()
        found.append(f"{int(words.view(torch.int32).sum()) & 0xFFFFFFFF:08x}")
    return found
