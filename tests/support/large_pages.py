"""This process's memory in large pages: a fork copies the table of its pages, and that of small ones is long."""

from __future__ import annotations

import ctypes
from pathlib import Path

MADV_COLLAPSE = 25
"""Of Linux 6.1; an older one refuses it, and nothing changes."""

PAGE_BYTES = 1 << 21


def collapse() -> None:
    """Puts what is there now, and lies in no file, into large pages."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, flags, _, _, inode, *name = line.split(maxsplit=5)
        if inode == "0" and flags.startswith("rw-p") and name in ([], ["[heap]"]):
            first, last = (int(place, 16) for place in span.split("-"))
            start, stop = -(-first // PAGE_BYTES) * PAGE_BYTES, last // PAGE_BYTES * PAGE_BYTES
            if start < stop:
                libc.madvise(start, stop - start, MADV_COLLAPSE)
