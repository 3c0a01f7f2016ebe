"""The loaders of one host: started, watched and replaced by its agent, which runs none of the user's code."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from instep.descendants import Stopped, die_with_parent, is_stopped, take_care_of_helpers
from instep.errors import ResourceError, no_process
from instep.record.folder import RunFolder
from instep.sources import import_kept
from instep.team.launcher import Handle
from instep.team.logs import redirect_output
from instep.team.messages import Assignment
from instep.team.signals import leave_to_others
from instep.team.wire_messages import LoaderShown
from instep.transport.units import Units

HANGS = 0.5
"""Of `team.stall_timeout_s`, for which a worker waits for a loader that reads one microbatch, until that is ended: its
own patience is not to end before."""

MOST_DEATHS = 5
"""Of one loader after another, without one microbatch that was read, until no more are started."""


@dataclass
class _Running:
    handle: Handle
    stopped: Stopped
    read: int
    deaths: int


class Loaders:
    """Those of the workers of this host, forked from this process. others: the children of this process that are not
    the team's, to which these are added. workers: by number. unused: what is open here that loaders do not need.
    most: of how many workers a team may come to be while it goes on. Raises ResourceError.
    """

    def __init__(
        self,
        assignment: Assignment,
        workers: Sequence[int],
        others: set[int],
        unused: Callable[[], Collection[Any]],
        most: int = 0,
    ):
        self._assignment, self._others, self._unused = assignment, others, unused
        self._each = assignment.team.loaders
        count, self._first = len(workers) * self._each, workers[0] * self._each
        places = max(len(workers), most)
        try:
            self.units = Units(places, places * self._each)
            self.units.loaders = count
        except OSError as error:
            raise no_process(f"{count} loaders", error) from error
        self._running: dict[int, _Running] = {}
        self._died = [0] * places * self._each
        self._awaited: dict[tuple[int, int], float] = {}  # by loader and microbatch, since when

    @classmethod
    def of(
        cls,
        assignment: Assignment,
        workers: Sequence[int],
        others: set[int],
        unused: Callable[[], Collection[Any]],
        most: int = 0,
    ) -> Loaders | None:
        """Those that the team is to have, to be started by `start`; None for none, or where the system has no files in
        memory that another process may map.
        """
        wanted = assignment.team.loaders and workers and sys.platform == "linux"
        return cls(assignment, workers, others, unused, most) if wanted else None

    def start(self) -> None:
        """Starts all. Raises ResourceError."""
        for number in range(self.units.loaders):
            self._fork(number, None)

    def follow(self, workers: int) -> None:
        """The machine has so many workers now: starts more, or ends the last ones, whose microbatches others read."""
        count = min(workers, self.units.workers) * self._each
        if count == self.units.loaders or self.units.closed:
            return
        before, self.units.loaders = self.units.loaders, count
        for number in range(count, before):
            if number in self._running:
                self._running[number].handle.kill()
                self._take_out(number)
                self.units.recall(number, 0)
        for number in range(before, count):
            with contextlib.suppress(ResourceError):  # there are fewer then
                self._fork(number, None)

    def _fork(self, number: int, code: int | None, deaths: int = 0) -> None:
        arguments = (list(self._unused()), self.units, number, self._first, self._assignment, code)
        try:
            handle = Handle(_main, arguments, f"loader-{self._first + number}")
        except OSError as error:
            raise no_process(f"loader {number + 1} of {self.units.loaders}", error) from error
        self._others.add(handle.pid)
        stopped = Stopped(handle.pid, self._assignment.team.answer_timeout_s)
        self._running[number] = _Running(handle, stopped, int(self.units.read[number]), deaths)

    def sources(self) -> list[Any]:
        """What to wait for, with `multiprocessing.connection.wait`."""
        return [each.handle.death for each in self._running.values()]

    def hear(self, ready: Collection[Any]) -> None:
        """Replaces those that have died, unless they die again and again with nothing read."""
        for number, each in list(self._running.items()):
            if each.handle.death not in ready:
                continue
            code = self._take_out(number)
            self._died[number] += 1
            deaths = 1 + each.deaths * (int(self.units.read[number]) == each.read)
            if deaths == MOST_DEATHS:
                self.units.close()
            if not self.units.closed:
                self._fork(number, code, deaths)

    def look(self) -> None:
        """Ends those that are stopped, for somebody may wait for what they read, and those that hang while one does.
        They are then replaced.
        """
        now = time.monotonic()
        self._awaited = {each: self._awaited.get(each, now) for each in self.units.awaited()}
        most_s = HANGS * self._assignment.team.stall_timeout_s
        hang = {number for (number, _), since in self._awaited.items() if now - since > most_s}
        for number, each in self._running.items():
            if each.stopped.look() or number in hang:
                each.handle.kill()

    def shown(self, host: int) -> tuple[LoaderShown, ...]:
        """What each does, of those of this host."""
        return tuple(self._shown(host, number, each.handle.pid) for number, each in sorted(self._running.items()))

    def _shown(self, host: int, number: int, pid: int) -> LoaderShown:
        place, ahead, ahead_bytes = self.units.of_loader(number)
        doing = "" if place is None else f"reading step {place[0] + 1}, microbatch {place[1]}"
        return LoaderShown(
            host, self._first + number, pid, int(self.units.read[number]), ahead, ahead_bytes, self._died[number],
            doing, is_stopped(pid),
        )  # fmt: skip

    def end(self) -> None:
        """Ends all."""
        for each in self._running.values():
            each.handle.kill()
        for number in list(self._running):
            self._take_out(number)
        self.units.free()

    def _take_out(self, number: int) -> int | None:
        each = self._running.pop(number)
        each.handle.join()
        self._others.discard(each.handle.pid)
        each.handle.close()
        return each.handle.exitcode


def _main(unused: list[Any], units: Units, number: int, first: int, assignment: Assignment, code: int | None) -> None:
    from instep.worker.loader import Loader

    parent = os.getppid()
    gc.freeze()  # what was inherited: the collector would write to it, and so copy it
    for each in unused:
        each.close()
    die_with_parent()
    if os.getppid() != parent:
        return
    take_care_of_helpers([])
    leave_to_others(lambda: None)
    redirect_output(RunFolder(assignment.scratch or assignment.folder).log_of(f"loader {first + number}"))
    import_kept(assignment.sources)
    try:
        loader = Loader(assignment.recipe.load(), assignment.team, units, number, code)
        if loader.has_work:
            loader.load()
    except Exception:
        traceback.print_exc()
    units.close()
