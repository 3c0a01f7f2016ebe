"""What of this process's memory is that of files, so that another process can map it from there."""

from __future__ import annotations

import bisect
import contextlib
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_PRESENT, _SWAPPED, _OF_A_FILE = 1 << 63, 1 << 62, 1 << 61  # bits of an entry of /proc/self/pagemap


@dataclass(frozen=True)
class FileSpan:
    """Bytes of a file, which had this inode and size."""

    path: str
    start: int
    stop: int
    inode: int
    size: int


@dataclass(frozen=True)
class _Mapping:
    start: int
    stop: int
    rights: str
    offset: int
    inode: int
    path: str


class MappedFiles:
    """The files that are mapped into this process now; none where the system does not tell."""

    def __init__(self) -> None:
        self._mappings = list(_mappings())
        self._starts = [mapping.start for mapping in self._mappings]

    def find(self, view: memoryview) -> FileSpan | None:
        """Where in a file the memory of `view` lies, if its content is the file's; else None."""
        if not self._mappings:
            return None
        start = _address(view)
        place = bisect.bisect_right(self._starts, start) - 1
        if start == 0 or place < 0 or start + view.nbytes > self._mappings[place].stop:
            return None
        found = self._mappings[place]
        try:
            there = os.stat(found.path)
        except OSError:
            return None
        offset = found.offset + start - found.start
        if there.st_ino != found.inode or offset + view.nbytes > there.st_size:
            return None
        if found.rights[3] == "p" and found.rights[1] == "w" and _written(start, view.nbytes):
            return None  # a private copy of some page may have been changed
        return FileSpan(found.path, offset, offset + view.nbytes, there.st_ino, there.st_size)


def _mappings() -> Iterator[_Mapping]:
    """Those of files that still have their name, by rising address."""
    with contextlib.suppress(OSError), open("/proc/self/maps", errors="surrogateescape") as lines:
        for line in lines:
            reach, rights, offset, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
            if path and path[0].startswith("/") and inode != "0":
                start, _, stop = reach.partition("-")
                name = path[0].replace("\\012", "\n")
                yield _Mapping(int(start, 16), int(stop, 16), rights, int(offset, 16), int(inode), name)


def _address(view: memoryview) -> int:
    """Where the memory begins; 0 where numpy, without which nothing is mapped as an array, is not there to tell."""
    numpy: Any = sys.modules.get("numpy")
    return 0 if numpy is None else int(numpy.frombuffer(view, "u1").__array_interface__["data"][0])


def _written(start: int, count: int) -> bool:
    """Whether some page there may be a copy of the process's own."""
    first, last = start // mmap.PAGESIZE, (start + count - 1) // mmap.PAGESIZE
    numpy: Any = sys.modules["numpy"]
    try:
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(8 * first)
            while first <= last:
                step = min(1 << 17, last - first + 1)
                entries = numpy.frombuffer(file.read(8 * step), "u8")
                own = (entries & _SWAPPED != 0) | ((entries & _PRESENT != 0) & (entries & _OF_A_FILE == 0))
                if len(entries) < step or own.any():
                    return True
                first += step
    except OSError:
        return True
    return False
