"""Batches as files in memory: what a process maps is what another wrote, to the strides."""

from __future__ import annotations

import gc
import os
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from instep.data.signature import signature
from instep.transport import batch_files

pytestmark = pytest.mark.pure

Pair = namedtuple("Pair", "first second")


def sent(batch: Any) -> Any:
    file = batch_files.write(batch)
    try:
        return batch_files.read(*file)[0]
    finally:
        os.close(file.descriptor)


TENSORS = {
    "rows": torch.randn(3, 4),
    "a number": torch.tensor(3),
    "nothing": torch.empty(0, 3),
    "bfloat16": torch.randn(5).bfloat16(),
    "bits": torch.tensor([True, False, True]),
    "complex": torch.randn(3, dtype=torch.complex64),
    "channels last": torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    "transposed": torch.randn(7, 5).T,
    "expanded": torch.ones(1).expand(4, 3),
    "a column of much": torch.randn(100, 1000)[:, 5],
    "a row of much": torch.randn(1000, 100)[5],
    "every other": torch.arange(20)[3::2],
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_with_their_bits_strides_and_alignment(name: str) -> None:
    tensor, found = TENSORS[name], sent(TENSORS[name])
    assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert torch.equal(found, tensor)
    if name not in ("nothing", "a column of much"):
        assert found.data_ptr() % 64 == tensor.data_ptr() % 64


def test_any_structure_comes_as_it_was() -> None:
    batch = {
        "pair": Pair(torch.arange(3), [np.arange(6).reshape(2, 3).T, np.float64(2)]), "text": ["a", None, 3.5],
        "sparse": torch.eye(3).to_sparse(), "empty": {}, "more": np.ones(3),
        "objects": np.array([1, "x"], dtype=object),
    }  # fmt: skip
    assert signature(sent(batch)) == signature(batch)
    assert isinstance(sent(batch)["pair"], Pair)


def test_what_is_empty_comes_too() -> None:
    batch = {
        "spans": np.empty((0, 2), np.int64), "names": np.array([], dtype="U3"), "none": torch.empty(0, 3),
        "beside": [np.ones(2), np.empty(0), torch.ones(3)], "bytes": b"",
    }  # fmt: skip
    assert signature(sent(batch)) == signature(batch)
    assert sent(np.empty(0)).shape == (0,)


def test_tensors_that_share_memory_share_it_there() -> None:
    tokens = torch.arange(60).view(5, 12)
    inputs, targets, same = sent((tokens[:, :-1], tokens[:, 1:], [tokens[:, 1:]]))
    inputs[0, 1] = 99
    assert targets[0, 0] == 99
    assert same[0][0, 0] == 99
    one, again = sent([tokens, tokens])
    assert one is again


@pytest.mark.parametrize(("pieces", "most_bytes"), [(1000, 1 << 30), (1000, 1000), (3, 1 << 30)])
def test_what_a_system_does_not_take_at_once_is_written_bit_by_bit(
    pieces: int, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_files, "_MOST_PIECES", pieces)
    monkeypatch.setattr(batch_files, "_MOST_BYTES", most_bytes)
    given, pwritev = [], os.pwritev

    def part(descriptor: int, buffers: list[memoryview], start: int) -> int:  # as where memory is short
        given.append(len(buffers))
        return pwritev(descriptor, [buffers[0][:777]], start)

    monkeypatch.setattr(os, "pwritev", part)
    batch = [TENSORS["rows"], torch.randn(100, 100)[7:], np.ones(5000), TENSORS["a row of much"]]
    assert signature(sent(batch)) == signature(batch)
    assert max(given, default=0) <= pieces


def test_what_is_written_to_a_batch_nobody_else_sees() -> None:
    file = batch_files.write((torch.zeros(5000), np.zeros(5)))
    one, other = batch_files.read(*file)[0], batch_files.read(*file)[0]
    one[0].fill_(1)
    one[1][:] = 1
    os.close(file.descriptor)
    assert not other[0].any()
    assert not other[1].any()
    assert one[0].all()


@pytest.mark.parametrize("batch", [lambda: 0, torch.ones(2, requires_grad=True) * 2])
def test_what_another_process_cannot_have_is_refused(batch: Any) -> None:
    with pytest.raises(batch_files.NotSent):
        batch_files.write({"x": batch})


def test_a_batch_that_is_refused_or_gone_leaves_no_open_file() -> None:
    gc.collect()  # what other tests have left open
    before = len(os.listdir("/proc/self/fd"))
    for batch in (torch.ones(4), lambda: 0):
        try:
            held: Tensor = sent(batch)
        except batch_files.NotSent:
            continue
        assert len(os.listdir("/proc/self/fd")) == before, "though the batch is mapped"
        assert held.sum() == 4
    assert len(os.listdir("/proc/self/fd")) == before
