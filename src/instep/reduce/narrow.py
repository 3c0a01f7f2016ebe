"""Numbers in fewer bits than float32 has, as they go over a wire, and the numbers that arrive.

"bfloat16" rounds each. "int8" and "int4" take blocks of 64 in a row: of each block the wire has a scale, a float16, and
for each number how many scales it is, a whole number from -127 to 127 or -7 to 7; of the latter two lie in a byte.
Everything rounds to nearest, ties to even. What arrives is exact in float32: no engine, thread or machine can round it
in another way.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
"""Numbers that share a scale."""

_LEVELS = {"int8": 127, "int4": 7}
_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
_SCALES = (2.0**-24, 65504.0)
"""The smallest and the largest float16 above 0."""


def narrow_bytes(wire: str, count: int) -> int:
    """How many bytes `count` numbers take in this format, scales included."""
    return -(-count * _BITS[wire] // 8) + (2 * -(-count // GROUP) if wire in _LEVELS else 0)


def encoded(numbers: Tensor, wire: str) -> Tensor:
    """`numbers` ([N] float32) in the format `wire`, not "float32": [narrow_bytes(wire, N)] uint8.

    What is beyond the largest number of the format becomes that one. What is not finite stays so: in "int8" and "int4"
    its whole block arrives as NaN.
    """
    if wire == "bfloat16":
        most = torch.finfo(torch.bfloat16).max
        whole = torch.where(numbers.isfinite(), numbers.clamp(-most, most), numbers)
        return whole.to(torch.bfloat16).view(torch.uint8)
    levels = _LEVELS[wire]
    rows = _rows(numbers)
    largest = rows.abs().amax(dim=1)
    scales = torch.where(largest.isfinite(), (largest / levels).clamp(*_SCALES), torch.nan).half()
    counts = (rows / scales.float()[:, None]).round().clamp(-levels, levels)
    codes = counts.nan_to_num(0.0).to(torch.int8).view(torch.uint8).view(-1)
    if wire == "int8":
        codes = codes[: len(numbers)]
    else:
        pairs = codes[: len(numbers) + len(numbers) % 2].view(-1, 2)
        codes = (pairs[:, 0] & 15) | (pairs[:, 1] << 4)
    return torch.cat([scales.view(torch.uint8), codes])


def decoded(message: Tensor, wire: str, count: int) -> Tensor:
    """The `count` numbers ([N] float32) of a message that `encoded` gave."""
    if wire == "bfloat16":
        return message.view(torch.bfloat16).float()
    groups = -(-count // GROUP)
    scales, codes = message[: 2 * groups].view(torch.float16).float(), message[2 * groups :]
    if wire == "int4":
        codes = torch.stack([codes << 4, codes & 240], dim=1).view(-1)[:count]
        counts = codes.view(torch.int8) >> 4  # the upper half of each byte, with its sign
    else:
        counts = codes.view(torch.int8)
    return (_rows(counts.float()) * scales[:, None]).view(-1)[:count]


def _rows(numbers: Tensor) -> Tensor:
    """In blocks, [blocks, GROUP], the last one filled up with 0."""
    return torch.nn.functional.pad(numbers, (0, -len(numbers) % GROUP)).view(-1, GROUP)
