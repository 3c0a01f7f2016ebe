"""Signals that ask a run to end, and who answers them: the client, and the supervisor where it is asked itself.

A scheduler warns of its time limit (SIGUSR1, SIGUSR2, SIGXCPU), then sends SIGTERM, to one process or to all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Each asks for an end with a checkpoint, as often as it comes."""

ALL = (signal.SIGINT, signal.SIGTERM, *WARNINGS)

ECHO_S = 5.0
"""Seconds in which a launcher passes on what a scheduler has sent to all: a SIGTERM that comes again is the same."""

Handler = Callable[[int, FrameType | None], None]


class Stop:
    """What signals have asked of a client. `wanted`: an end with a checkpoint; `terminated`: by SIGTERM."""

    def __init__(self) -> None:
        self.wanted = self.terminated = False
        self._noted = False
        self._passed_on_until = 0.0

    def hear(self, number: int, _: FrameType | None) -> None:
        """Answers a signal: the first one, and each SIGTERM, with KeyboardInterrupt.

        In `noting` only the second SIGTERM raises, as a second Ctrl-C does; one that torchrun or srun may have passed
        on is not the second.
        """
        again, first, now = self.terminated, not self.wanted, time.monotonic()
        self.wanted = True
        if number == signal.SIGTERM:
            if not again and ("TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ):
                self._passed_on_until = now + ECHO_S
            self.terminated, again = True, again and now >= self._passed_on_until
        if (number == signal.SIGTERM and (again or not self._noted)) or (first and not self._noted):
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """In the block, `wanted` is looked at: several signals may come at once, and an exception could be lost."""
        self._noted = True
        try:
            yield
        finally:
            self._noted = False


_stops: list[Stop] = []


@contextlib.contextmanager
def interrupting() -> Iterator[Stop]:
    """In the block, SIGTERM and each of `WARNINGS` interrupt as Ctrl-C does. Within such a block it is the same one.

    Signals that the program answers or ignores, as under nohup, are left alone, and so are all outside its main thread.
    """
    if _stops:
        yield _stops[0]
        return
    stop = Stop()
    _stops.append(stop)
    try:
        with _answering(stop.hear, (signal.SIGTERM, *WARNINGS), only=signal.SIG_DFL):
            yield stop
    finally:
        _stops.clear()


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """In the block, no signal raises an interrupt: one more would cut a run's ending short."""
    with _answering(lambda *_: None, ALL):
        yield


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """In the block, signals wait. A process that is started in it is born so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _answering(handler: Handler, numbers: tuple[int, ...], *, only: object = None) -> Iterator[None]:
    """In the block, these signals are answered by `handler`; with `only`, those that were answered so before."""
    mine = numbers if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in mine}
    before = {number: was for number, was in before.items() if was is not None and only in (None, was)}
    for number, was in before.items():
        if was != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


class Interrupted(Exception):
    """The run was asked to stop where there was nothing to save, or at once."""


class Requests:
    """What signals ask of this process, which was started in `blocked`: `end`, and `at_once` after a second SIGTERM."""

    def __init__(self) -> None:
        self.end = self.at_once = self._terminated = False

    def listen(self) -> None:
        """From now on signals are heard. Ctrl-C and a hang-up, which a terminal sends to all, are for the client."""
        heard = {signal.SIGTERM, *WARNINGS} - {signal.SIGHUP}
        for number in heard:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.at_once |= self._terminated and number == signal.SIGTERM
        self._terminated |= number == signal.SIGTERM
        self.end = True


def leave_to_others(ask_to_stop: Callable[[], None]) -> None:
    """For a process that computes: signals to all do nothing here, and neither in what the user's code starts.

    But what it starts can be terminated, and this process's own limit of processor time asks for an end.
    Nothing stays blocked, for processes that the user's code starts would inherit that.
    """

    def nothing(*_: object) -> None:
        pass

    def at_limit(*_: object) -> None:
        ask_to_stop()

    def in_child() -> None:
        for number, ours, theirs in (
            (signal.SIGTERM, nothing, signal.SIG_DFL),
            (signal.SIGXCPU, at_limit, signal.SIG_IGN),
        ):
            if signal.getsignal(number) is ours:
                signal.signal(number, theirs)

    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, nothing)
    signal.signal(signal.SIGXCPU, at_limit)
    os.register_at_fork(after_in_child=in_child)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL)
