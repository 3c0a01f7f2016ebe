"""Bits are compared as they lie in memory: not as numbers, and of any strided tensor."""

from __future__ import annotations

import math

import pytest
import torch

from instep.bits import bits_of, same_bits

pytestmark = pytest.mark.pure

TYPES = (
    torch.bool, torch.uint8, torch.int64, torch.uint16, torch.float8_e4m3fn, torch.bfloat16, torch.float32,
    torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_one_other_element_is_seen_in_every_type(dtype: torch.dtype) -> None:
    one = torch.zeros(3, 5).to(dtype)
    other = one.clone()
    assert same_bits(one, other)
    other[2, 4] = 1
    assert not same_bits(one, other)
    assert same_bits(one[0], other[0])
    assert same_bits(one[:0], other[:0])


def test_zeros_of_two_signs_differ_and_a_nan_is_itself() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([math.nan]), torch.tensor([math.nan]))


def test_shapes_and_types_differ_though_bits_do_not() -> None:
    assert not same_bits(torch.zeros(4), torch.zeros(2, 2))
    assert not same_bits(torch.zeros(4), torch.zeros(4, dtype=torch.int32))
    assert not same_bits(torch.zeros(0, 2), torch.zeros(0, 3))


@pytest.mark.parametrize(
    "view",
    [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[1, 1].expand(4), lambda t: torch.complex(t, t).conj()],
    ids=["transposed", "with gaps", "expanded", "conjugate"],
)
def test_a_view_is_equal_to_its_copy(view) -> None:  # type: ignore[no-untyped-def]
    seen = view(torch.arange(15.0).view(3, 5))
    assert same_bits(seen, torch.empty_like(seen).copy_(seen))


def test_bits_are_in_the_same_memory() -> None:
    weights = torch.ones(3)
    bits_of(weights)[1] = 0
    assert weights.tolist() == [1, 0, 1]
