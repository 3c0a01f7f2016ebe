"""A batch as a file in memory without a name, which another process maps: what it holds of tensors is not copied there.

Tensors keep their strides, what they share of their memory, and how that is aligned, since all of it may decide which
kernel computes with them. What a process writes to a batch that it has mapped is its own.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from instep.memory_file import memory_file

_ALIGNED = 64
"""Bytes: addresses keep what is left of them when they are divided by this."""

_GAPS = 4096
"""Bytes of memory between a batch's own that are taken along in any case; else as many as are its own."""

_MOST_BYTES = 1 << 30
"""That are written at once: a system writes no more than 2 GiB."""

_MOST_PIECES = 1_000
"""Likewise: Linux takes 1,024."""


class NotSent(Exception):
    """The batch holds what another process cannot have."""


class Written(NamedTuple):
    """A file: its descriptor, of how many bytes it is, and where what it holds is described."""

    descriptor: int
    nbytes: int
    head: int


class _Place(NamedTuple):
    """Where a tensor lies: in which part of the file, and from which of its elements on. packed: without its gaps."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    part: int = -1  # of nothing
    offset: int = 0
    packed: bool = False


def write(batch: Any, beside: Any = None) -> Written:
    """Writes a batch, any structure of tensors and of what can be pickled, and what goes with it.

    Raises NotSent, and OSError where there is no memory for it.
    """
    content = io.BytesIO()
    packer = _Packer(content)
    try:
        packer.dump((batch, beside))
    except NotSent:
        raise
    except Exception as error:  # whatever an object's own code raises
        raise NotSent(str(error)) from error
    parts = _Parts()
    places = parts.place(packer.tensors)
    raw = [parts.add(np.frombuffer(buffer.raw(), np.uint8), 0) for buffer in packer.buffers]
    described = pickle.dumps((parts.spans, places, raw, content.tell()))
    head, described = parts.end, described + content.getvalue()
    descriptor = memory_file()
    try:
        _write(descriptor, [*parts.pieces(), memoryview(described)])
    except BaseException:
        os.close(descriptor)
        raise
    return Written(descriptor, head + len(described), head)


def read(descriptor: int, nbytes: int, head: int) -> tuple[Any, Any]:
    """The batch, and what goes with it. The descriptor may be closed then: the memory is there as long as a tensor is
    that lies in it.
    """
    path = f"/proc/self/fd/{descriptor}"
    storage: Any = torch.UntypedStorage.from_file(path, shared=False, nbytes=nbytes)
    memory = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (nbytes,), (1,)).numpy()
    described = io.BytesIO(memory[head:].data)
    spans, places, raw, length = pickle.load(described)
    parts = [torch.from_numpy(memory[start : start + count]) for start, count in spans]
    buffers = [memory[start : start + count].data for start, count in (spans[part] for part in raw)]
    content = memory[nbytes - length :].data
    found = _Unpacker(content, buffers, [_tensor(place, parts) for place in places]).load()
    batch, beside = found
    return batch, beside


def tensor_at(place: int) -> Tensor:
    """Stands for a tensor in what is pickled."""
    raise AssertionError(f"tensor {place} is found by who reads the batch")


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO):
        self.buffers: list[pickle.PickleBuffer] = []
        self.tensors: list[Tensor] = []
        super().__init__(file, protocol=5, buffer_callback=self.buffers.append)

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and (not value.is_cpu or value.grad_fn is not None):
            raise NotSent(f"a tensor lies on {value.device}" if value.grad_fn is None else "a tensor has a gradient")
        if type(value) is not Tensor or not _is_plain(value):
            return NotImplemented
        self.tensors.append(value)
        return tensor_at, (len(self.tensors) - 1,)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is its elements, and how they lie."""
    special = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.requires_grad
    return not (special or tensor.is_conj() or tensor.is_neg() or tensor.__dict__)


class _Unpacker(pickle.Unpickler):
    def __init__(self, content: memoryview, buffers: Sequence[memoryview], tensors: Sequence[Tensor]):
        super().__init__(io.BytesIO(content), buffers=buffers)
        self._tensors = tensors

    def find_class(self, module: str, name: str) -> Any:
        found: Callable[[int], Tensor] | Any
        found = self._tensors.__getitem__ if (module, name) == (__name__, tensor_at.__name__) else None
        return super().find_class(module, name) if found is None else found


