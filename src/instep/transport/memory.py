"""Anonymous memory that a team shares. It has no name, so no ending of the processes can leave it behind."""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import resource
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from instep.errors import ResourceError
from instep.transport import futex

PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Region:
    """One array in shared memory. `reserve` asks for its pages at once, else they come when first written."""

    shape: tuple[int, ...]
    dtype: str
    reserve: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the array, without padding."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def reserve(descriptor: int, regions: Mapping[str, Region]) -> None:
    """Gives the file the size of all regions and asks for their pages. Raises ResourceError."""
    total, wanted = 0, 0
    spans: list[tuple[int, int]] = []
    for region in regions.values():
        if region.reserve and region.nbytes:
            spans.append((total, region.nbytes))
            wanted += region.nbytes
        total += _padded(region.nbytes)
    free, has = _available_bytes(), 512 * os.fstat(descriptor).st_blocks  # another may have asked for it here
    if free is not None and wanted - has > free:
        raise ResourceError(_too_little(wanted, f"{_mib(free)} are free"))
    try:
        os.ftruncate(descriptor, total)
        if hasattr(os, "posix_fallocate"):
            for start, length in spans:
                os.posix_fallocate(descriptor, start, length)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ResourceError(
                f"the workers share {math.ceil(total / 2**20):,} MiB of memory as a file without a name, and the limit "
                f"on the size of files, ulimit -f, is smaller; raise it."
            ) from None
        raise ResourceError(_too_little(wanted, f"the system answered: {error.strerror}")) from None


def attach(descriptor: int, regions: Mapping[str, Region]) -> dict[str, NDArray[np.generic]]:
    """Maps the regions of a reserved file as numpy arrays."""
    memory = mmap.mmap(descriptor, sum(_padded(region.nbytes) for region in regions.values()))
    arrays: dict[str, NDArray[np.generic]] = {}
    offset = 0
    for name, region in regions.items():
        arrays[name] = np.ndarray(region.shape, region.dtype, buffer=memory, offset=offset)
        offset += _padded(region.nbytes)
    return arrays


_fence = threading.Lock()


def mark(marks: NDArray[np.int64], worker: int, value: int) -> None:
    """Sets a worker's mark. Marks only rise, and a worker that sees one sees all that was written before it."""
    for _ in range(2):  # taking a lock after giving it back keeps writes in order on processors that would swap them
        with _fence:
            pass
    marks[worker] = value
    futex.wake(marks, worker)


def wait_for(
    marks: NDArray[np.int64],
    value: int,
    raised: NDArray[np.int64] | None = None,
    level: int = 1,
    broken_off: Callable[[], bool] = lambda: False,
) -> bool | None:
    """Returns when every mark is at least `value`: True; or, False, once one of `raised` is at least `level`; or, None,
    soon after `broken_off` holds.

    It sleeps until a mark is set or, where the system has no such thing, between looks, after a while ever longer, so
    that workers without a core of their own don't hold up the others. There is no time limit here: who waits is not at
    fault, and the supervisor ends the team when a worker fails.
    """
    looks, pause_s = 0, 0.00005
    while int(marks.min()) < value:  # never by one mark alone: another may be the lowest once that one has risen
        if raised is not None and int(raised.max()) >= level:
            return False
        if broken_off():
            return None
        last = int(marks.argmin())
        if (seen := int(marks[last])) >= value or futex.sleep_while(marks, last, seen):
            continue
        time.sleep(pause_s)
        looks += 1
        if looks > 150:
            pause_s = min(1.05 * pause_s, 0.001)
    with _fence:
        pass
    return True


def limited() -> bool:
    """Whether the system bounds the size of files or of what a process maps, so that neither should be too large."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS))
    return any(limit != resource.RLIM_INFINITY for limit in limits)


def rows_to_spare(width: int, workers: int) -> int:
    """How many rows more, of `width` float32, each of so many workers may take of half of what is free."""
    free = _available_bytes()
    return 0 if free is None else free // 2 // (4 * width * workers)


def _padded(nbytes: int) -> int:
    return max(1, -(-nbytes // PAGE)) * PAGE


def _available_bytes() -> int | None:
    """Memory that can still be had, by the kernel's estimate and the control group's limit; None if unknown."""
    free: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    except OSError:
        return None
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))  # given back when need be
        free.append(limit - used + cache)
    return min(free, default=None)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"


def _too_little(wanted: int, why: str) -> str:
    return (
        f"the workers' gradients and weights need {_mib(wanted)} of shared memory, and {why}; "
        f"take fewer workers or a smaller model, or free some memory."
    )
