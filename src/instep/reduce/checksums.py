"""Checksums of tensors that cost one read of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROW = 1024
"""Words that are multiplied with the same weights, which stay in the first-level cache."""

_WEIGHTS = np.arange(1, 2 * _ROW, 2, dtype=np.uint32)  # all odd, and so is what they are multiplied with:
_BASE = np.uint32(0x9E3779B1)

_PIECE = 1 << 22
"""Elements that are looked at together on a GPU: whole rows, whatever their size."""


def checksum(tensors: Iterable[Tensor]) -> list[str]:
    """For each tensor 8 hexadecimal digits: the sum of its 4-byte words times odd weights by place, modulo 2**32.

    Word i, of row r = i // 1024 and column c = i % 1024, weighs ``(2 c + 1) * 0x9E3779B1**r``. So other bits in one
    word always change it, and other changes, words in another order among them, go unseen about once in 2**31. It is to
    find the place where two runs part, not to guard against an adversary. Elements of 1 and 2 bytes are taken as
    float32, which holds all their values.
    """
    flat = (tensor.detach().resolve_conj().resolve_neg().reshape(-1) for tensor in tensors)
    return [f"{_weighted_sum(each) if each.is_cpu else _weighted_sum_in_place(each):08x}" for each in flat]


def _weighted_sum(flat: Tensor) -> int:
    words = _words(flat).numpy().view(np.uint32)
    if words.size < _ROW:  # most tensors of most models, and all that there is to them is the time of calls
        return int(np.dot(words, _WEIGHTS[: words.size]))
    rows = words.size // _ROW
    whole, rest, powers = words[: rows * _ROW].reshape(rows, _ROW), words[rows * _ROW :], _powers(rows + 1)
    total = int(np.dot(np.einsum("rc,c->r", whole, _WEIGHTS), powers[:rows]))
    if rest.size:
        total += int(np.dot(rest, _WEIGHTS[: rest.size])) * int(powers[rows])
    return total % (1 << 32)


def _weighted_sum_in_place(flat: Tensor) -> int:
    """The same where the tensor lies, a piece at a time: on a GPU that takes less time than to fetch it."""
    weights, powers = _factors(flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)  # which wraps around at a multiple of 2**32
    power = 1
    for piece in flat.split(_PIECE):
        words = _words(piece)
        rows = torch.nn.functional.pad(words, (0, -words.numel() % _ROW)).view(-1, _ROW)
        total += ((rows * weights).sum(1) * powers[: len(rows)]).sum() * power
        power = power * pow(int(_BASE), len(rows), 1 << 32) % (1 << 32)
    return int(total) % (1 << 32)


def _words(flat: Tensor) -> Tensor:
    return (flat.float() if flat.element_size() < 4 else flat).view(torch.int32)


@cache
def _factors(device: torch.device) -> tuple[Tensor, Tensor]:
    """The weights of a row's words, and of the rows of a piece, there."""
    powers = _powers(_PIECE * 4 // _ROW).astype(np.int64)  # of elements that have 16 bytes at most
    return torch.from_numpy(_WEIGHTS.view(np.int32)).to(device), torch.from_numpy(powers).to(device)


@lru_cache
def _powers(rows: int) -> NDArray[np.uint32]:
    powers = np.full(rows, _BASE)
    powers[:1] = 1
    return np.multiply.accumulate(powers, dtype=np.uint32)
