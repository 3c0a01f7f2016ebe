"""Checksums of values, to tell whether a recomputed one is that of the first pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from instep.bits import bits_of

CHUNK = 1 << 16
"""Elements that are summed at once, so that a checksum needs little memory of its own."""


@torch.no_grad()
def checksum(values: Any) -> tuple[Any, ...]:
    """Of each tensor in `values`, in order: its shape, type, the sum of its bits as integers, and their sum weighted by
    place (both modulo 2**64). Other values stand for themselves. Exact bits count: -0.0 and 0.0 differ, and two NaNs
    of the same bits are the same."""
    return tuple(_of(value) for value in pytree.tree_leaves(values))


def _of(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    facts = (tuple(value.shape), value.dtype)
    if value.layout is not torch.strided or value.is_quantized:
        return facts
    value = value.resolve_conj().resolve_neg()
    bits = bits_of(value.contiguous()).view(-1)
    total = weighted = 0
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)  # integers: their sum has no order, on any device
        total += int(part.sum())
        places = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
        weighted += int((part * places).sum())
    return (*facts, total % 2**64, weighted % 2**64)
