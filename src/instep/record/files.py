"""Writing so that nothing already saved is lost: data aside, synced, renamed; and errors of the disk as sentences."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from instep.errors import ResourceError

_REMEDIES = {
    errno.ENOSPC: "free some space there, or use a folder on another disk",
    errno.EDQUOT: "free some of your quota there, or use a folder on another disk",
    errno.EACCES: "make the folder writable, or use another one",
    errno.EPERM: "make the folder writable, or use another one",
    errno.EROFS: "use a folder on a disk that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "raise the limit on the size of files, ulimit -f",
    errno.EIO: "check the disk, or use a folder on another one",
}


def disk_error(what: str, error: OSError, *, also: str = "") -> ResourceError:
    """The ResourceError ``{what}: {the system's words}; {remedy}[; {also}].`` for a write that failed."""
    words = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "check the folder and its disk")
    return ResourceError(f"{what}: {words}; {remedy}{'; ' if also else ''}{also}.")


_own: set[int] = set()
"""Open descriptors that this process alone holds."""


def hold_alone(descriptor: int) -> None:
    """Has processes that this one forks close the descriptor: they hold no lock, and keep no file open."""
    _own.add(descriptor)


def close_own(descriptor: int) -> None:
    """Closes a descriptor of `hold_alone`, here. Raises OSError."""
    _own.discard(descriptor)
    os.close(descriptor)


def _close_in_fork() -> None:
    for descriptor in _own:
        with suppress(OSError):
            os.close(descriptor)
    _own.clear()


os.register_at_fork(after_in_child=_close_in_fork)


def sync_folder(path: Path) -> None:
    """Makes the names in the folder `path` durable, or of a file the content. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes the file `path` so that a crash leaves the old content or the new, never a part. Raises ResourceError."""
    aside = path.with_name(f".{path.name}.new")
    try:
        with synced_file(aside) as file:
            file.write(data)
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise disk_error(f"{path} cannot be written", error) from error


@contextmanager
def synced_file(path: Path) -> Iterator[HashingFile]:
    """A new file open for writing, that is on the disk when the block ends. Raises OSError, inside or at the end."""
    with open(path, "wb") as file:
        hashing = HashingFile(file)
        yield hashing
        hashing.check()
        file.flush()
        os.fsync(file.fileno())


class HashingFile:
    """A file open for writing that hashes what passes through, and keeps its first error for `check`.

    `write` itself never raises: writers in C++, such as torch's, turn an exception from here into another one that
    no longer says what happened. After an error the rest is thrown away.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._error: OSError | None = None
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """Writes all of `data`, a contiguous buffer of bytes; gives its length."""
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        self._hash.update(data)
        self.size_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: `synced_file` flushes at its end."""

    def check(self) -> None:
        """Raises the first error of `write`, an OSError, if there was one."""
        if self._error is not None:
            raise self._error

    @property
    def sha256(self) -> str:
        """The SHA-256 of everything written so far, in hexadecimal."""
        return self._hash.hexdigest()


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of the file's bytes, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_text(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON that every reader takes: a number that is not finite becomes null. Keys keep their order."""
    try:
        return json.dumps(value, allow_nan=False, indent=indent)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
