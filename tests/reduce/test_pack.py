"""Packs of weights and buffers, and checksums of what they carry, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from instep.reduce.checksums import _weighted_sum_in_place, checksum
from instep.reduce.layout import Pack


class Mixed(nn.Module):
    """Tensors of several types and layouts, an empty one, a frozen one, a tied one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.one = nn.Parameter(torch.randn(3, 5, generator=generator))
        self.low = nn.Parameter(torch.randn(7, generator=generator).bfloat16())
        self.wide = nn.Parameter(torch.randn(2, 3, generator=generator).double())
        self.image = nn.Parameter(torch.randn(2, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last))
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.frozen = nn.Parameter(torch.randn(3, generator=generator), requires_grad=False)
        self.tied = self.one
        self.register_buffer("count", torch.randint(1 << 40, 1 << 41, (), generator=generator))
        self.register_buffer("flag", torch.rand(5, generator=generator) > 0.5)
        self.register_buffer("hidden", torch.randn(3, generator=generator), persistent=False)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def test_a_pack_carries_weights_and_buffers_bit_for_bit_into_another_module() -> None:
    here, there = Mixed(1), Mixed(2)
    pack = Pack(here, here.trained)
    saved = pack.empty()
    pack.save(saved)
    Pack(there, there.trained).load(saved)
    for mine, theirs in zip([*here.trained, *here.buffers()], [*there.trained, *there.buffers()], strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()
    assert not torch.equal(here.frozen, there.frozen), "what is not trained stays"
    assert saved.shape == (pack.size_bytes,)


def test_the_parameters_of_a_pack_are_views_of_it_and_no_longer_of_the_module() -> None:
    module = Mixed()
    pack = Pack(module, module.trained)
    saved = pack.empty()
    pack.save(saved)
    before = [parameter.detach().clone() for parameter in module.trained]
    with torch.no_grad():
        for parameter in module.trained:
            parameter.add_(1)
    views = pack.parameters(saved)
    assert all(torch.equal(view, value) for view, value in zip(views, before, strict=True))
    saved.zero_()
    assert not any(bool(view.any()) for view in views)


def test_tensors_in_a_pack_do_not_overlap_and_are_aligned() -> None:
    module = Mixed()
    pack = Pack(module, module.trained)
    saved = torch.zeros(pack.size_bytes, dtype=torch.uint8)
    places = [(view.data_ptr() - saved.data_ptr(), view.numel() * view.element_size()) for view in pack._views(saved)]
    assert all(place % 64 == 0 for place, size in places if size)
    ends = 0
    for place, size in places:
        if size:
            assert place >= ends
            ends = place + size
    assert ends <= pack.size_bytes


def test_a_module_without_buffers_has_a_pack_too() -> None:
    module = nn.Linear(1, 1, bias=False)
    pack = Pack(module, list(module.parameters()))
    assert pack.size_bytes == 64
    assert Pack(nn.Identity(), []).size_bytes == 64


def by_definition(words: list[int]) -> str:
    return f"{sum(word * (2 * (i % 1024) + 1) * 0x9E3779B1 ** (i // 1024) for i, word in enumerate(words)) % 2**32:08x}"


@pytest.mark.parametrize("size", [0, 1, 20, 1023, 1024, 1025, 5000])
def test_a_checksum_is_the_sum_that_its_docstring_says(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(1))
    assert checksum([values]) == [by_definition([word % 2**32 for word in values.view(torch.int32).tolist()])]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.complex128])
@pytest.mark.parametrize("size", [0, 1, 1025, (1 << 22) + 3])
def test_a_checksum_in_pieces_as_on_a_gpu_is_the_same(kind: torch.dtype, size: int) -> None:
    values = (1000 * torch.randn(size, generator=torch.Generator().manual_seed(1))).to(kind)
    assert checksum([values]) == [f"{_weighted_sum_in_place(values):08x}"]


def test_a_checksum_of_a_view_that_is_conjugate_or_negative_is_that_of_its_values() -> None:
    values = torch.randn(4, dtype=torch.complex64).conj()
    assert checksum([values, values.imag]) == checksum([values.clone(), values.imag.clone()])


@given(st.integers(1, 5000), st.data(), st.integers(0, 1 << 30))
def test_any_bit_and_any_order_changes_a_checksum(size: int, data: st.DataObject, seed: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    place, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 31))
    other = values.clone()
    other.view(torch.int32)[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31)).to(torch.int32)
    assert checksum([values]) != checksum([other])
    swapped = values.clone()
    with_whom = data.draw(st.integers(0, size - 1))
    swapped[place], swapped[with_whom] = values[with_whom], values[place]
    assert (checksum([values]) == checksum([swapped])) == torch.equal(values, swapped)


def test_a_checksum_is_of_each_tensor_and_does_not_depend_on_its_layout() -> None:
    image = torch.arange(24.0).reshape(2, 3, 2, 2)
    found = checksum([image, image.to(memory_format=torch.channels_last), image + 1, image[:0]])
    assert found[0] == found[1] != found[2]
    assert found[3] == "00000000"
    assert all(len(each) == 8 for each in found)
    assert checksum(nn.Linear(2, 2).parameters())


@pytest.mark.parametrize("kind", [torch.float64, torch.int64, torch.bfloat16, torch.uint8, torch.bool])
def test_other_bits_of_any_type_change_a_checksum(kind: torch.dtype) -> None:
    values = torch.tensor([1, 1, 0]).to(kind)
    other = values.clone()
    other.view(torch.uint8)[0] ^= 1
    assert len({*checksum([values, other, values[0], values.flip(0)])}) == 4
