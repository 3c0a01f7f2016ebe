"""Files of a data set: found by pattern, known by a digest, read at any place without being held or mapped."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from instep.errors import DataError, RecipeError
from instep.randomness import key

PIECES, PIECE_BYTES = 256, 4096
"""What of a file its digest covers."""

MOST_OPEN = 128
"""Files that a process keeps open; it opens any further one each time that it reads there."""

_open: set[int] = set()


def found(pattern: str | Sequence[str]) -> list[Path]:
    """The files that a glob names, or several do (``**`` for any folders), each once, in order of their paths, in which
    numbers count as such: ``shard-2`` comes before ``shard-10``. Raises DataError where there are none.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    paths = {Path(name) for each in patterns for name in glob.glob(os.path.expanduser(each), recursive=True)}
    files = sorted((path for path in paths if path.is_file()), key=_by_numbers)
    if not files:
        raise DataError(f"no file is there for {', '.join(patterns)} (from {os.getcwd()}); check the pattern.")
    return files


def found_apart(pattern: str | Sequence[str], held_out: float | str) -> tuple[list[Path], list[Path]]:
    """The files of `pattern`, and those that are held out, by a pattern of their own, and are then none of the former.

    Raises DataError where no file is left.
    """
    held = found(held_out) if isinstance(held_out, str) else []
    left_out = set(map(os.path.realpath, held))
    paths = [path for path in found(pattern) if os.path.realpath(path) not in left_out]
    if not paths:
        raise DataError("all files are held out; give some that are not, or 'held_out' as a share.")
    return paths, held


def check_share(held_out: float | str) -> None:
    """Raises RecipeError unless it is a name or a share."""
    if not isinstance(held_out, str) and not 0 <= held_out < 1:
        raise RecipeError(f"'held_out' is {held_out}; it is a share of the samples, from 0 to below 1, or a name.")


_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}


def refuse_packed(file: ReadAt) -> None:
    """Raises DataError for a compressed file, which can be read from its beginning only."""
    begun = file.read(0, min(8, file.size))
    for magic, name in _PACKED.items():
        if begun.startswith(magic):
            raise DataError(
                f"{file.path} is packed by {name}, so that no sample in it can be read without all before it; unpack "
                f"it, and give the file that comes out."
            )


def _by_numbers(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"([0-9]+)", path.as_posix())
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts]


class ReadAt:
    """A file that is read at any place. It is opened when it is first read, in each process anew, and pickled by path;
    of very many files only some stay open. Several threads may read it.

    Its size and time of change are those of when it was made: another file in its place, and one that is written to, is
    an error. (A copy of it that was pickled knows the size alone until it is read, since that may be on another
    machine.) Nothing is mapped, so that a process does not grow by what it has read. Raises DataError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = os.stat(path)
        except OSError as error:
            raise unreadable(path, error) from None
        self.size, self._changed_ns = status.st_size, status.st_mtime_ns

    def read(self, start: int, count: int) -> bytes:
        """So many bytes from byte `start` on, all of them."""
        if (kept := self.__dict__.get("_descriptor")) is not None:  # as most often
            try:
                return self._read(kept, start, count)
            except OSError as error:
                raise unreadable(self.path, error) from error
        with self._descriptor_of() as descriptor:
            return self._read(descriptor, start, count)

    def _read(self, descriptor: int, start: int, count: int) -> bytes:
        read = os.pread(descriptor, count, start)
        while len(read) < count and (more := os.pread(descriptor, count - len(read), start + len(read))):
            read += more
        if len(read) < count:
            raise DataError(
                f"{self.path} ends after {start + len(read):,} bytes, and had {self.size:,} when the run began; put "
                f"the whole file back."
            )
        if os.fstat(descriptor).st_mtime_ns != self._changed_ns:
            raise self._has_changed()
        return read

    def _has_changed(self) -> DataError:
        return DataError(
            f"{self.path} has changed since the run began; put the file back as it was, or begin a new run."
        )

    def digest(self, *, full: bool = False) -> str:
        """SHA-256, in hexadecimal, of its size and 256 pieces of 4 KiB spread over it, at places keyed by the size; of
        all its bytes where it has no more than these pieces, or `full`.
        """
        sha = hashlib.sha256(f"{self.size}\n".encode())
        with self._descriptor_of() as descriptor:
            if full or self.size <= PIECES * PIECE_BYTES:
                for start in range(0, self.size, 1 << 24):
                    sha.update(self._read(descriptor, start, min(1 << 24, self.size - start)))
                return sha.hexdigest()
            part = self.size // PIECES
            for piece in range(PIECES):
                start = piece * part + key(self.size, piece, "probe") % (part - PIECE_BYTES + 1)
                sha.update(self._read(descriptor, start, PIECE_BYTES))
        return sha.hexdigest()

    @contextlib.contextmanager
    def _descriptor_of(self) -> Iterator[int]:
        """The file, open. Raises DataError for what the system raises in the block too."""
        try:
            if (descriptor := self.__dict__.get("_descriptor")) is not None:
                yield descriptor
                return
            opened = self._opened()
            try:
                yield opened
            finally:
                self._keep(opened)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _opened(self) -> int:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if status.st_size != self.size or self._changed_ns not in (0, status.st_mtime_ns):
            os.close(descriptor)
            raise self._has_changed()
        self._changed_ns = status.st_mtime_ns
        return descriptor

    def _keep(self, opened: int) -> None:
        """For the next reading, unless another thread has kept one meanwhile or there are too many."""
        if len(_open) < MOST_OPEN and self.__dict__.setdefault("_descriptor", opened) == opened:
            _open.add(opened)
        else:
            os.close(opened)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_changed_ns": 0}
        state.pop("_descriptor", None)
        return state

    def __del__(self) -> None:
        if (descriptor := self.__dict__.get("_descriptor")) is not None:
            _open.discard(descriptor)
            os.close(descriptor)


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that cannot be read."""
    return DataError(f"cannot read {path} ({error.strerror}); make it readable or leave it out.")
