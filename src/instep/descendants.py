"""The processes that a run's own processes start: none of them outlives the run, whatever session it put itself into.

What the kernel helps with is Linux's; elsewhere these functions do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_EXITING = 4  # the kernel's flag of a process that ends

_PATIENCE_S = 5.0
"""Seconds that killed processes have to be gone: one that waits for a dead disk cannot be."""

MARK = "INSTEP_RUN"
"""The environment variable that the processes of one run have in common, with all that they start."""


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Has the kernel send this process the signal when the thread that started it ends, even if it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def orphaned(parent: int) -> bool:
    """Whether `parent`, this process's at its start, has ended or has begun to: what it had open is closed before."""
    with contextlib.suppress(OSError):
        if _is_exiting(parent):
            return True
    return os.getppid() != parent


def has_ended(pid: int) -> bool:
    """Whether a process of Linux has ended or has begun to: its files are closed before, and who is not root may not
    look for them any more.
    """
    try:
        return _is_exiting(pid)
    except OSError:
        return True


def _is_exiting(pid: int) -> bool:
    flags = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6]
    return bool(int(flags) & _EXITING)


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """In the block, whatever descends from this process becomes its child when its own parent ends."""
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), ctypes.c_int()
    library.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    library.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        library.prctl(_PR_SET_CHILD_SUBREAPER, before.value)


def death_of(process: BaseProcess) -> int:
    """A descriptor, to be closed, that is ready to read once the process is dead. Raises OSError.

    The process's own sentinel is not ready before everything that it forked has ended too.
    """
    assert process.pid is not None, "it was started"
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(process.pid)
    return os.dup(process.sentinel)


def children(of: int | None = None) -> set[int]:
    """The children of this process, or of another, dead ones that were not waited for included."""
    found: set[int] = set()
    tasks = f"/proc/{of or os.getpid()}/task"
    with contextlib.suppress(OSError):
        for task in os.listdir(tasks):
            found.update(map(int, Path(f"{tasks}/{task}/children").read_text().split()))
    return found


def reap(pids: Collection[int]) -> None:
    """Waits for those of these children that are dead."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def end_children(but: Collection[int] = ()) -> None:
    """Kills all children of this process but these, and what descends from them where it becomes a child itself."""
    until = time.monotonic() + _PATIENCE_S
    while (found := children().difference(but)) and time.monotonic() < until:
        for pid in found:
            _kill(pid)
        reap(found)
        time.sleep(0.002)


def end_marked(mark: str) -> None:
    """Kills what is left of the run of this mark, whose processes died before they could end their own children."""
    wanted = f"{MARK}={mark}".encode()
    until = time.monotonic() + _PATIENCE_S
    while (found := _marked(wanted)) and time.monotonic() < until:
        for pid in found:
            _kill(pid)
        time.sleep(0.01)


def _marked(wanted: bytes) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or gone
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


class Stopped:
    """How long a process, or with `children` one of its children, has been stopped.

    A look counts half a second at most: who looks may have been stopped too.
    """

    longest_look_s = 0.5

    def __init__(self, pid: int, timeout_s: float, *, children: bool = False):
        self._pid, self._timeout_s, self._children = pid, timeout_s, children
        self._stopped_s, self._looked = 0.0, time.monotonic()

    def look(self) -> str:
        """What is to be said once the process was stopped, without a break, for longer than it may; else ""."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, self.longest_look_s), now
        self._stopped_s = self._stopped_s + passed if any(map(is_stopped, self._watched())) else 0.0
        if self._stopped_s < self._timeout_s:
            return ""
        return f"(pid {self._pid}) has not answered for {self._stopped_s:.1f} s: it is stopped (SIGSTOP or a debugger)"

    def _watched(self) -> set[int]:
        return {self._pid, *(children(self._pid) if self._children else ())}


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by SIGSTOP or a debugger; False where that is unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


def take_care_of_helpers(closing: Iterable[Callable[[], None]]) -> None:
    """Has what this process forks close what is the process's own, and die with it where its main thread forks.

    What another thread forks would die with that thread already, so it is left to who adopts it.
    """
    closers = list(closing)
    process, from_main = os.getpid(), False

    def before() -> None:
        nonlocal from_main
        from_main = threading.get_native_id() == process  # not in a helper, whose helpers may be daemons

    def in_child() -> None:
        if from_main:
            die_with_parent()
        for close in closers:
            with contextlib.suppress(OSError):
                close()
        closers.clear()  # in a helper's helpers these descriptors stand for something else

    os.register_at_fork(before=before, after_in_child=in_child)
