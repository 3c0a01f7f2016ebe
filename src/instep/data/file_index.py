"""Where the records of a file begin: an index made once, in a file beside it or in a folder of its own."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from instep.data.files import ReadAt
from instep.errors import DataError

Starts = Callable[[ReadAt], Iterator[NDArray[np.int64]]]
"""Gives the bytes at which the records of a file begin, piece by piece, and at last where the last one ends."""

_HEADER = struct.Struct("<8s16s64sqq")  # magic, kind, digest of the file, its size, records
_MAGIC = b"INSTEPX1"


class IndexedFile:
    """A file of records, each a piece of it, had by number.

    The index is read where it is asked, 16 bytes a record, and held by nobody. It is made by the first process that
    needs it, while others wait, and made again where the size or digest of the file is another than when it was made.
    kind: of index, at most 16 letters. folder: where the index lies; None for beside the file. Raises DataError.
    """

    def __init__(self, path: Path, kind: str, starts: Starts, folder: Path | None = None) -> None:
        self.path, self.file, self._kind, self._starts = path, ReadAt(path), kind, starts
        self.index_path = path.with_name(f".{path.name}.{kind}-index")
        if folder is not None:
            place = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:12]
            self.index_path = folder / f"{path.name}.{place}.{kind}-index"

    @cached_property
    def count(self) -> int:
        """How many records there are."""
        self.ensure()
        return self._found()

    @cached_property
    def known(self) -> str:
        """The digest of the file, by pieces."""
        return self.file.digest()

    def bounds(self, record: int) -> tuple[int, int]:
        """The bytes that a record begins and ends at."""
        if not 0 <= record < self.count:
            raise IndexError(f"record {record} is not from 0 to {self.count - 1}")
        begun, ended = struct.unpack("<2q", self._index.read(_HEADER.size + 8 * record, 16))
        return begun, ended

    def read(self, record: int) -> bytes:
        """The bytes of a record."""
        begun, ended = self.bounds(record)
        return self.file.read(begun, ended - begun)

    def ensure(self, *, wait: bool = True) -> bool:
        """Makes the index unless it is there. False where another process is making it and `wait` is off."""
        if self._found() >= 0:
            return True
        try:
            with made_alone(self.index_path, wait=wait) as alone:
                if alone and self._found() < 0:
                    self._make()
                return alone
        except OSError as error:
            raise self._unwritten(error) from error

    @cached_property
    def _index(self) -> ReadAt:
        self.ensure()
        return ReadAt(self.index_path)

    def _found(self) -> int:
        """How many records the index has, if it is there and that of this file; else -1."""
        try:
            size = os.stat(self.index_path).st_size
            header = ReadAt(self.index_path).read(0, _HEADER.size) if size >= _HEADER.size else b""
        except (OSError, DataError):
            return -1
        if not header:
            return -1
        *said, count = _HEADER.unpack(header)
        right = [_MAGIC, self._kind.encode().ljust(16, b"\0"), self.known.encode(), self.file.size]
        return count if said == right and size == _HEADER.size + 8 * (count + 1) else -1

    def _make(self) -> None:
        pieces = self._starts(self.file)
        try:
            with written_whole(self.index_path) as file:
                file.write(bytes(_HEADER.size))
                self._write(file, pieces)
        except OSError as error:
            raise self._unwritten(error) from error

    def _write(self, file: BinaryIO, pieces: Iterator[NDArray[np.int64]]) -> None:
        count = -1
        for piece in pieces:
            file.write(piece.astype("<i8").tobytes())
            count += len(piece)
        file.seek(0)
        file.write(_HEADER.pack(_MAGIC, self._kind.encode(), self.known.encode(), self.file.size, count))

    def _unwritten(self, error: OSError) -> DataError:
        return DataError(
            f"the index of {self.path} cannot be written to {self.index_path.parent} ({error.strerror}); give 'index', "
            f"a folder that can be written, or make that one so."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_index"}


@contextlib.contextmanager
def made_alone(index: Path, *, wait: bool = True) -> Iterator[bool]:
    """Whether no other process makes this file meanwhile; others wait, or with `wait` off are told so. A file system
    without locks lets several do so. Raises OSError.
    """
    path = index.with_name(f"{index.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is at `path` when all is written, and not before. Raises OSError."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def index_all(files: Sequence[IndexedFile]) -> None:
    """Makes what indexes are not there. Several processes that do so share the work. Raises DataError."""
    for file in [file for file in files if not file.ensure(wait=False)]:
        file.ensure()
