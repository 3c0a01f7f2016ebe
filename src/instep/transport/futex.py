"""Sleeping until another process changes a number in shared memory, which the kernel of Linux alone offers.

To sleep and look again costs processor time instead, which others that still compute would have used.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys

import numpy as np
from numpy.typing import NDArray

LONGEST_S = 0.02
"""A sleeper wakes by itself after so long, for what wakes nobody."""

_WAIT, _WAKE, _ALL = 0, 1, 2**31 - 1
_NUMBERS = {"x86_64": 202, "aarch64": 98}
"""Of the system call futex, where the low half of an int64 comes first in memory."""

_NUMBER = _NUMBERS.get(platform.machine(), 0) if sys.platform == "linux" and sys.maxsize > 2**32 else 0


class _Time(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


_WOKEN = {errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT}
"""Errors of a sleep that has ended: the number was another already, a signal came, or time was up."""

_call = ctypes.CDLL(None, use_errno=True).syscall if _NUMBER else None
_longest = ctypes.byref(_Time(0, int(1e9 * LONGEST_S)))


def sleep_while(numbers: NDArray[np.int64], place: int, value: int) -> bool:
    """Returns when the number at `place`, which only rises, has changed from `value` and who changed it woke sleepers,
    or a little later, or earlier. False, at once: the system has no such thing.
    """
    if _call is None:
        return False
    failed = _call(_NUMBER, _address(numbers, place), _WAIT, ctypes.c_uint(value & 0xFFFFFFFF), _longest, None, 0)
    return not failed or ctypes.get_errno() in _WOKEN


def wake(numbers: NDArray[np.int64], place: int) -> None:
    """Wakes all who sleep while the number is what it was."""
    if _call is not None:
        _call(_NUMBER, _address(numbers, place), _WAKE, _ALL, None, None, 0)


def _address(numbers: NDArray[np.int64], place: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers.__array_interface__["data"][0] + place * numbers.strides[0])