class _Parts:
    """What the file is to hold: arrays of bytes, each with (start, count) of it. end: of the last one."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.arrays: list[np.ndarray[Any, Any]] = []
        self.end = 0

    def add(self, array: np.ndarray[Any, Any], address: int) -> int:
        """Takes an array, which lies at this address. Returns which part it is."""
        start = -(-self.end // _ALIGNED) * _ALIGNED + address % _ALIGNED
        self.spans.append((start, array.nbytes))
        self.arrays.append(array)
        self.end = start + array.nbytes
        return len(self.spans) - 1

    def pieces(self) -> Iterator[memoryview]:
        """What is to be written, from the file's first byte on."""
        written = 0
        for (start, count), array in zip(self.spans, self.arrays, strict=True):
            if start > written:
                yield memoryview(bytes(start - written))
            if count:
                yield array.data
            written = start + count

    def place(self, tensors: Sequence[Tensor]) -> list[_Place]:
        """Where each lies. Those that have memory in common have it there, unless there is much beside theirs."""
        places: list[_Place] = [_Place(each.dtype, tuple(each.shape), each.stride()) for each in tensors]
        groups: dict[int, list[int]] = {}
        for index, tensor in enumerate(tensors):
            if tensor.numel():
                groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(index)
        for group in groups.values():
            if len(group) == 1 and tensors[group[0]].is_contiguous():  # as most often
                self._place_alone(tensors[group[0]], group[0], places)
                continue
            for some in [group] if _dense([tensors[index] for index in group]) else [[index] for index in group]:
                self._place(tensors, some, places)
        return places

    def _place_alone(self, tensor: Tensor, index: int, places: list[_Place]) -> None:
        storage, begin = tensor.untyped_storage(), int(tensor.storage_offset()) * tensor.itemsize
        part, offset = self._add(storage, begin // 16 * 16, begin + tensor.nbytes), begin % 16 // tensor.itemsize
        places[index] = places[index]._replace(part=part, offset=offset)

    def _place(self, tensors: Sequence[Tensor], some: Sequence[int], places: list[_Place]) -> None:
        own = [tensors[index] for index in some]
        if packed := not _dense(own):  # it is one alone: the gaps are left out
            own = [own[0].contiguous()]
        storage = own[0].untyped_storage()
        first = (min(_span(each)[0] for each in own) - storage.data_ptr()) // 16 * 16  # an element's size divides 16
        last = max(_span(each)[1] for each in own) - storage.data_ptr()
        part = self._add(storage, first, last)
        for index, each in zip(some, own, strict=True):
            offset = (each.data_ptr() - storage.data_ptr() - first) // each.itemsize
            places[index] = places[index]._replace(part=part, offset=offset, packed=packed)

    def _add(self, storage: torch.UntypedStorage, start: int, stop: int) -> int:
        """Takes bytes of a storage. Returns which part they are."""
        view = torch.empty(0, dtype=torch.uint8).set_(storage, start, (stop - start,), (1,))
        return self.add(view.numpy(), storage.data_ptr() + start)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses from its first element on and behind its last one."""
    steps = sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.itemsize


def _dense(tensors: Sequence[Tensor]) -> bool:
    """Whether the memory from the first of them to the last is mostly theirs."""
    spans = [_span(each) for each in tensors]
    whole = max(stop for _, stop in spans) - min(start for start, _ in spans)
    return whole <= 2 * sum(each.nbytes for each in tensors) + _GAPS


def _tensor(place: _Place, parts: Sequence[Tensor]) -> Tensor:
    if place.part < 0:
        return torch.empty_strided(place.size, place.stride, dtype=place.dtype)
    storage, found = parts[place.part].untyped_storage(), torch.empty(0, dtype=place.dtype)
    if not place.packed:
        return found.set_(storage, place.offset, place.size, place.stride)
    packed = found.set_(storage, place.offset, place.size, torch.empty(place.size, device="meta").stride())
    return torch.empty_strided(place.size, place.stride, dtype=place.dtype).copy_(packed)


def _write(descriptor: int, pieces: Sequence[memoryview]) -> None:
    """Writes them one after the other, as many at once as a system takes."""
    start = 0
    for first in range(0, len(pieces), _MOST_PIECES):
        left = [piece.cast("B") for piece in pieces[first : first + _MOST_PIECES]]
        while left:
            if sum(map(len, left)) <= _MOST_BYTES:
                written = os.pwritev(descriptor, left, start)
            else:
                written = os.pwrite(descriptor, left[0][:_MOST_BYTES], start)
            start += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]
