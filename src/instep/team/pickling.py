"""Objects for other processes, pickled into memory that they map: arrays and tensors are there once for all of them.

Every process that unpickles maps the memory privately, so that a write stays its own and costs a page. What lies,
unchanged, in a memory-mapped file travels as path, offset and length, and costs nothing but the system's cache of it.
Shared storages, views, strides and subclasses of tensors come out as they went in. No torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import os
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cloudpickle

from instep.errors import DataError, ResourceError
from instep.memory_file import memory_file
from instep.team.mapped_files import FileSpan, MappedFiles
from instep.team.plain import CONTAINERS, PlainParts, load_plain

SMALLEST_BYTES = 1024
"""Arrays and storages of fewer bytes lie in the pickle itself."""

_ALIGN = 64  # bytes, as torch aligns what it allocates: kernels may take other paths elsewhere


@dataclass(frozen=True)
class Span:
    """Bytes of the shared memory."""

    start: int
    stop: int


@dataclass(frozen=True)
class Pickled:
    """An object in shared memory: its pickle there, and its buffers, there or in files.

    `descriptor` is of that memory: valid in the process that pickled as long as this object lives there, and in those
    that inherit it under the same number. `plain` is the pickle of the plain parts, see `instep.team.plain`.
    """

    descriptor: int
    pickle: Span
    buffers: Sequence[Span | FileSpan]
    plain: Span
    _ready: list[list[Any]] = field(default_factory=list, compare=False, repr=False)

    @contextlib.contextmanager
    def prepared(self) -> Iterator[Pickled]:
        """The same for processes that are forked meanwhile: they find its plain parts made. Runs no user's code."""
        ready = []
        with contextlib.suppress(MemoryError):  # those that load it tell of it
            ready.append(self._plain())
        yield replace(self, _ready=ready)
        ready.clear()

    def _plain(self) -> list[Any]:
        if self.plain.start == self.plain.stop:
            return []
        with mmap.mmap(self.descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as memory:
            memory.seek(self.plain.start)
            return load_plain(memory)

    def load(self) -> Any:
        """The object, another one for each call. Raises DataError where a file is gone, and what unpickling raises."""
        memory = memoryview(
            mmap.mmap(self.descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        )
        files = _mapped(span for span in self.buffers if isinstance(span, FileSpan))
        buffers = [
            files[span.path][span.start : span.stop] if isinstance(span, FileSpan) else memory[span.start : span.stop]
            for span in self.buffers
        ]
        parts = self._ready.pop() if self._ready else self._plain()  # another call makes others
        return _Unpickler(memory[self.pickle.start : self.pickle.stop], buffers, parts).load()


@dataclass(frozen=True)
class Packed:
    """What a `Pickled` is, for another host: the content of its memory, and where what lies there."""

    content: bytes
    pickle: Span
    buffers: Sequence[Span]
    plain: Span

    def unpacked(self) -> Pickled:
        """The same in memory of this process. Raises OSError."""
        descriptor = memory_file()
        pickled = Pickled(descriptor, self.pickle, self.buffers, self.plain)
        weakref.finalize(pickled, os.close, descriptor)
        _write(descriptor, memoryview(self.content), 0)
        return pickled


def pack(value: Any) -> Packed:
    """`value` for another host, with the content of what is mapped from files. Raises as `dump` does."""
    found = dump(value, mapped=False)
    with mmap.mmap(found.descriptor, 0, prot=mmap.PROT_READ) as memory:
        content = memory[:]
    return Packed(content, found.pickle, [span for span in found.buffers if isinstance(span, Span)], found.plain)


def dump(value: Any, *, mapped: bool = True) -> Pickled:
    """Pickles `value`. Raises what pickling raises, and ResourceError where there is no memory.

    mapped: whether what lies in a memory-mapped file stays there.
    """
    try:
        descriptor = memory_file()
    except OSError as error:
        raise _no_memory(error) from error
    try:
        buffers: list[pickle.PickleBuffer] = []
        with _writing(), open(descriptor, "wb", closefd=False) as file:
            pickler = _Pickler(file, buffers)
            pickler.dump(value)
            found = Span(0, file.tell())
            pickler.plain.dump(file)
        end = os.lseek(descriptor, 0, os.SEEK_END)
        plain = Span(found.stop, end)
        files = MappedFiles()
        spans: list[Span | FileSpan] = []
        for buffer in buffers:
            with buffer.raw() as view:
                span: Span | FileSpan | None = files.find(view) if mapped else None
                if span is None:
                    start = -(-end // _ALIGN) * _ALIGN
                    end = start + view.nbytes
                    with _writing():
                        _write(descriptor, view, start)
                    span = Span(start, end)
            spans.append(span)
        pickled = Pickled(descriptor, found, spans, plain)
        weakref.finalize(pickled, os.close, descriptor)
        return pickled
    except BaseException:
        os.close(descriptor)
        raise


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    written = 0
    while written < view.nbytes:
        written += os.pwrite(descriptor, view[written : written + (1 << 30)], offset + written)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _no_memory(error) from error


def _no_memory(error: OSError) -> ResourceError:
    return ResourceError(
        f"the recipe's data and model cannot be put into memory that the workers share: {error.strerror}; free some "
        f"memory, raise the limits on memory, files and their size (ulimit -v, -n, -f), or give a callable that builds "
        f"them in each worker."
    )


def _mapped(spans: Iterator[FileSpan]) -> dict[str, memoryview]:
    """The files that these lie in, each mapped once, whole."""
    found: dict[str, memoryview] = {}
    for span in spans:
        if span.path in found:
            continue
        try:
            with open(span.path, "rb") as file:
                there = os.fstat(file.fileno())
                if (there.st_ino, there.st_size) != (span.inode, span.size):
                    raise DataError(
                        f"the file {span.path}, which data of the recipe are mapped from, is another one since the run "
                        f"started; leave it in place while the run trains."
                    )
                found[span.path] = memoryview(
                    mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
                )
        except OSError as error:
            raise DataError(
                f"the file {span.path}, which data of the recipe are mapped from, cannot be read: {error.strerror}; "
                f"leave it in place while the run trains."
            ) from error
    return found


# ----------------------------------------------------------------------------------------------------- what is pickled


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Leaves to `buffers` what is large, and knows storages of tensors and memory-mapped arrays."""

    def __init__(self, file: Any, buffers: list[pickle.PickleBuffer]):
        super().__init__(file, protocol=5, buffer_callback=self._left_out)
        self._buffers = buffers
        self.plain = PlainParts()
        self._storages: dict[int, Any] = {}  # by address of what they stand for: several objects may stand for one

    def persistent_id(self, value: Any) -> int | None:
        return self.plain.place_of(value) if type(value) in CONTAINERS else None

    def _left_out(self, buffer: pickle.PickleBuffer) -> bool:
        with buffer.raw() as view:
            if view.nbytes < SMALLEST_BYTES:
                return True
        self._buffers.append(buffer)
        return False

    def reducer_override(self, value: Any) -> Any:
        reduce = self._reducer_of(type(value))
        found = NotImplemented if reduce is None else reduce(value)
        return super().reducer_override(value) if found is NotImplemented else found

    def _reducer_of(self, kind: type) -> Callable[[Any], Any] | None:
        torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
        if torch is not None and kind is torch.TypedStorage:
            return self._typed_storage
        if torch is not None and kind is torch.UntypedStorage:
            return self._storage
        if numpy is not None and kind is numpy.memmap:
            return _reduce_memmap
        if numpy is not None and kind is numpy.ndarray:
            return _reduce_array
        return None

    def _typed_storage(self, storage: Any) -> Any:
        untyped = storage._untyped_storage
        if type(untyped) is not sys.modules["torch"].UntypedStorage or untyped.device.type != "cpu":
            return NotImplemented
        return _typed, (self._storages.setdefault(untyped._cdata, untyped), storage.dtype)

    def _storage(self, storage: Any) -> Any:
        if storage.device.type != "cpu":
            return NotImplemented
        self._storages.setdefault(storage._cdata, storage)
        return _untyped, (_bytes_at(storage.data_ptr(), storage.nbytes()),)


class _Unpickler(pickle.Unpickler):
    """Of what `_Pickler` wrote, with the plain parts made already."""

    def __init__(self, written: memoryview, buffers: list[memoryview], parts: list[Any]):
        super().__init__(io.BytesIO(written), buffers=buffers)
        self._parts = parts

    def persistent_load(self, place: Any) -> Any:
        return self._parts[place]


def _bytes_at(address: int, count: int) -> pickle.PickleBuffer:
    """The memory there, which its owner, that the pickler holds, keeps alive."""
    return pickle.PickleBuffer((ctypes.c_char * count).from_address(address) if count else bytearray())


def _typed(untyped: Any, dtype: Any) -> Any:
    import torch

    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def _untyped(buffer: Any) -> Any:
    import torch

    if not len(buffer):
        return torch.UntypedStorage(0)
    found = torch.frombuffer(buffer, dtype=torch.uint8)
    if isinstance(buffer, bytearray):  # a small one, which may be resized
        found = found.clone()
    return found.untyped_storage()


def _reduce_array(array: Any) -> Any:
    """An array that is not contiguous goes as one that is, as it would in a pickle, but not through its bytes."""
    numpy = sys.modules["numpy"]
    flags = array.flags
    if flags.c_contiguous or flags.f_contiguous or array.dtype.hasobject or array.nbytes < SMALLEST_BYTES:
        return NotImplemented
    return numpy.asarray, (numpy.ascontiguousarray(array),)


def _reduce_memmap(array: Any) -> Any:
    """As the stretch of memory that it lies in, and its place there."""
    if array.dtype.hasobject or array.nbytes < SMALLEST_BYTES:
        return NotImplemented
    address = array.__array_interface__["data"][0]
    ends = [(count - 1) * stride for count, stride in zip(array.shape, array.strides, strict=True)]
    low, high = sum(min(0, end) for end in ends), sum(max(0, end) for end in ends) + array.itemsize
    if high - low > 2 * array.nbytes and array._mmap is None:
        return NotImplemented
    stretch = _bytes_at(address + low, high - low)
    return _memmap, (stretch, -low, array.shape, array.dtype, array.strides)


def _memmap(buffer: Any, offset: int, shape: Any, dtype: Any, strides: Any) -> Any:
    import numpy

    return numpy.ndarray.__new__(numpy.memmap, shape, dtype, buffer, offset, strides)
