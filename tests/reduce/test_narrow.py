"""Numbers in a narrow format: byte for byte those of a slow reference; nothing becomes NaN in silence."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from instep.reduce.narrow import decoded, encoded, narrow_bytes

pytestmark = pytest.mark.pure

LEVELS = {"int8": 127, "int4": 7}
FLOATS = st.floats(width=32)
SMALL = st.floats(-(2.0**-10), 2.0**-10, width=32)
NUMBERS = st.one_of(st.lists(FLOATS, max_size=8), st.lists(SMALL, max_size=200), st.lists(st.one_of(SMALL, FLOATS)))
WIRES = st.sampled_from(["bfloat16", "int8", "int4"])


def as_float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def reference(numbers: list[float], wire: str) -> tuple[bytes, list[float]]:
    """The message and what arrives."""
    if wire == "bfloat16":
        return reference_bfloat16(numbers)
    levels, scales, codes, arrived = LEVELS[wire], b"", list[int](), list[float]()
    for block in cut(numbers):
        finite = all(map(math.isfinite, block))
        scale = min(max(as_float32(max(map(abs, block)) / levels), 2.0**-24), 65504.0) if finite else math.nan
        scales += struct.pack("<e", scale)
        scale = struct.unpack("<e", scales[-2:])[0]
        for number in block:
            code = max(-levels, min(levels, round(as_float32(number / scale)))) if finite else 0
            codes.append(code)
            arrived.append(code * scale)
    if wire == "int4":
        codes += [0] * (len(codes) % 2)
        codes = [(low & 15) | (high & 15) << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    return scales + bytes(code & 255 for code in codes), arrived


def cut(numbers: list[float]) -> list[list[float]]:
    return [numbers[at : at + 64] for at in range(0, len(numbers), 64)]


def reference_bfloat16(numbers: list[float]) -> tuple[bytes, list[float]]:
    """The upper half of each float32, rounded to nearest, ties to even."""
    message = b""
    for number in numbers:
        bits = int.from_bytes(struct.pack("<f", number), "little")
        if math.isnan(number):
            bits = (bits | 0x7FC00000) & 0xFFFF0000  # any NaN will do
        elif not math.isinf(number):
            bits += 0x7FFF + (bits >> 16 & 1)
            if bits & 0x7F800000 == 0x7F800000:  # beyond the largest
                bits = (bits & 0x80000000) | 0x7F7F0000
        message += (bits >> 16).to_bytes(2, "little")
    values = [struct.unpack("<f", b"\0\0" + message[at : at + 2])[0] for at in range(0, len(message), 2)]
    return message, values


def same(found: Tensor, expected: list[float]) -> bool:
    return torch.equal(found.nan_to_num(12345.0), torch.tensor(expected).nan_to_num(12345.0))


@given(numbers=NUMBERS, wire=WIRES)
@example([0.0] * 65, "int4").via("a block of zeros, and a block of one")
@example([-0.0, 1e-45, 2.0**-149], "int8").via("subnormals")
@example([65504.0 * 127 * 2, 1.0], "int8").via("a scale above the largest float16")
@example([3.4e38, -3.4e38, 1.0], "int4").via("the largest")
@example([1e-9] * 64 + [3e-6, -2e-6], "int4").via("scales below the smallest float16")
@example([0.5, 1.5, 2.5, -0.5, -1.5, 7.0], "int4").via("ties")
@example([1.0] * 63 + [math.inf, 2.0], "int8").via("one that is not finite, in one block of two")
@example([3.39e38, 3.4e38, math.inf, math.nan], "bfloat16").via("the end of the range")
def test_a_message_is_byte_for_byte_that_of_plain_python(numbers: list[float], wire: str) -> None:
    message, arrived = reference(numbers, wire)
    found = encoded(torch.tensor(numbers, dtype=torch.float32), wire)
    assert len(message) == found.numel() == narrow_bytes(wire, len(numbers))
    if wire != "bfloat16" or not any(map(math.isnan, numbers)):
        assert bytes(found.tolist()) == message
    assert same(decoded(found, wire, len(numbers)), arrived)


@given(numbers=NUMBERS, wire=WIRES)
def test_what_is_finite_arrives_finite_and_what_is_not_arrives_as_such(numbers: list[float], wire: str) -> None:
    found = decoded(encoded(torch.tensor(numbers, dtype=torch.float32), wire), wire, len(numbers))
    whole = [all(map(math.isfinite, block)) for block in cut(numbers) for _ in block]
    expected = map(math.isfinite, numbers) if wire == "bfloat16" else whole
    assert found.isfinite().tolist() == list(expected)


def test_a_weight_takes_its_bits_and_a_share_of_the_scale() -> None:
    bits = {wire: 8 * narrow_bytes(wire, 64_000) / 64_000 for wire in ("float32", "bfloat16", "int8", "int4")}
    assert bits == {"float32": 32, "bfloat16": 16, "int8": 8.25, "int4": 4.25}
    assert [narrow_bytes("int4", count) for count in (0, 1, 2, 64, 65)] == [0, 3, 3, 34, 37]
