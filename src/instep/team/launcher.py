"""How processes are started and ended: by a fork of this one, or as a new Python with the environment of a run."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import IO, Any

from instep.descendants import MARK, death_of, end_marked
from instep.team.channel import Channel
from instep.team.pickling import Pickled
from instep.team.signals import blocked

ENDING_S = 15.0
"""Seconds that a new Python has to end, with all its own, once it was told to."""


class Handle:
    """A process that was forked from this one: it calls `target` with `arguments`. Raises OSError."""

    def __init__(self, target: Callable[..., None], arguments: Sequence[Any], name: str):
        self._process = multiprocessing.get_context("fork").Process(target=target, args=tuple(arguments), name=name)
        self._process.start()
        try:
            self.death = death_of(self._process)
            """A descriptor that is ready to read once the process is dead."""
        except OSError:
            self.kill()
            self.join()
            raise
        assert self._process.pid is not None, "it was started"
        self.pid = self._process.pid

    @property
    def exitcode(self) -> int | None:
        """Its exit status, negative for a signal; None while it lives."""
        return self._process.exitcode

    def kill(self) -> None:
        """Kills it."""
        self._process.kill()

    def join(self, within_s: float | None = None) -> None:
        """Waits for its end, for so long; within a time `multiprocessing` would wait for all that it forked, too."""
        if within_s is None or wait([self.death], within_s):
            self._process.join()

    def close(self) -> None:
        """Closes what is open here for it, once it has ended."""
        os.close(self.death)


class NewPython:
    """A new Python, which runs ``main(descriptor)`` of `module`, and the channel to it. Raises OSError.

    `path` is its ``sys.path``; it has the memory of `sent` and prints to `log`. What a terminal or a scheduler sends to
    all is for this process: it starts with these signals blocked.
    """

    def __init__(self, module: str, path: Sequence[str], threads: int, log: IO[bytes], sent: Pickled):
        _open_standard_files()
        self._mark = uuid.uuid4().hex
        self.channel, theirs = Channel.pair()
        usable = [entry for entry in path if isinstance(entry, str)]  # Python itself passes over the others
        code = f"import sys; sys.path[:] = {usable!r}; from {module} import main; main({theirs.fileno()})"
        try:
            with blocked():
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    cwd=_working_folder(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[theirs.fileno(), sent.descriptor],
                    env={**_environment(threads), MARK: self._mark},
                )
        except BaseException:
            self.channel.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid

    def kill(self) -> None:
        """Kills it: what it started may be left until `end`."""
        self._process.kill()

    def wait(self) -> int:
        """Its exit status, negative for a signal, once it has hung up; it is killed if it does not end then, and so is
        what it could not end itself.
        """
        try:
            status = self._process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if status:
            end_marked(self._mark)
        return status

    def end(self) -> None:
        """Ends it, with all that it started, where it has not ended yet."""
        self.channel.hang_up()
        self.wait()


def _open_standard_files() -> None:
    """Where a program has closed one of the three: else what is opened next would take its place in other processes."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _working_folder() -> str | None:
    """Where to start a process: here, or elsewhere if this folder is gone, for torch could not be loaded."""
    try:
        os.getcwd()
    except OSError:
        return "/"
    return None


def _environment(threads: int) -> dict[str, str]:
    """What must be set before Python, numpy and torch start."""
    caches = {}
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if not os.access(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""), os.W_OK):
            # Torch makes this folder as it is imported, and only runs that compile write there: one that is there.
            caches = {"TORCHINDUCTOR_CACHE_DIR": "/proc/self"}
    return {
        **os.environ,
        **caches,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's; its threads would have to survive the fork
        "PYTHONHASHSEED": "0",  # the order of a set must not change a batch
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matrix products on a GPU
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no helper processes that could outlive a worker
    }
