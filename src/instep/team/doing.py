"""What each process of a host's team does, in words, in memory that forked processes share: no message, no wait."""

from __future__ import annotations

import mmap
import struct
import time

_COUNT = struct.Struct("=q")
_WORDS = struct.Struct("=q120s")

TEXT_BYTES = 120
"""Bytes of a text that are shown, in UTF-8."""

_SLOT = 2 * _WORDS.size + 2 * _COUNT.size
"""Bytes of a process: how many texts it has written, and the last two, by turns, each with its moment."""


class DoingBoard:
    """The texts of so many processes. Each writes its own; whoever has the memory may read."""

    def __init__(self, processes: int):
        self._memory = mmap.mmap(-1, max(1, processes) * _SLOT)

    def write(self, process: int, text: str) -> None:
        """From now on the process does this. A microsecond: it is called several times a microbatch."""
        start = process * _SLOT
        count = _COUNT.unpack_from(self._memory, start)[0] + 1
        place = start + 2 * _COUNT.size + count % 2 * _WORDS.size
        _WORDS.pack_into(self._memory, place, time.monotonic_ns(), text.encode(errors="replace")[:TEXT_BYTES])
        _COUNT.pack_into(self._memory, start, count)

    def read(self, process: int) -> tuple[str, int]:
        """What the process does, and since when, in ns of the machine's monotonic clock; ("", 0) before it has told."""
        start = process * _SLOT
        for _ in range(100):  # it may write the one that is read; only who writes without a pause is read torn
            count = _COUNT.unpack_from(self._memory, start)[0]
            since, text = _WORDS.unpack_from(self._memory, start + 2 * _COUNT.size + count % 2 * _WORDS.size)
            if _COUNT.unpack_from(self._memory, start)[0] == count:
                break
        return text.rstrip(b"\0").decode(errors="ignore"), since

    def clear(self, process: int) -> None:
        """Another process takes the place."""
        self.write(process, "")
