"""How processes are started and ended."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

from instep.descendants import death_of


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
