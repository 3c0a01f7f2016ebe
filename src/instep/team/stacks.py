"""The Python stack of a process that was forked from this one, which writes it by itself, in the midst of whatever its
main thread does, a call in C that holds the interpreter's lock too.

It is asked by a signal, which Python's `faulthandler` answers: about a millisecond of the process's time. The signal is
blocked there while it answers, so that whoever looks knows when that is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from instep.memory_file import memory_file

SIGNAL = signal.SIGRTMAX - 3
"""No library that is known to use one uses it."""

STACK_BYTES = 1 << 15
"""Bytes of a stack that are shown, the innermost calls first."""

_BIT = 1 << (SIGNAL - 1)


class Stack:
    """Of one process, which has it from before it was forked. Raises OSError where no descriptor is left."""

    def __init__(self) -> None:
        self._file = memory_file()

    def answer(self) -> None:
        """For the process itself: from now on it may be asked."""
        faulthandler.register(SIGNAL, file=self._file, all_threads=False)  # the others' frames may change meanwhile
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})

    def ask(self, pid: int) -> None:
        """Asks the process, which must answer such signals: another would die of it."""
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)  # the process has the same position
        library = ctypes.CDLL(None)
        if hasattr(library, "tgkill"):  # its main thread, and no other
            library.tgkill(pid, pid, SIGNAL)
        else:
            with contextlib.suppress(OSError):
                os.kill(pid, SIGNAL)

    def found(self, pid: int) -> str:
        """The stack, innermost call first; "" while it is not written whole."""
        text = os.pread(self._file, STACK_BYTES, 0)
        if not text or any(mask & _BIT for mask in _masks(pid)):
            return ""
        return os.pread(self._file, STACK_BYTES, 0).decode(errors="replace")

    def close(self) -> None:
        """Closes it for this process."""
        os.close(self._file)


def _masks(pid: int) -> Iterator[int]:
    """Of the process's main thread: the signals that it has still to answer, and those that it answers or blocks."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("SigPnd", "ShdPnd", "SigBlk"):
                yield int(value, 16)
